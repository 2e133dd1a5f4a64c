"""Records: every source read lazily, every bad record named as file:line: field: why."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minituner.data import sources
from minituner.data.records import BadRecords, Record, read_records
from minituner.errors import DataError, SourceError, UsageError
from tests.shared_data import SHARED, needs_shared

ROWS = [{"text": "a"}, {"text": "你好，世界"}, {"text": "line\nbreak 😀"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def _csv(path: Path, delimiter: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def _parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda p: p.write_text(LINES, encoding="utf-8"),
    "a.ndjson": lambda p: p.write_text(LINES, encoding="utf-8"),
    "bom.jsonl": lambda p: p.write_text(LINES, encoding="utf-8-sig"),
    "crlf.jsonl": lambda p: p.write_bytes(LINES.replace("\n", "\r\n").encode()),
    "blank.jsonl": lambda p: p.write_text("\n" + LINES.replace("\n", "\n\n"), encoding="utf-8"),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES.encode())),
    "list.json": lambda p: p.write_text(json.dumps(ROWS), encoding="utf-8"),
    "pretty.json": lambda p: p.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8"),
    "bom.json": lambda p: p.write_text(json.dumps(ROWS, indent=2), encoding="utf-8-sig"),
    "lines.json": lambda p: p.write_text(LINES, encoding="utf-8"),
    "list.json.gz": lambda p: p.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.csv": lambda p: _csv(p, ","),
    "a.tsv": lambda p: _csv(p, "\t"),
    "a.parquet": _parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_source_gives_the_same_records(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    records = list(read_records(path))
    assert records == ROWS
    assert all(record.where.startswith(f"{path}:") for record in records)
    assert len({record.where for record in records}) == len(ROWS)


def test_where_is_the_line_or_the_record(tmp_path: Path) -> None:
    def where(name: str, text: str) -> list[str]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return [record.where.removeprefix(f"{tmp_path}/") for record in read_records(tmp_path / name)]

    assert where("a.jsonl", '{"a": 1}\n\n{"a": 2}\n') == ["a.jsonl:1", "a.jsonl:3"]
    assert where("b.json", '[\n {"a":\n 1},\n\n {"a": 2}]') == ["b.json:2", "b.json:5"]
    assert where("c.json", '[{"a": 1}, {"a": 2}]') == ["c.json:1", "c.json:record 2"]
    assert where("d.json", '{\n"a": 1\n}') == ["d.json:1"]
    assert where("e.csv", 'a,b\n"x\ny",1\nz,2\n') == ["e.csv:2", "e.csv:4"]


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("二\n行", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes("one\r\ntwo".encode("utf-8-sig"))
    assert list(read_records(tmp_path)) == [{"text": "one\ntwo"}, {"text": "二\n行"}]


def test_a_record_keeps_its_place_across_processes() -> None:
    record = pickle.loads(pickle.dumps(Record({"a": 1}, "f.jsonl:1")))
    assert record == {"a": 1}
    assert record.where == "f.jsonl:1"


BAD: dict[str, tuple[str, bytes, str, int]] = {
    # name: (file, content, what the report says after the folder, records that are still read under skip)
    "invalid JSON": ("a.jsonl", b'{"a": 1}\n{"a": }\n{"a": 3}\n', "a.jsonl:2: JSON: Expecting value at column 7", 2),
    "cut line": ("a.jsonl", b'{"a": 1}\n{"a": "x', "a.jsonl:2: JSON: Unterminated string", 1),
    "a list": ("a.jsonl", b'[1]\n{"a": 1}\n', "a.jsonl:1: record: expected an object {...}, found a list", 1),
    "a text": ("a.jsonl", b'"x"\n{"a": 1}\n', "a.jsonl:1: record: expected an object {...}, found text", 1),
    "null": ("a.jsonl", b'{"a": 1}\nnull', "a.jsonl:2: record: expected an object {...}, found null", 1),
    "NUL bytes": ("a.jsonl", b'{"a": 1}\n\0\0\0\0', "a.jsonl:2: JSON: contains NUL bytes", 1),
    "NUL escape": ("a.jsonl", b'{"a": {"b": ["x\\u0000"]}}\n{"a": 1}', "a.jsonl:1: a.b[0]: contains a NUL", 1),
    "lone surrogate": ("a.jsonl", b'{"a": [{"b": "\\ud800"}]}\n{"a": 1}', "a.jsonl:1: a[0].b: contains a lone", 1),
    "surrogate key": ("a.jsonl", b'{"\\udc00": 1}\n{"a": 1}', "a.jsonl:1: \\udc00: contains a lone surrogate", 1),
    "huge number": ("a.jsonl", b"1" * 5000 + b'\n{"a": 1}', "a.jsonl:1: JSON: Exceeds the limit", 1),
    "deep nesting": ("a.jsonl", b"[" * 100_000 + b'\n{"a": 1}', "a.jsonl:1: JSON: maximum recursion depth", 1),
    "GB18030": ("a.jsonl", b'{"a": 1}\n{"a": "\xc4\xe3\xba\xc3"}\n{}', "a.jsonl:2: encoding: not UTF-8: byte 0xc4", 1),
    "UTF-16": ("a.jsonl", '{"a": 1}'.encode("utf-16"), "a.jsonl:1: encoding: not UTF-8: byte 0xff at offset 0", 0),
    "list item": (
        "a.json",
        b'[{"a": 1},\n 2,\n {"a": 3}]',
        "a.json:2: record: expected an object {...}, found",
        2,
    ),
    "open list": ("a.json", b'[{"a": 1},\n {"a": 2}\n', "a.json:3: JSON: the list is not closed", 2),
    "cut list": ("a.json", b'[{"a": 1},\n {"a": "x', "a.json:2: JSON: Unterminated string", 1),
    "missing comma": ("a.json", b'[{"a": 1}\n {"a": 2}]', "a.json:2: JSON: expected ',' between records", 1),
    "last comma": ("a.json", b'[{"a": 1},\n]', "a.json:2: JSON: Expecting value", 1),
    "after the list": ("a.json", b'[{"a": 1}]\nx', "a.json:1: JSON: text after the closing ]", 1),
    "broken inside": ("a.json", b'[{"a": 1},\n {"a": 2,\n  oops},\n {}]', "a.json:3: JSON: Expecting property name", 1),
    "list surrogate": ("a.json", b'[{"a": "\\ud800"}, {"a": "\\ud83d\\ude00"}]', "a.json:1: a: contains a lone", 1),
    "list GB18030": (
        "a.json",
        b'[{"a": 1},\n {"a": "\xc4\xe3"}]',
        "a.json:2: encoding: not UTF-8: byte 0xc4 at offset 19",
        1,
    ),
    "a number": ("a.json", b"7", "a.json:1: record: expected an object {...}, found a number", 0),
    "short row": ("a.csv", b"a,b\n1\n1,2\n", "a.csv:2: row: 1 cells where the header has 2 columns", 1),
    "long row": ("a.csv", b"a,b\n1,2,3\n1,2\n", "a.csv:2: row: 3 cells where the header has 2 columns", 1),
    "open quote": ("a.csv", b'a,b\n1,2\n"x,2\n', "a.csv:3: CSV: unexpected end of data", 1),
    "NUL cell": ("a.csv", b"a,b\n1,\0\n1,2\n", "a.csv:2: b: contains a NUL character", 1),
    "same column": ("a.csv", b"a,a\n1,2\n", "a.csv:1: header: an empty or repeated column name", 0),
    "csv GB18030": ("a.csv", b"a,b\n1,2\n\xc4\xe3,2\n", "a.csv:3: encoding: not UTF-8: byte 0xc4 at offset 8", 1),
    "not a gzip": ("a.jsonl.gz", b'{"a": 1}\n', "a.jsonl.gz:1: file: damaged gzip", 0),
    "not a Parquet": ("a.parquet", b"PAR1 no", "a.parquet:record 1: file: damaged Parquet", 0),
    "NUL text": ("a.txt", b"x\0y", "a.txt:1: text: contains a NUL character", 0),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_stops_or_is_listed(tmp_path: Path, name: str) -> None:
    file, content, message, good = BAD[name]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert caught.value.next_command == f"minituner check {path}"

    report = BadRecords()
    assert len(list(read_records(path, on_error="skip", report=report))) == good
    assert report.count == 1
    assert ": ".join(report.items[0]).startswith(f"{tmp_path}/{message}")
    report.write(tmp_path / "bad.txt")
    assert (tmp_path / "bad.txt").read_text(encoding="utf-8") == ": ".join(report.items[0]) + "\n"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_a_cut_gzip_gives_what_it_can_and_is_reported_once(tmp_path: Path, name: str) -> None:
    rows = [{"a": f"{i * 7919 % 100_003} {i}"} for i in range(60_000)]
    text = {
        "a.jsonl.gz": "".join(json.dumps(row) + "\n" for row in rows),
        "a.json.gz": json.dumps(rows, indent=0),
        "a.csv.gz": "a\n" + "".join(row["a"] + "\n" for row in rows),
    }[name]
    whole = gzip.compress(text.encode(), compresslevel=1)
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    report = BadRecords()
    records = list(read_records(tmp_path / name, on_error="skip", report=report))
    assert 0 < len(records) < len(rows)
    assert records == rows[: len(records)]
    assert [field for _, field, _ in report.items] == ["file"]
    assert "damaged gzip" in report.items[0][2]


def test_offset_names_the_byte_in_later_chunks(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    good = "".join(json.dumps({"a": "你" * 1000}, ensure_ascii=False) + ",\n" for _ in range(900))
    content = f"[{good}".encode()
    path.write_bytes(content + b'{"a": "\xff"}]')
    report = BadRecords()
    assert len(list(read_records(path, on_error="skip", report=report))) == 900
    assert report.items == [(f"{path}:901", "encoding", f"not UTF-8: byte 0xff at offset {len(content) + 7}")]


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b""), ("b.json", b"[]"), ("c.csv", b"a,b\n"), ("d.txt", b""), ("e.json", b" \n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="no records"):
            list(read_records(tmp_path / name))
        report = BadRecords()
        assert list(read_records(tmp_path / name, on_error="skip", report=report)) == []
        assert report.items == [(str(tmp_path / name), "file", "no records")]


def test_skip_without_a_report_warns_with_the_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n1\n2\n', encoding="utf-8")
    with pytest.warns(UserWarning, match=r"2 bad records skipped, the first: .*a.jsonl:2: record: expected"):
        assert list(read_records(path, on_error="skip")) == [{"a": 1}]
    path.write_text('{"a": 1}\n', encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(read_records(path, on_error="skip")) == [{"a": 1}]
    with pytest.raises(UsageError, match="on_error"):
        read_records(path, on_error="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["big.jsonl", "big.json", "big.csv"])
def test_a_ten_megabyte_record(tmp_path: Path, name: str) -> None:
    text = "中文 and English, " * 600_000
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text(f'text\n"{text}"\nx\n', encoding="utf-8")
    elif name.endswith("jsonl"):
        path.write_text(json.dumps({"text": text}) + '\n{"text": "x"}\n', encoding="utf-8")
    else:
        path.write_text(json.dumps([{"text": text}, {"text": "x"}], ensure_ascii=False), encoding="utf-8")
    assert path.stat().st_size > 10_000_000
    assert [record["text"] for record in read_records(path)] == [text, "x"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_reading_is_lazy(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first record costs a chunk of bytes, not the file."""
    path = tmp_path / name
    rows = ({"text": "x" * 1000} for _ in range(20_000))
    lines = (json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) if name == "a.jsonl" else "[" + ",".join(lines) + "]", encoding="utf-8")
    handles: list[Any] = []
    real = Path.open

    def spy(self: Path, *args: Any, **kwargs: Any) -> Any:
        handles.append(real(self, *args, **kwargs))
        return handles[-1]

    monkeypatch.setattr(Path, "open", spy)
    first = list(itertools.islice(read_records(path), 3))
    assert [len(record["text"]) for record in first] == [1000] * 3
    assert path.stat().st_size > 20_000_000
    monkeypatch.undo()
    assert all(handle.closed or handle.tell() <= 1 << 20 for handle in handles)


