"""The invented alpaca records: the same bytes every time, lengths like real ones, and memory that does not grow."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.data import detect_format, read_records, to_conversation

SCRIPT = Path(__file__).resolve().parents[2] / "data_scripts" / "make_alpaca_like.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_alpaca_like", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load_script()


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # -I -S: no installed packages, so only the standard library can be imported.
    command = [sys.executable, "-I", "-S", "-X", "utf8", str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", check=False)


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def test_same_arguments_same_bytes_and_another_seed_other_text(tmp_path: Path) -> None:
    for name, seed in (("a", 42), ("b", 42), ("c", 7)):
        assert script.write(script.records(300, seed), tmp_path / name) == 300
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_fewer_records_are_the_beginning_of_more() -> None:
    assert list(script.records(20)) == list(itertools.islice(script.records(500), 20))


def test_nothing_is_made_before_it_is_asked_for() -> None:
    first = next(script.records(10**12))
    assert set(first) == {"instruction", "input", "output"}


def test_the_records_are_read_as_alpaca(tmp_path: Path) -> None:
    script.write(script.records(200), tmp_path / "data.jsonl")
    read = list(read_records(tmp_path / "data.jsonl"))
    assert detect_format(read[:20])[0] == "alpaca"
    for record in read:
        question, answer = to_conversation(record, "alpaca").messages
        assert question.text.startswith(record["instruction"])
        assert answer.text == record["output"]
        assert all(text == text.strip() for text in record.values())


def test_lengths_are_log_normal_with_a_long_tail() -> None:
    rows = list(script.records(4000, zh_share=0.0))
    words = sorted(len(" ".join(row.values()).split()) for row in rows)
    assert 45 <= statistics.median(words) <= 75
    assert words[int(0.99 * len(words))] > 5 * statistics.median(words)
    assert words[len(words) // 10] < statistics.median(words) / 1.7
    with_input = sum(bool(row["input"]) for row in rows) / len(rows)
    assert with_input == pytest.approx(script.INPUT_SHARE, abs=0.03)


@pytest.mark.slow
def test_words_are_unevenly_frequent_and_many() -> None:
    words = " ".join(row["output"] for row in script.records(3000, zh_share=0.0)).split()
    counts = sorted((words.count(word) for word in set(words[:2000])), reverse=True)
    assert counts[0] > 0.03 * len(words)
    assert len(set(words)) > 4000


def test_records_differ() -> None:
    rows = [row["output"] for row in script.records(3000)]
    assert len(set(rows)) > 0.98 * len(rows)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_share_of_chinese(share: float) -> None:
    rows = list(script.records(1500, zh_share=share))
    chinese = [row for row in rows if is_chinese(row["instruction"])]
    assert len(chinese) / len(rows) == pytest.approx(share, abs=0.04)
    for row in chinese:
        assert " " not in row["output"].replace(". ", "")  # only numbers of list items are followed by a space
        assert row["output"].endswith("。")


@settings(max_examples=60, deadline=None)
@given(num_words=st.integers(1, 600), seed=st.integers())
def test_a_text_has_exactly_the_words_asked_for(num_words: int, seed: int) -> None:
    text = script.languages()["en"].sentences(random.Random(seed), num_words)
    words = [word for word in text.split() if not (word[:-1].isdigit() and word.endswith(".") and "\n" in text)]
    numbers_as_words = sum(word[:-1].isdigit() and word.endswith(".") for word in text.split())
    assert num_words - numbers_as_words <= len(words) <= num_words
    assert text.endswith(".")


@pytest.mark.parametrize(("count", "share"), [(0, 0.1), (-1, 0.1), (5, 1.5), (5, -0.1), (5, float("nan"))])
def test_impossible_arguments_are_refused_at_once(count: int, share: float) -> None:
    with pytest.raises(script.WrongUsage, match=r"why:.*\n.*fix:"):
        script.records(count, 42, share)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "data.jsonl"
    out.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.os, "fsync", full)
    assert script.main(["--records", "3", "--out", str(out)]) == 1
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_command_line_writes_the_file_with_nothing_but_the_standard_library(tmp_path: Path) -> None:
    done = run("--records", "50", "--out", "new/a.jsonl", "--zh-share", "0.5", "--seed", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote 50 records" in done.stdout
    lines = (tmp_path / "new" / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(script.records(50, 3, 0.5))
    assert any(map(is_chinese, lines))  # readable, not \u escapes


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--records", "0", "--out", "x.jsonl"],
        ["--records", "many", "--out", "x.jsonl"],
        ["--zh-share", "2", "--out", "x.jsonl"],
    ],
)
def test_command_line_wrong_usage_is_exit_2(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "why:" in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_command_line_disk_errors_are_exit_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for out in ("file/data.jsonl", "."):
        done = run("--records", "2", "--out", out, cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        assert "could not write" in done.stderr
        assert "Traceback" not in done.stderr
