"""Prepare: nothing is lost between the file and the packs, and memory does not grow with the data."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import encode_many
from minituner.data.prepare import Prepared, _chunks, prepare, source_records
from minituner.data.records import BadRecords
from minituner.errors import DataError
from minituner.recipe import DataSection, SourceSection
from tests.tiny import tiny_tokenizer, write_chats

TOKENIZER = tiny_tokenizer()


def section(*paths: Path | dict[str, Any], **settings_: Any) -> DataSection:
    """A data section over files in the openai layout."""
    sources = [p if isinstance(p, dict) else {"path": str(p), "format": "openai"} for p in paths]
    return DataSection(sources=sources, **{"max_length": 128, **settings_})


def run(data: DataSection, said: list[str] | None = None, seed: int = 42) -> Prepared:
    """`prepare` with the tiny tokenizer."""
    return prepare(data, TOKENIZER, seed=seed, say=(said if said is not None else []).append)


def write(path: Path, rows: list[Any]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str) -> dict[str, Any]:
    """A single-turn record."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def columns(prepared: Prepared) -> dict[str, Any]:
    """The Arrow columns as plain lists."""
    return prepared.dataset.with_format(None).to_dict()


def pairs(data: dict[str, Any]) -> Counter[tuple[bytes, bytes]]:
    """How often each document (input_ids, labels) is there."""
    rows = zip(data["input_ids"], data["labels"], strict=True)
    return Counter((np.int32(ids).tobytes(), np.int32(labels).tobytes()) for ids, labels in rows)


def all_tokens(prepared: Prepared) -> list[tuple[int, int]]:
    """(input_id, label) of all packs, in order."""
    packs = [prepared.documents(number) for number in range(len(prepared.packs))]
    return [pair for pack in packs for ids, labels in pack for pair in zip(ids.tolist(), labels.tolist(), strict=True)]


LETTERS = st.characters(exclude_categories=["Cs", "Cc"])  # the reader refuses NUL and lone surrogates
ROWS = st.lists(
    st.tuples(st.text(LETTERS, max_size=30), st.text(LETTERS, max_size=120), st.booleans()).map(
        lambda row: {"text": row[1] + "文"} if row[2] else chat(row[0], row[1])
    ),
    max_size=8,
)


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, too_long=st.sampled_from(["truncate", "drop", "split"]))
def test_every_token_is_in_a_pack_or_in_the_ledger(
    own_home: Path, tmp_path: Path, packing: str, rows: list[dict], too_long: str
) -> None:
    """The multiset of (document, token) that goes in comes out, but for what the ledger says was cut or dropped."""
    chats = [row for row in rows if "messages" in row] or [chat("a", "b")]
    texts = [*(row for row in rows if "text" in row), {"text": "文"}]  # one that always fits
    sources = [
        {"path": str(write(tmp_path / "chats.jsonl", chats)), "format": "openai"},
        {"path": str(write(tmp_path / "texts.jsonl", texts)), "format": "pretrain"},
    ]
    prepared = run(section(*sources, max_length=40, packing=packing, too_long=too_long))
    ledger, data = prepared.ledger, columns(prepared)
    conversations = [Conversation([Message(**m) for m in row["messages"]]) for row in chats]
    conversations += [Conversation([Message("text", row["text"].strip())]) for row in texts]
    whole = Counter((d.input_ids.tobytes(), d.labels.tobytes()) for d in encode_many(conversations, TOKENIZER))
    assert ledger.raw == sum(len(ids) // 4 * count for (ids, _), count in whole.items())
    ledger.check()
    stored = [
        pair
        for ids, labels in zip(data["input_ids"], data["labels"], strict=True)
        for pair in zip(ids, labels, strict=True)
    ]
    assert Counter(all_tokens(prepared)) == Counter(stored)
    assert len(stored) == ledger.raw - ledger.truncated - sum(ledger.dropped.values())
    assert max(prepared.packs.lengths) <= 40
    if packing == "concat":
        assert ledger.truncated == 0
        assert pairs(data) <= whole
    supervised = 0
    for number in range(len(prepared.packs)):
        for _, labels in prepared.documents(number):
            supervised += int((labels[1:] >= 0).sum())
    assert supervised == ledger.trained


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = write_chats(tmp_path / "many.jsonl", 2300)
    one = run(section(chats))
    bytes_of_one = (one.folder / "data.arrow").read_bytes()
    info_of_one = (one.folder / "info.json").read_bytes()
    two = run(section(chats, num_proc=2, cache=False))
    assert not two.from_cache
    assert (two.folder / "data.arrow").read_bytes() == bytes_of_one
    assert (two.folder / "info.json").read_bytes() == info_of_one


def test_bad_records_stop_or_are_counted_and_listed(own_home: Path, tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    write(path, [chat("a", "b"), {"messages": "oops"}])
    with pytest.raises(DataError, match=r"mixed.jsonl:2: messages"):
        run(section(path))
    write(path, [chat("a", "b"), {"messages": "oops"}, chat("c", "d"), {"messages": []}])
    with path.open("a", encoding="utf-8") as stream:
        stream.write("{broken\n")
    with pytest.raises(DataError, match=r"mixed.jsonl:5: JSON"):
        run(section(path))
    prepared = run(section(path, on_error="skip"))
    places = sorted(where for where, _, _ in prepared.bad.items)
    assert {f"{path.name}:2", f"{path.name}:5"} <= {place.rsplit("/")[-1] for place in places}
    ledger = prepared.ledger
    assert ledger.documents == 2
    assert ledger.records == 5
    assert ledger.documents + sum(ledger.dropped_records.values()) == ledger.records
    assert ledger.dropped_records["cannot be read (listed)"] == 1
    assert run(section(path, on_error="skip")).bad.items == prepared.bad.items  # the cache keeps the list


def test_what_does_not_fit_the_template_is_listed_too(own_home: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "s"}, *chat("a", "b")["messages"]]}
    path = write(tmp_path / "rows.jsonl", [chat("a", "b"), row])
    with pytest.raises(DataError, match=r"rows.jsonl:2.*no place for a system text"):
        run(section(path, template="minicpm"))
    prepared = run(section(path, template="minicpm", on_error="skip"))
    assert [(Path(where).name, "no place" in why) for where, _, why in prepared.bad.items] == [("rows.jsonl:2", True)]
    assert prepared.ledger.documents == 1