def test_a_folder_is_sorted_and_knows_splits(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "sub/c.jsonl", ".hidden/x.jsonl", "README.md", "dataset_info.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"n": name}), encoding="utf-8")
    assert [r["n"] for r in read_records(tmp_path)] == ["a.json", "b.jsonl", "sub/c.jsonl"]
    for name in ("test.jsonl", "data/validation-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"n": name}), encoding="utf-8")
    assert [r["n"] for r in read_records(tmp_path, split="test")] == ["test.jsonl"]
    assert [r["n"] for r in read_records(tmp_path, split="dev")] == ["data/validation-00000-of-00001.jsonl"]
    # files that name no split belong to train
    assert "data/train-00000-of-00001.jsonl" in [r["n"] for r in read_records(tmp_path)]
    assert len(list(read_records(tmp_path))) == 4
    with pytest.raises(DataError, match="splits found: test, train, validation"):
        read_records(tmp_path, split="rewards")


def test_missing_paths_suggest_the_nearest_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"did you mean 'train.jsonl'") as caught:
        read_records(tmp_path / "trian.jsonl")
    assert "data files there: train.jsonl" in str(caught.value)
    with pytest.raises(DataError, match=r"the folder .* does not exist"):
        read_records(tmp_path / "no" / "train.jsonl")
    (tmp_path / "x.docx").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="unknown kind of data file"):
        read_records(tmp_path / "x.docx")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no data files"):
        read_records(tmp_path / "none")


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, **kwargs: Any) -> datasets.Dataset:
        asked.append((name, kwargs))
        if name == "owner/gone":
            raise FileNotFoundError("no such data set")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    records = list(read_records("owner/name", split="test"))
    assert records == ROWS
    assert records[1].where == "owner/name:record 2"
    assert asked == [("owner/name", {"split": "test", "streaming": False})]
    with pytest.raises(SourceError, match=r"owner/gone.*could not be loaded"):
        read_records("owner/gone")
    # a folder of that name means a slip in a path, not a hub id; nothing is fetched
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="no such file or folder"):
        read_records("data/tarin")
    with pytest.raises(DataError):
        read_records("owner/train.jsonl")
    assert len(asked) == 2


def test_modelscope_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "modelscope.msdatasets", None)
    with pytest.raises(SourceError, match="needs the package modelscope") as caught:
        read_records("ms:owner/name")
    assert caught.value.next_command == "pip install modelscope"


def test_a_saved_dataset_folder(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    assert list(read_records(tmp_path / "one")) == ROWS
    assert list(read_records(tmp_path / "two", split="test")) == ROWS[:1]
    with pytest.raises(DataError, match="splits found: train, test"):
        read_records(tmp_path / "two", split="dev")


def test_known_names_are_lower_case_and_dotted() -> None:
    assert sources.is_data_file(Path("A.JSONL.GZ"))
    assert not sources.is_data_file(Path("jsonl"))


@needs_shared
@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "alpaca_zh_demo.json", "glaive_toolcall_en_demo.json"])
def test_real_files_equal_json_load(name: str) -> None:
    path = SHARED / "data" / name
    assert list(read_records(path)) == json.loads(path.read_text(encoding="utf-8"))


def test_a_file_that_a_script_makes_names_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        list(read_records("data/personal_assistant.json"))
    assert "make_personal_assistant.py" in caught.value.next_command
