"""InternEvo's tokenised data: parity with XTuner's reader, writer and packs, round trips, bad input."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.data import tokenized
from minituner.data.tokenized import data_order, load_tokenized, read_data_order, write_data_order, write_tokenized
from minituner.data.tokenized_packs import pack_tokenized, packed_order
from minituner.errors import DataError, UsageError
from tests.shared_data import GOLDEN, golden_lines, needs_shared

FTDP = GOLDEN / "ftdp"


def as_lists(arrays: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: array.tolist() for name, array in arrays.items()}


def sample(*signed: int) -> dict[str, list[int]]:
    return {"input_ids": [abs(t) for t in signed], "labels": [t if t > 0 else -100 for t in signed]}


# --- parity -----------------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("case", golden_lines("ftdp/loader.jsonl"), ids=lambda case: case["id"])
def test_loader_parity(case: dict[str, Any], tmp_path: Path) -> None:
    if case["kind"] == "JsonlDataset":
        data = load_tokenized(FTDP / case["file"], min_length=case["min_length"])
        assert data.lengths.tolist() == case["length"]
        expected = [{key: s[key] for key in ("input_ids", "labels")} for s in case["samples"]]
        assert [as_lists(s) for s in data] == expected
        assert len(data) + data.dropped_samples == len(np.load(f"{FTDP / case['file']}.meta"))
        return
    folder = FTDP / case["folder"]
    if case["kind"] == "get_data_order":
        assert (
            data_order(folder) == case["data_order_sorted"]
        )  # departs from trap 11: the order is always the sorted one
        written = write_data_order(folder, tmp_path)
        tool = (FTDP / "data_order_from_tool.txt").read_text()
        assert sorted(written.read_text().splitlines(True)) == sorted(tool.splitlines(True))
        return
    order = None
    if "data_order" in case:
        order = tmp_path / "order.txt"
        order.write_text("\n".join(case["data_order"]))
        assert read_data_order(FTDP / "data_order_reversed.txt") == case["data_order"]
    data = load_tokenized(folder, case["kwargs"]["min_length"], order)
    counts = np.diff(data.starts).tolist()
    found = [
        {"file": path.relative_to(FTDP).as_posix(), "n": n, "length": data.lengths[start : start + n].tolist()}
        for path, n, start in zip(data.files, counts, data.starts[:-1].tolist(), strict=True)
    ]
    expected = case.get("output", case.get("datasets"))
    # Without an order file XTuner's order is the file system's (trap 11); ours is sorted, and the cases list it sorted.
    assert found == (expected if order else sorted(expected, key=lambda d: d["file"]))


@needs_shared
@pytest.mark.parametrize("case", golden_lines("ftdp/packed.jsonl"), ids=lambda case: case["id"])
def test_packed_parity(case: dict[str, Any]) -> None:
    data = load_tokenized(FTDP, case["min_length"], case["files_in_order"])
    options = {"packed_length": case["packed_length"], "seed": case["seed"]}
    packs = pack_tokenized(data, **options, keep_tail=False, mask_boundary_labels=False)
    assert (len(packs), packs.per_file) == (case["n"], case["per_file"])
    assert [order.tolist() for order in packs.orders] == case["shuffled_indices"]
    keys = ("input_ids", "cumulative_len", "position_ids", "labels")  # the order of the keys counts in the hash
    found = [{key: pack[key].tolist() for key in keys} for pack in packs]
    if "packs" in case:
        assert found == case["packs"]
    else:
        assert [pack["cumulative_len"] for pack in found] == case["cumulative_len"]
        assert hashlib.sha256(json.dumps(found).encode()).hexdigest() == case["packs_sha256"]

    # Departs from trap 11: by default the tail of each file is kept, and boundaries are not trained.
    kept = pack_tokenized(data, **options)
    assert kept.lengths.sum() == data.lengths.sum() == packs.lengths.sum() + packs.dropped_tokens
    assert kept.dropped_tokens == 0
    assert all((pack["labels"][pack["cumulative_len"][:-1]] == -100).all() for pack in kept)


@needs_shared
def test_the_tools_files_are_written_byte_for_byte(tmp_path: Path) -> None:
    for source in (FTDP / name for name in data_order(FTDP) if name.startswith("tokenized")):
        written = write_tokenized(tmp_path / source.name, load_tokenized(source))
        assert written.read_bytes() == source.read_bytes()
        assert Path(f"{written}.meta").read_bytes() == Path(f"{source}.meta").read_bytes()


# --- round trips ------------------------------------------------------------------------------------------------------

tokens = st.integers(0, 2**31 - 1) | st.integers(0, 3)
samples = st.lists(st.lists(st.tuples(tokens, st.booleans()), max_size=12), max_size=8)


@settings(max_examples=60, deadline=None)
@given(samples, st.integers(0, 6))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, drawn: list, min_length: int) -> None:
    folder = tmp_path_factory.mktemp("round") / "train" / "中文"
    given_samples = [
        {"input_ids": [t for t, _ in one], "labels": [t if trained else -100 for t, trained in one]} for one in drawn
    ]
    path = write_tokenized(folder, iter(given_samples))
    assert path == folder / "tokens.bin"
    assert sorted(p.name for p in folder.iterdir()) == ["tokens.bin", "tokens.bin.meta"]
    data = load_tokenized(folder, min_length)
    assert [as_lists(s) for s in data] == [s for s in given_samples if len(s["labels"]) >= min_length]
    assert data.dropped_tokens + data.lengths.sum() == sum(len(one) for one in drawn)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1, max_size=3), st.integers(1, 12), st.integers(0, 9))
def test_packs_hold_every_token_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], packed_length: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("packs")
    token = iter(range(1, 10_000))
    for number, file in enumerate(lengths):
        write_tokenized(folder / f"{number}.bin", [sample(*(next(token) for _ in range(n))) for n in file])
    data = load_tokenized(folder)
    packs = pack_tokenized(data, packed_length, seed)
    read = list(packs)
    assert [len(pack["input_ids"]) for pack in read] == packs.lengths.tolist()
    assert sorted(t for pack in read for t in pack["input_ids"].tolist()) == list(range(1, next(token)))
    for number, pack in enumerate(read):
        ends = pack["cumulative_len"].tolist()
        assert ends[0] == 0
        assert ends[-1] == packs.lengths[number] <= packed_length
        assert pack["position_ids"].tolist() == [i for a, b in pairwise(ends) for i in range(b - a)]
        assert [b - a for _, a, b in packs.pieces(number)] == np.diff(ends).tolist()
    assert as_lists(packs[-1]) == as_lists(read[-1]) if len(packs) else True


def test_zero_is_trainable_and_the_line_stays_readable_by_the_classic_reader(tmp_path: Path) -> None:
    path = write_tokenized(tmp_path, [{"input_ids": [0, 5, 0, 0], "labels": [-100, -100, 0, -100]}])
    assert load_tokenized(path)[0]["labels"].tolist() == [-100, -100, 0, -100]
    record = json.loads(path.read_bytes())
    assert record == {"tokens": [0, -5, 0, 0], "zero_trained": [2]}
    assert [t if t > 0 else -100 for t in record["tokens"]] == [-100] * 4  # XTuner's reader masks every zero


def test_opening_a_gigabyte_reads_next_to_nothing(tmp_path: Path) -> None:
    path = write_tokenized(tmp_path / "big.bin", [sample(-1, 2), sample(3)])
    first, last = path.read_bytes().splitlines(keepends=True)
    size = 2**30
    with open(path, "wb") as handle:  # a hole between the two lines: the size without the disk
        handle.write(first[:-1] + b"\n")
        handle.seek(size)
        handle.write(last)
    with open(f"{path}.meta", "wb") as handle:
        np.save(handle, np.array([(0, 2), (size, 1)]))
    resource = pytest.importorskip("resource", reason="page faults are counted on Unix only")
    before = resource.getrusage(resource.RUSAGE_SELF)
    data = load_tokenized(path)
    assert [len(data[0]["input_ids"]), len(data[-1]["input_ids"])] == [2, 1]
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 64 * 1024  # kB
    assert (after.ru_minflt + after.ru_majflt) - (before.ru_minflt + before.ru_majflt) < 5_000  # a gigabyte is 262,144


def test_many_files_pickling_and_indices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized, "OPEN_MAPS", 2)
    for number in range(5):
        write_tokenized(tmp_path / f"{number}" / "x.bin", [sample(number + 1)])
    data = load_tokenized(tmp_path)
    for _ in range(2):
        assert [s["input_ids"].item() for s in data] == [1, 2, 3, 4, 5]
    assert len(data._maps) <= 2
    assert pickle.loads(pickle.dumps(data))[np.int64(-1)]["input_ids"].item() == 5
    for outside in (5, -6):
        with pytest.raises(IndexError):
            data[outside]
    with pytest.raises(IndexError):
        pack_tokenized(data)[5]


def test_folders_are_sorted_whatever_the_file_system_says(tmp_path: Path) -> None:
    names = ["b/x.bin", "a/z.bin", "a/中.bin", "y.bin", "a/b/x.bin", "a/x.txt"]
    for name in names[:-1]:
        write_tokenized(tmp_path / name, [sample(1)])
    (tmp_path / names[-1]).write_text("not data")
    expected = ["y.bin", "a/z.bin", "a/中.bin", "a/b/x.bin", "b/x.bin"]
    assert data_order(tmp_path) == expected
    out = write_data_order(tmp_path, tmp_path / "order.txt")
    assert out.read_bytes().decode() == "".join(f"{name}\n" for name in expected)
    out.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(reversed(expected)).encode() + b"\r\n\r\n")
    assert [
        path.relative_to(tmp_path).as_posix() for path in load_tokenized(tmp_path, data_order=out).files
    ] == expected[::-1]


def test_an_interrupted_write_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = write_tokenized(tmp_path, [sample(1, 2)])
    before = path.read_bytes()

    def broken() -> Any:
        yield sample(7)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokenized(tmp_path, broken())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokens.bin", "tokens.bin.meta"]
    assert path.read_bytes() == before


def test_packed_order_is_numpys_legacy_shuffle() -> None:
    expected = list(range(20))
    np.random.RandomState(1024).shuffle(expected)
    assert packed_order(20).tolist() == expected


# --- bad input --------------------------------------------------------------------------------------------------------


def replace_line(path: Path, line: bytes) -> None:
    first = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(first + line)


def save_meta(path: Path, rows: Any) -> None:
    with open(f"{path}.meta", "wb") as handle:
        np.save(handle, rows, allow_pickle=True)


BROKEN = {
    "no meta": (lambda p: Path(f"{p}.meta").unlink(), "missing"),
    "empty meta": (lambda p: Path(f"{p}.meta").write_bytes(b""), "cannot be read"),
    "cut meta": (lambda p: Path(f"{p}.meta").write_bytes(Path(f"{p}.meta").read_bytes()[:-3]), "cannot be read"),
    "pickled meta": (lambda p: save_meta(p, np.array([{"a": 1}], dtype=object)), "cannot be read"),
    "zipped meta": (lambda p: Path(f"{p}.meta").write_bytes(b"PK\x03\x04 an .npz archive"), "cannot be read"),
    "float meta": (lambda p: save_meta(p, np.array([[0.0, 3.0], [24.0, 1.0]])), "not a table"),
    "flat meta": (lambda p: save_meta(p, np.array([0, 3])), "not a table"),
    "offset outside": (lambda p: save_meta(p, np.array([[0, 3], [999, 1]])), "starts at byte 999"),
    "negative offset": (lambda p: save_meta(p, np.array([[-1, 3], [24, 1]])), "starts at byte -1"),
    "huge length": (lambda p: save_meta(p, np.array([[0, 2**40], [24, 1]])), "said to have"),
    "negative length": (lambda p: save_meta(p, np.array([[0, -3], [24, 1]])), "said to have"),
    "meta of fewer lines": (lambda p: save_meta(p, np.array([[0, 3]])), "ends with the line"),
    "meta of no lines": (lambda p: save_meta(p, np.empty((0, 2), np.int64)), "ends with the line"),
    "offset inside a line": (lambda p: save_meta(p, np.array([[3, 3], [24, 1]])), "byte 3: not a sample"),
    "wrong length": (lambda p: save_meta(p, np.array([[0, 2], [24, 1]])), "3 tokens, the .meta says 2"),
    "bin cut in a line": (lambda p: p.write_bytes(p.read_bytes()[:-4]), "truncated"),
    "bin cut between lines": (lambda p: p.write_bytes(p.read_bytes()[:24]), "truncated"),
    "bin empty": (lambda p: p.write_bytes(b""), "truncated"),
    "bin grown": (lambda p: p.write_bytes(p.read_bytes() * 2), "ends with the line"),
    "bin compressed": (lambda p: p.write_bytes(gzip.compress(p.read_bytes())), "compressed"),
    "not JSON": (lambda p: replace_line(p, b'{"tokens": [4}\n'), "byte 24: not a sample"),
    "not an object": (lambda p: replace_line(p, b'["}"]  }\n'), "byte 24: not a sample"),
    "not UTF-8": (lambda p: replace_line(p, b'{"tokens": ["\xff"]}\n'), "byte 24: not a sample"),
    "no tokens": (lambda p: replace_line(p, b'{"ids": [4]}\n'), "no JSON object with tokens"),
    "text token": (lambda p: replace_line(p, b'{"tokens": ["4"]}\n'), "lists of integers"),
    "float token": (lambda p: replace_line(p, b'{"tokens": [4.0]}\n'), "lists of integers"),
    "boolean token": (lambda p: replace_line(p, b'{"tokens": [true]}\n'), "lists of integers"),
    "null token": (lambda p: replace_line(p, b'{"tokens": [null]}\n'), "lists of integers"),
    "nested token": (lambda p: replace_line(p, b'{"tokens": [[4]]}\n'), "lists of integers"),
    "huge token": (lambda p: replace_line(p, b'{"tokens": [%d]}\n' % 2**63), "no token id"),
    "zero_trained outside": (lambda p: replace_line(p, b'{"tokens": [0], "zero_trained": [1]}\n'), "zero_trained"),
    "zero_trained on a token": (lambda p: replace_line(p, b'{"tokens": [4], "zero_trained": [0]}\n'), "zero_trained"),
    "zero_trained not a list": (
        lambda p: replace_line(p, b'{"tokens": [0], "zero_trained": 0}\n'),
        "lists of integers",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_files_are_refused_by_name_with_a_fix(name: str, tmp_path: Path) -> None:
    damage, text = BROKEN[name]
    path = write_tokenized(tmp_path / "坏.bin", [sample(1, -2, 33), sample(4)])
    assert np.load(f"{path}.meta").tolist() == [[0, 3], [24, 1]]  # the table above counts on it
    assert [as_lists(s) for s in load_tokenized(path)] == [sample(1, -2, 33), sample(4)]
    damage(path)
    with pytest.raises(DataError) as caught:
        list(load_tokenized(path))
    assert text in str(caught.value)
    assert "坏.bin" in str(caught.value)
    assert caught.value.fix


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_tokenized(tmp_path / "none")
    with pytest.raises(DataError, match=r"no \.bin file"):
        load_tokenized(tmp_path)
    path = write_tokenized(tmp_path / "a" / "x.bin", [sample(1)])
    with pytest.raises(UsageError, match="min_length"):
        load_tokenized(tmp_path, min_length=-1)
    shutil.copy(path, tmp_path / "a" / "y.bin.gz")
    with pytest.raises(DataError, match=r"y\.bin\.gz: compressed"):
        load_tokenized(tmp_path)
    (tmp_path / "a" / "y.bin.gz").unlink()
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(DataError, match="reached twice"):
        load_tokenized(tmp_path)
    for order, text in [
        (["a/none.bin"], "no such data file"),
        (["a/x.bin", "a/x.bin"], "listed twice"),
        (["../x.bin"], "leaves the data folder"),
        ([str(path)], "leaves the data folder"),
        (tmp_path / "no_order.txt", "cannot be read as a data order"),
    ]:
        with pytest.raises(DataError, match=text):
            load_tokenized(tmp_path, data_order=order)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"input_ids": [1]}, "sample 1: labels: missing"),
        ({"input_ids": [1, 2], "labels": [1]}, "not two lists of one length"),
        ({"input_ids": [[1]], "labels": [[1]]}, "not two lists of one length"),
        ({"input_ids": [1.0], "labels": [1]}, "not integers"),
        ({"input_ids": [-1], "labels": [-100]}, "position 0: token -1"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "position 0: token 1 with label 2"),
        ({"input_ids": [2**31], "labels": [-100]}, "position 0"),
    ],
)
def test_bad_samples_are_refused_before_anything_is_written(bad: dict, text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=text):
        write_tokenized(tmp_path, [sample(1), bad])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("packed_length", "seed"), [(0, 1), (-5, 1), (8, -1), (8, 2**32)])
def test_bad_pack_settings_are_refused(packed_length: int, seed: int, tmp_path: Path) -> None:
    data = load_tokenized(write_tokenized(tmp_path, [sample(1)]))
    with pytest.raises(UsageError):
        pack_tokenized(data, packed_length, seed)