def test_weights_mix_exactly_and_re_use_the_cache(own_home: Path, tmp_path: Path) -> None:
    one, two = write_chats(tmp_path / "one.jsonl", 6), write_chats(tmp_path / "two.jsonl", 5)

    def weighted(a: float, b: float, seed: int = 42) -> Prepared:
        sources = [{"path": str(p), "format": "openai", "weight": w} for p, w in ((one, a), (two, b))]
        return run(section(*sources), said, seed)

    said: list[str] = []
    prepared = weighted(2.0, 0.4)
    counts = Counter(prepared.rows.tolist())
    assert [counts[row] for row in range(6)] == [2] * 6
    assert sum(counts[row] for row in range(6, 11)) == 2
    again = weighted(1.0, 1.0)
    assert again.from_cache
    assert sorted(again.rows.tolist()) == list(range(11))
    assert any("14 documents an epoch" in line for line in said)
    assert weighted(2.0, 0.4).rows.tolist() == prepared.rows.tolist()
    assert {tuple(weighted(2.0, 0.4, seed).rows) for seed in range(8)} != {tuple(prepared.rows)}


def test_weights_and_cuts_leave_the_ledger_whole(own_home: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "long.jsonl", [chat("q", "答" * 30), chat("r", "b" * 100)])
    for weight in (1.0, 3.0, 0.5):
        source = {"path": str(path), "format": "openai", "weight": weight}
        prepared = run(section(source, packing="concat", max_length=16))
        prepared.ledger.check()
        assert prepared.ledger.trained > 0
        assert prepared.ledger.masked["first token after a cut (nothing predicts it)"] <= 20


def test_limit_draws_by_seed_and_keeps_the_order(chats: Path) -> None:
    def draw(seed: int) -> list[str]:
        source = SourceSection(path=str(chats), limit=5)
        return [record.where for record in source_records(source, "stop", BadRecords(), seed)]

    assert len(draw(1)) == 5
    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(6)}) > 1
    lines = [int(where.rsplit(":", 1)[1]) for where in draw(1)]
    assert lines == sorted(lines)


