"""An exported folder in other programs: what each reads is told; plain transformers and its server say the same."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from minituner.chat.session import open_session
from minituner.data.encoding import stop_rule
from minituner.export.merge import merge
from minituner.export.serving import PROGRAMS, serving_problems, what_servers_read
from minituner.export.split import split
from tests.export.test_merge import adapter_on, silent
from tests.export.test_parity import full_folder
from tests.tiny import tiny_folder, tiny_tokenizer
from tests.train.processes import Process, run_command

SERVING = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if importlib.util.find_spec(name) is None]
PATIENCE = 120.0


def reading(folder: Path, program: str, item: str) -> Any:
    (found,) = [r for r in what_servers_read(folder) if (r.program, r.item) == (program, item)]
    return found


def test_every_program_finds_its_five_things(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    merged = merge(adapter_on(base, tmp_path / "hf"), tmp_path / "merged", say=silent)
    readings = what_servers_read(merged)
    items = ["architecture", "weights", "tokenizer", "chat template", "stop ids"]
    assert [(r.program, r.item) for r in readings] == [(program, item) for program in PROGRAMS for item in items]
    assert not [r for r in readings if r.problem]
    assert reading(merged, "LMDeploy", "architecture").found == "LlamaForCausalLM (listed)"
    assert {reading(merged, program, "stop ids").found for program in PROGRAMS} == {"258"}
    assert "float32" in reading(merged, "vLLM", "weights").note
    halved = split(merged, tmp_path / "bf16", dtype="bf16", say=silent)
    assert reading(halved, "vLLM", "weights").note is None


def test_a_model_that_a_server_does_not_list_is_noted_and_not_refused(tmp_path: Path) -> None:
    folder = full_folder(tiny_folder(tmp_path / "base"), tmp_path / "full")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["OlmoForCausalLM"]}))
    assert serving_problems(folder) == []
    assert "no class of its own" in reading(folder, "LMDeploy", "architecture").note
    assert reading(folder, "vLLM", "architecture").note is None


def test_what_ends_an_answer_differs_between_programs(tmp_path: Path) -> None:
    """With the trained stop id only in the tokenizer, vLLM and LMDeploy stop, and transformers does not."""
    folder = full_folder(tiny_folder(tmp_path / "base"), tmp_path / "full")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 7}))
    wrong = {program: bool(reading(folder, program, "stop ids").problem) for program in PROGRAMS}
    assert wrong == {"transformers": True, "transformers serve": True, "vLLM": False, "LMDeploy": False}
    assert reading(folder, "vLLM", "stop ids").found == "7, 258"
    assert len(serving_problems(folder)) == 1


def test_stop_texts_of_the_training_are_passed_on(tmp_path: Path) -> None:
    folder = full_folder(tiny_folder(tmp_path / "base"), tmp_path / "full", "default")
    texts = stop_rule(tiny_tokenizer(), "default")[1]
    note = reading(folder, "vLLM", "stop ids").note
    assert (note is None) == (not texts)
    assert all(text in note for text in texts)


@pytest.mark.slow
def test_the_command_shows_the_table_and_fails_on_a_problem(tmp_path: Path) -> None:
    folder = full_folder(tiny_folder(tmp_path / "base"), tmp_path / "full")
    status, output = run_command(["convert", "check", "full"], tmp_path)
    assert status == 0, output
    assert all(program in output for program in PROGRAMS)
    assert "PROBLEM" not in output
    (folder / "generation_config.json").unlink()
    status, output = run_command(["convert", "check", "full"], tmp_path)
    assert status == 1
    assert output.count("PROBLEM: there is no generation_config.json") == len(PROGRAMS)
    status, output = run_command(["convert", "check", "full", "--json"], tmp_path)
    assert status == 1
    assert {row["program"] for row in json.loads(output) if row["problem"]} == set(PROGRAMS)
    status, output = run_command(["convert", "check", "nowhere"], tmp_path)
    assert status == 1
    assert "no readable config.json" in output


def asked_alone(folder: str, message: str, out: str) -> None:
    """Plain transformers, nothing of this package: the documented way to ask a chat model, greedy."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    messages = json.loads(message)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    Path(out).write_text(json.dumps(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["merged", "split", "bf16"])
def test_plain_transformers_in_a_fresh_process_says_the_same(way: str, tmp_path: Path) -> None:
    """Greedy tokens of the exported folder there == those of the adapter in this package's chat here."""
    base = tiny_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "hf")
    folder = merge(adapter, tmp_path / "merged", say=silent)
    asked = adapter
    if way == "split":
        folder = split(folder, tmp_path / "split", max_shard_size="20KB", say=silent)
    elif way == "bf16":  # rounding may change a token, so the folder is compared with itself
        asked = folder = split(folder, tmp_path / "bf16", dtype="bf16", say=silent)
    session = open_session(asked, say=silent, dtype="bfloat16" if way == "bf16" else "float32", max_new_tokens=24)
    wanted = session.ask("你好, who are you?")
    messages = [{"role": m.role, "content": m.text} for m in session.messages[:1]]
    messages = [{"role": "system", "content": session.system}, *messages]
    found = tmp_path / "tokens.json"
    process = Process(asked_alone, str(folder), json.dumps(messages), str(found), cwd=tmp_path)
    assert process.finish() == 0, process.output
    tokens = json.loads(found.read_text())
    assert len(tokens) == 24 or tokens[-1] == 258
    assert session.tokenizer.decode(tokens, skip_special_tokens=True).strip() == wanted


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
@pytest.mark.skipif(bool(SERVING), reason=f"transformers serve needs {', '.join(SERVING)} (not installed)")
def test_transformers_serve_answers_like_chat(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "hf")
    folder = merge(adapter, tmp_path / "merged", say=silent)
    session = open_session(adapter, say=silent, dtype="float32", max_new_tokens=12)
    wanted = session.ask("你好")
    port = free_port()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path / "home")}
    program = shutil.which("transformers", path=str(Path(sys.executable).parent))
    assert program
    command = [program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log.txt").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                ask(port, "/health")
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, (tmp_path / "log.txt").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
                time.sleep(0.2)
        messages = [{"role": "system", "content": session.system}, {"role": "user", "content": "你好"}]
        body = {"model": str(folder), "messages": messages, "max_tokens": 12, "temperature": 0}
        answer = ask(port, "/v1/chat/completions", body)
        assert answer["choices"][0]["message"]["content"].strip() == wanted
    finally:
        server.terminate()
        server.wait(timeout=PATIENCE)
