"""Prepare: nothing is lost between the file and the packs, the cache is honest, and memory does not grow."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minituner.data import prepare as prepare_function
from minituner.data import prepared_cache
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import encode_many
from minituner.data.prepare import Prepared, _chunks, prepare, source_records
from minituner.data.prepared_cache import fingerprint, publish
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


def test_the_cache_is_found_and_gives_the_same(own_home: Path, chats: Path) -> None:
    said: list[str] = []
    first = run(section(chats), said)
    assert not first.from_cache
    second = run(section(chats), said)
    assert second.from_cache
    assert "prepared data: found in the cache" in said[-1]
    assert columns(first) == columns(second)
    assert first.ledger == second.ledger
    assert all_tokens(first) == all_tokens(second)
    assert not run(section(chats, cache=False)).from_cache
    assert columns(run(section(chats))) == columns(first)


CHANGES = [
    {"max_length": 64},
    {"system": "你是"},
    {"template": "qwen_chat"},
    {"loss_on": "all"},
    {"too_long": "drop"},
    {"on_error": "skip"},
    {"bos_policy": "xtuner"},
    {"allow_control_tokens": True},
    {"packing": "concat"},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_any_setting_that_touches_a_token_has_another_name(chats: Path, change: dict[str, Any]) -> None:
    assert fingerprint(section(chats), TOKENIZER, 42) != fingerprint(section(chats, **change), TOKENIZER, 42)


def test_any_byte_and_any_tokenizer_has_another_name(chats: Path) -> None:
    before = fingerprint(section(chats), TOKENIZER, 42)
    same = [section(chats, num_proc=2), section(chats, shuffle=False), section(chats, cache=False)]
    same.append(section({"path": str(chats), "format": "openai", "weight": 2.0}))
    assert {fingerprint(data, TOKENIZER, seed) for data in same for seed in (1, 2)} == {before}
    limited = section({"path": str(chats), "format": "openai", "limit": 3})
    assert fingerprint(limited, TOKENIZER, 1) != fingerprint(limited, TOKENIZER, 2)
    other = tiny_tokenizer("{{ messages[0].content }}")
    assert fingerprint(section(chats), other, 42) != before
    raw = bytearray(chats.read_bytes())
    raw[raw.index(b"What")] ^= 0x20
    chats.write_bytes(raw)
    assert fingerprint(section(chats), TOKENIZER, 42) != before


def test_a_tokenizers_last_call_does_not_change_the_name(chats: Path) -> None:
    used = tiny_tokenizer()
    used(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert fingerprint(section(chats), used, 42) == fingerprint(section(chats), tiny_tokenizer(), 42)


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
    assert [(where, "no place" in why) for where, _, why in prepared.bad.items] == [
        (f"{path}:2", True)
    ] or prepared.bad.count == 1
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


def test_a_broken_off_write_leaves_nothing_that_looks_whole(
    own_home: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("minituner.data.prepare")  # the name in the package is the function

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", full_disk)
        with pytest.raises(OSError, match="No space"):
            run(section(chats))
    assert list((own_home / "prepared").iterdir()) == []
    assert not run(section(chats)).from_cache


def test_what_a_killed_process_left_is_not_taken(own_home: Path, chats: Path) -> None:
    key = fingerprint(section(chats), TOKENIZER, 42)
    aside = own_home / "prepared" / f".{key}-killed"
    aside.mkdir(parents=True)
    (aside / "data.arrow").write_bytes(b"half")
    half = own_home / "prepared" / key
    half.mkdir()
    (half / "data.arrow").write_bytes(b"half")  # not even a folder of that name without info.json
    prepared = run(section(chats))
    assert not prepared.from_cache
    assert prepared.ledger.documents == 12


def test_publish_keeps_what_is_whole_and_replaces_what_is_not(tmp_path: Path) -> None:
    def made(name: str, text: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "info.json").write_text(text)
        return folder

    publish(made("aside1", "1"), tmp_path / "key", keep=True)
    publish(made("aside2", "2"), tmp_path / "key", keep=True)
    assert (tmp_path / "key" / "info.json").read_text() == "1"
    publish(made("aside3", "3"), tmp_path / "key", keep=False)
    assert (tmp_path / "key" / "info.json").read_text() == "3"
    (tmp_path / "key" / "info.json").unlink()
    publish(made("aside4", "4"), tmp_path / "key", keep=True)
    assert (tmp_path / "key" / "info.json").read_text() == "4"
    assert {path.name for path in tmp_path.iterdir()} == {"aside2", "key"}
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "aside3", tmp_path / "new", keep=True)


def _prepare_in_a_process(path: str, home: str, queue: Any) -> None:
    os.environ["MINITUNER_HOME"] = home
    prepared = prepare(section(Path(path)), tiny_tokenizer(), say=lambda line: None)
    queue.put((prepared.ledger.trained, all_tokens(prepared)[:50]))


def test_two_at_once_are_both_right(own_home: Path, chats: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    both = [context.Process(target=_prepare_in_a_process, args=(str(chats), str(own_home), queue)) for _ in range(2)]
    for process in both:
        process.start()
    results = [queue.get(timeout=120) for _ in both]
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert results[0] == results[1]
    assert [path.name for path in (own_home / "prepared").iterdir()] == [fingerprint(section(chats), TOKENIZER, 42)]


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
    whole = 3 * 40 + len("<|im_start|>") * 0
    cut = prepared.ledger.truncated + sum(prepared.ledger.dropped.values())
    assert cut >= whole - 64
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


def test_the_names_that_notebooks_rely_on() -> None:
    assert prepare_function is not None
    assert prepared_cache.VERSION >= 1
