"""The cache of prepared data: found when nothing changed, never when anything did, and never half."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from minituner.data.prepare import prepare
from minituner.data.prepared_cache import fingerprint, publish
from tests.data.test_prepare import TOKENIZER, all_tokens, columns, run, section
from tests.tiny import tiny_tokenizer
from tests.train.processes import CONTEXT


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


@pytest.mark.slow
def test_two_at_once_are_both_right(own_home: Path, chats: Path) -> None:
    queue = CONTEXT.Queue()
    both = [CONTEXT.Process(target=_prepare_in_a_process, args=(str(chats), str(own_home), queue)) for _ in range(2)]
    for process in both:
        process.start()
    results = [queue.get(timeout=120) for _ in both]
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert results[0] == results[1]
    assert [path.name for path in (own_home / "prepared").iterdir()] == [fingerprint(section(chats), TOKENIZER, 42)]
