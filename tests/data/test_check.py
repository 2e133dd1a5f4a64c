"""Check: every bad record with its place, duplicates, placeholders, and the verdict that training would reach."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from minituner.data import prepare
from minituner.data.check import Check, _Seen, check
from minituner.data.conversation import Conversation, Message
from minituner.errors import DataError, UsageError
from tests.shared_data import SHARED, needs_shared
from tests.tiny import tiny_recipe, tiny_tokenizer


def row(question: str, answer: Any = "a", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def write(path: Path, *rows: Any) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in rows)
    path.write_text(text, encoding="utf-8")
    return path


def run(target: Path | str, **options: Any) -> Check:
    return check(target, tokenizer=tiny_tokenizer(), say=lambda line: None, **options)


def found(report: Check, kind: str) -> list[str]:
    return [
        str(finding).removeprefix(f"{Path(report.target).parent}/")
        for finding in report.findings
        if finding.kind == kind
    ]


def test_good_data_is_accepted(chats: Path) -> None:
    report = run(chats)
    assert report.exit_code == 0
    assert report.counts == {}
    assert report.records == 12
    assert report.layouts == {"openai": 12}
    assert report.longest[0] > 0
    assert report.summary()[-1] == "training would accept this data"


def test_every_bad_record_has_its_place(tmp_path: Path) -> None:
    data = write(
        tmp_path / "bad.jsonl",
        row("fine"),
        "{broken",
        row("q", None),
        row("q", 7),
        "[1]",
        {"messages": [{"role": "robot", "content": "x"}]},
        '{"messages": [{"role": "user", "content": "nul \\u0000"}]}',
        '{"messages": [{"role": "user", "content": "half \\ud83d"}]}',
        row("再来一个", "好"),
    )
    seen: list[str] = []
    report = run(data, on_finding=lambda finding: seen.append(finding.where))
    lines = [finding for finding in report.findings if finding.kind == "bad record"]
    assert {finding.where for finding in lines} == {f"{data}:{n}" for n in (2, 3, 4, 5, 6, 7, 8)}
    assert set(seen) == {finding.where for finding in lines}
    assert report.exit_code == 2
    assert report.refusal.startswith("7 bad records")
    assert report.counts["bad record"] == 7


def test_on_error_skip_accepts_what_is_left(tmp_path: Path) -> None:
    data = write(tmp_path / "bad.jsonl", row("fine"), "{broken")
    assert run(data).exit_code == 2
    assert run(data, overrides=["data.on_error=skip"]).exit_code == 0


@pytest.mark.parametrize("content", ["", "\n\n", "{}\n"])
def test_nothing_to_train_on_is_refused(tmp_path: Path, content: str) -> None:
    data = tmp_path / "empty.jsonl"
    data.write_text(content)
    assert run(data).exit_code == 2
    assert run(data, overrides=["data.on_error=skip"]).exit_code == 2


def test_records_without_a_trained_token(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", row("ok"), row("y" * 300, "lost"), row("ok 2"))
    report = run(data, overrides=["data.max_length=100"])
    assert found(report, "no trained token") == ["a.jsonl:2: no trained token left"]
    assert report.counts["over-long"] == 1
    assert report.longest[0] > 300
    assert report.longest[1] == f"{data}:2"
    assert report.exit_code == 0
    assert any(line.startswith("over-long: 1 records") for line in report.summary())
    nothing = run(data, overrides=["data.max_length=8"])
    assert nothing.exit_code == 2
    assert "nothing is left to train on" in nothing.refusal


def test_duplicates_are_pairs_of_places(tmp_path: Path) -> None:
    rows = [row("a"), row("b"), row("a", id=7), row("a", "other"), row("a")]
    data = write(tmp_path / "a.jsonl", *rows)
    report = run(data)
    assert found(report, "duplicate") == [f"a.jsonl:3: the same as {data}:1", f"a.jsonl:5: the same as {data}:1"]
    assert report.exit_code == 0, "a duplicate is for you to judge"


def test_duplicates_are_found_across_sources(tmp_path: Path, model_folder: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", row("你好")), write(tmp_path / "b.jsonl", row("x"), row("你好"))
    recipe = tiny_recipe(model_folder, first, data={"sources": [{"path": str(first)}, {"path": str(second)}]})
    recipe.dump(tmp_path / "recipe.yaml")
    report = run(tmp_path / "recipe.yaml")
    assert [str(f) for f in report.findings] == [f"{second}:2: the same as {first}:1"]


def test_places_survive_the_packing_into_numbers() -> None:
    seen = _Seen()
    places = ["a.jsonl:1", "b.parquet:record 2", "odd", "a.jsonl:2147483999", "b.parquet:record 9", "c:d.json:8"]
    for place in places:
        seen.add(Conversation([Message("user", "same")]), place)
    assert list(seen.duplicates()) == [(places[0], place) for place in places[1:]]
    assert list(_Seen().duplicates()) == []


def test_placeholders_are_named(tmp_path: Path) -> None:
    data = write(
        tmp_path / "a.jsonl", row("Who?", "I am {{name}} by {{ author }}, {{name}}."), row("f'{x}'", "{y} <NAME>")
    )
    assert found(run(data), "placeholder") == [
        "a.jsonl:1: messages[1].content: unfilled placeholder {{name}}",
        "a.jsonl:1: messages[1].content: unfilled placeholder {{ author }}",
    ]


def test_mixed_layouts(tmp_path: Path) -> None:
    alpaca = {"instruction": "a", "output": "b"}
    early = run(write(tmp_path / "early.jsonl", row("a"), alpaca, row("b")))
    assert early.exit_code == 2
    assert "different layouts" in early.refusal
    assert early.layouts == {"openai": 2, "alpaca": 1}
    assert early.records == 3, "the rest is read all the same"
    late = run(write(tmp_path / "late.jsonl", *[row(f"q{i}") for i in range(25)], alpaca))
    assert late.exit_code == 2
    assert found(late, "bad record")[0].startswith("late.jsonl:26: messages: missing")
    assert found(late, "mixed layouts")[0].endswith(f"alpaca 1 (first {tmp_path / 'late.jsonl'}:26)")


def test_an_unknown_layout_is_one_finding(tmp_path: Path) -> None:
    report = run(write(tmp_path / "a.jsonl", *[{"foo": i} for i in range(50)]))
    assert report.counts == {"bad record": 1}
    assert report.exit_code == 2
    assert report.records == 50


def test_a_missing_source_does_not_hide_the_others(tmp_path: Path, model_folder: Path) -> None:
    good = write(tmp_path / "good.jsonl", row("a"))
    sources = [{"path": str(tmp_path / "gone.jsonl")}, {"path": str(good)}]
    tiny_recipe(model_folder, good, data={"sources": sources}).dump(tmp_path / "recipe.yaml")
    report = run(tmp_path / "recipe.yaml")
    assert report.exit_code == 2
    assert "no such file" in report.refusal
    assert report.ledger.documents == 1


def test_damaged_files(tmp_path: Path) -> None:
    good = "".join(json.dumps(row(f"q{i}")) + "\n" for i in range(50)).encode()
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(good)[:-60])
    report = run(cut)
    assert report.exit_code == 2
    assert "damaged gzip" in report.refusal
    latin = tmp_path / "gbk.jsonl"
    latin.write_bytes(good + json.dumps(row("你好"), ensure_ascii=False).encode("gb18030") + b"\n")
    assert "not UTF-8" in run(latin).refusal
    assert run(latin).ledger.documents == 50
    bom = tmp_path / "bom.jsonl"
    bom.write_bytes(b"\xef\xbb\xbf" + good.replace(b"\n", b"\r\n"))
    assert run(bom).exit_code == 0


def test_wrong_settings_are_refused_at_once(chats: Path) -> None:
    with pytest.raises(UsageError, match="qwen_chatt"):
        run(chats, template="qwen_chatt")
    with pytest.raises(UsageError, match="opeanai"):
        run(chats, format="opeanai")


def test_lists_are_bounded_but_counts_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minituner.data import check as module

    monkeypatch.setattr(module, "MOST_LISTED", 3)
    seen: list[Any] = []
    report = run(write(tmp_path / "a.jsonl", *["{"] * 10, row("a")), on_finding=seen.append)
    assert report.counts["bad record"] == 10
    assert len(report.findings) == 3
    assert len(seen) == 10


def test_facts_are_plain_json(tmp_path: Path) -> None:
    report = run(write(tmp_path / "a.jsonl", row("a"), "{", row("a")))
    facts = json.loads(json.dumps(report.to_dict()))
    assert facts["exit_code"] == 2
    assert facts["counts"] == {"bad record": 1, "duplicate": 1}
    assert {finding["kind"] for finding in facts["findings"]} == {"bad record", "duplicate"}


def test_the_verdict_is_that_of_prepare(tmp_path: Path, model_folder: Path, own_home: Path) -> None:
    """Whatever the data: check refuses exactly what prepare refuses, and their ledgers agree."""
    alpaca = {"instruction": "a", "output": "b"}
    cases: list[list[Any]] = [
        [row("a"), row("b")],
        [row("a"), "{"],
        [row("a"), row("b", None)],
        [row("a"), alpaca],
        [{"foo": 1}],
        [row("y" * 500, "gone")],
        [row("a", "")],
        [],
        [row("a"), {"messages": []}],
        [{"text": "Once upon a time"}],
    ]
    for number, rows in enumerate(cases):
        data = write(tmp_path / f"{number}.jsonl", *rows)
        for on_error in ("stop", "skip"):
            settings = {"sources": [{"path": str(data)}], "on_error": on_error, "cache": False}
            recipe = tiny_recipe(model_folder, data, data=settings)
            recipe.dump(tmp_path / "recipe.yaml")
            report = run(tmp_path / "recipe.yaml")
            refusal = ""
            try:
                ledger = prepare(recipe.data, tiny_tokenizer(), say=lambda line: None).ledger
            except DataError as error:
                refusal = str(error)
            assert bool(report.refusal) == bool(refusal), f"case {number} {on_error}: {report.refusal!r}, {refusal!r}"
            assert refusal or report.ledger.to_dict() == ledger.to_dict()


@needs_shared
def test_real_data_with_placeholders() -> None:
    report = run(SHARED / "data" / "identity.json")
    assert report.exit_code == 0
    assert report.counts["placeholder"] == 137
    assert report.counts["bad record"] == 0