@pytest.mark.slow
def test_records_are_streamed(own_home: Path, chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than a few chunks are read ahead of what is written, by one process or by several."""
    module = import_module("minituner.data.prepare")  # the name in the package is the function
    taken = 0
    record = next(iter(source_records(SourceSection(path=str(chats)), "stop", BadRecords(), 1)))

    def endless(*_: Any) -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield record

    monkeypatch.setattr(module, "source_records", endless)
    monkeypatch.setattr(module, "CHUNK", 50)
    for num_proc in (1, 2):
        taken, data = 0, section(chats, num_proc=num_proc)
        chunks = _chunks(data.sources[0], data, TOKENIZER, 42, BadRecords(), lambda line: None)
        for _ in range(3):
            assert len(next(chunks).documents) == 50
        chunks.close()
        assert taken <= 50 * (3 + 2 * num_proc + 1)


def test_a_folder_is_read_file_by_file_and_auto_says_why(own_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    write(folder / "b.jsonl", [chat("b", "2")])
    write(folder / "a.jsonl", [chat("a", "1")])
    said: list[str] = []
    prepared = run(section({"path": str(folder), "format": "auto"}), said)
    assert [Path(where).name for where in columns(prepared)["where"]] == ["a.jsonl:1", "b.jsonl:1"]
    assert any("format openai" in line for line in said)
    (folder / "c.jsonl").write_text(json.dumps(chat("c", "3")))
    assert not run(section({"path": str(folder), "format": "auto"})).from_cache


@pytest.mark.parametrize(("policy", "documents"), [("truncate", 2), ("drop", 1), ("split", 2)])
def test_a_long_chat_is_cut_or_dropped_never_split(own_home: Path, tmp_path: Path, policy: str, documents: int) -> None:
    path = write(tmp_path / "rows.jsonl", [chat("q", "长" * 40), chat("a", "b")])
    prepared = run(section(path, max_length=64, too_long=policy))
    assert prepared.ledger.documents == documents
    long = encode_many([Conversation([Message("user", "q"), Message("assistant", "长" * 40)])], TOKENIZER)[0]
    lost = len(long) if policy == "drop" else len(long) - 64
    assert prepared.ledger.truncated + sum(prepared.ledger.dropped.values()) == lost
    assert (prepared.ledger.truncated == 0) == (policy == "drop")


def test_a_long_text_is_split_and_nothing_lost(own_home: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", [{"text": "字" * 50}])
    source = {"path": str(path), "format": "pretrain"}
    prepared = run(section(source, max_length=64, too_long="split"))
    assert columns(prepared)["length"] == [64, 64, 23]
    assert TOKENIZER.decode([i for ids in columns(prepared)["input_ids"] for i in ids]) == "字" * 50 + "<|im_end|>"
    assert prepared.ledger.truncated == 0
    cut = run(section(source, max_length=64, too_long="truncate"))
    assert (cut.ledger.truncated, cut.ledger.documents) == (151 - 64, 1)


def test_the_recipes_system_text_goes_where_there_is_none(own_home: Path, tmp_path: Path) -> None:
    own = {"messages": [{"role": "system", "content": "自己的"}, *chat("a", "b")["messages"]]}
    path = write(tmp_path / "rows.jsonl", [chat("a", "b"), own])
    texts = write(tmp_path / "texts.jsonl", [{"text": "文"}])
    prepared = run(section(path, {"path": str(texts), "format": "pretrain"}, system="默认的"))
    first, second, third = (TOKENIZER.decode(ids) for ids in columns(prepared)["input_ids"])
    assert first.startswith("<|im_start|>system\n默认的<|im_end|>")
    assert second.startswith("<|im_start|>system\n自己的<|im_end|>")
    assert "默认的" not in second
    assert third == "文<|im_end|>"


def test_nothing_to_train_on_is_said(own_home: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [chat("a" * 100, "b")])
    with pytest.raises(DataError, match=r"nothing is left to train on(.|\n)*no trained token left: 1"):
        run(section(path, max_length=8))
