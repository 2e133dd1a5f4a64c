"""The command line: quick help, exit codes, and messages that name the thing and the fix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minituner import Recipe
from tests.tiny import tiny_recipe
from tests.train.processes import run_command

QUICKSTART = "smollm2_135m_instruct_lora_personal_assistant_e3"

# In one fresh interpreter: the help of every command, then what had to be imported for it.
EVERY_HELP = """
import sys, typer
from minituner.cli import app, main
def walk(command, path):
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, [*path, name])
paths = list(walk(typer.main.get_command(app), []))
for path in paths:
    sys.argv = ["minituner", *path, "--help"]
    try:
        main()
    except SystemExit as stop:
        assert stop.code in (0, None), (path, stop.code)
heavy = {"torch", "transformers", "peft", "datasets", "pandas", "matplotlib", "numpy"} & set(sys.modules)
print("COMMANDS", *[" ".join(path) for path in paths], sep="|")
print("HEAVY", sorted(heavy))
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_every_command_has_help_and_none_imports_anything_heavy() -> None:
    done = python(EVERY_HELP)
    assert done.returncode == 0, done.stderr
    commands = next(line for line in done.stdout.splitlines() if line.startswith("COMMANDS")).split("|")[1:]
    assert {
        "",
        "quickstart",
        "train",
        "chat",
        "list-cfg",
        "list-models",
        "copy-cfg",
        "import-cfg",
        "convert",
        "convert merge",
    } <= set(commands)
    assert "HEAVY []" in done.stdout


def test_listing_recipes_and_the_version_are_quick_too() -> None:
    code = "import sys\nfrom minituner.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    done = python(code, "--version")
    assert done.stdout.splitlines() == ["0.1.0", "False"]
    done = python(code, "list-cfg", "-p", "smollm2_135m_instruct_lora_personal")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-2:] == [QUICKSTART, "False"]


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minituner", "list-cfg", "-p", "zzz"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no recipe's name contains 'zzz'" in done.stderr
    assert done.stdout == ""


@pytest.fixture
def place(model_folder: Path, chats: Path, tmp_path: Path) -> Path:
    """A folder with r.yaml, a recipe that works."""
    tiny_recipe(model_folder, chats, train={"max_steps": 1}).dump(tmp_path / "r.yaml")
    return tmp_path


WRONG: dict[str, tuple[list[str], list[str]]] = {
    "no such file": (["train", "no.yaml"], ["no such recipe file: no.yaml", "minituner list-cfg"]),
    "unknown recipe": (
        ["train", "smollm2_135m_instruct_lora_personal_asistant_e3"],
        ["no recipe named", QUICKSTART],
    ),
    "unknown key": (
        ["train", "r.yaml", "train.learning_rte=1"],
        ["train.learning_rte", "did you mean 'learning_rate'?"],
    ),
    "several problems": (
        ["train", "r.yaml", "method.lora_rank=0", "data.packing=best", "save.keep_lst=3"],
        ["3 problems", "method.lora_rank = 0", "data.packing = 'best'", "save.keep_lst", "'keep_last'"],
    ),
    "bad override": (["train", "r.yaml", "learning_rate"], ["'learning_rate' is not an override", "key.path=value"]),
    "missing data": (
        ["train", "r.yaml", "data.sources.0.path=chatz.jsonl"],
        ["chatz.jsonl: no such file", "did you mean 'chats.jsonl'?"],
    ),
    "unknown format": (["train", "r.yaml", "data.sources.0.format=opnai"], ["opnai", "openai"]),
    "unknown template": (["train", "r.yaml", "data.template=qwen_chatt"], ["qwen_chatt", "qwen_chat"]),
    "zero": (["train", "r.yaml", "distributed.zero=zero22"], ["distributed.zero", "zero2"]),
    "a folder for a recipe": (["train", "."], ["is a folder, not a recipe"]),
    "nothing given": (["train"], ["Missing argument"]),
    "unknown option": (["train", "r.yaml", "--work-dri", "x"], ["--work-dri", "--work-dir"]),
    "unknown command": (["trian"], ["trian"]),
    "a file where the run should go": (["train", "r.yaml", "--work-dir", "r.yaml/w"], ["cannot write into --work-dir"]),
    "copy over a file": (["copy-cfg", "r.yaml", "."], ["tiny_copy.yaml exists", "--force"]),
    "copy into a file": (["copy-cfg", QUICKSTART, "r.yaml/x"], ["cannot write"]),
    "wrong number": (["chat", "m", "--max-new-tokens", "0"], ["max_new_tokens", "1 or more"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG.keys())
def test_wrong_usage_is_exit_2_and_says_what_and_the_fix(arguments: list[str], said: list[str], place: Path) -> None:
    (place / "tiny_copy.yaml").touch()
    status, output = run_command(arguments, place)
    assert status == 2, output
    for text in said:
        assert text in output
    assert "Traceback" not in output
    assert not (place / "work_dirs").exists() or not list(place.glob("work_dirs/*/checkpoints"))


DATA: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["chats.jsonl"]),
    "blank lines": ("\n\n", ["chats.jsonl"]),
    "no assistant message": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        '{"messages": [{"role": "user", "content": "你好"}]}\n',
        ["chats.jsonl:2", "assistant"],
    ),
    "not JSON": ('{"messages": [\n', ["chats.jsonl:1"]),
    "no messages": ('{"text": 1}\n', ["chats.jsonl:1", "messages"]),
    "an unknown role": ('{"messages": [{"role": "usr", "content": "a"}]}\n', ["chats.jsonl:1", "usr"]),
    "content of another type": (
        '{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]}\n',
        ["chats.jsonl:1", "content"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("content", "said"), DATA.values(), ids=DATA.keys())
def test_data_that_cannot_be_used_is_exit_2_and_says_where(content: str, said: list[str], place: Path) -> None:
    (place / "chats.jsonl").write_text(content, encoding="utf-8")
    for command in (["train", "r.yaml", "--work-dir", "w"], ["train", "r.yaml", "--dry-run"]):
        status, output = run_command(command, place)
        assert status == 2, output
        for text in said:
            assert text in output
        assert "Traceback" not in output
    assert not (place / "w" / "checkpoints").exists()


@pytest.mark.slow
def test_bad_records_can_be_skipped_and_are_listed(place: Path) -> None:
    with (place / "chats.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"messages": [{"role": "user", "content": "你好"}]}\n')
    status, output = run_command(["train", "r.yaml", "--work-dir", "w", "data.on_error=skip"], place)
    assert status == 0, output
    assert "1 records" in output
    listed = next(place.glob("w/runs/*/bad_records.txt")).read_text(encoding="utf-8")
    assert "chats.jsonl:13" in listed


@pytest.mark.slow
def test_broken_models_are_exit_1_with_a_message(place: Path) -> None:
    broken = place / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama"}')
    for folder in ("broken", "./nowhere"):
        status, output = run_command(["train", "r.yaml", "--work-dir", "w", f"model.name_or_path={folder}"], place)
        assert status == 1, output
        assert Path(folder).name in output
        assert "Traceback" not in output
    status, output = run_command(["chat", "./nowhere", "--prompt", "Hi"], place)
    assert status == 1
    assert "there is no folder" in output


@pytest.mark.slow
def test_a_disk_error_anywhere_is_a_message_with_the_place(place: Path) -> None:
    (place / "home").mkdir()
    (place / "home" / "prepared").write_text("a file where the cache should be")
    status, output = run_command(["train", "r.yaml", "--work-dir", "w"], place)
    assert status == 1, output
    assert "home/prepared" in output
    assert "fix:" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_debug_shows_the_traceback_wherever_it_stands(place: Path) -> None:
    for arguments in (["--debug", "train", "no.yaml"], ["train", "no.yaml", "--debug"]):
        status, output = run_command(arguments, place)
        assert status == 2, "the exit status is the same"
        assert "Traceback" in output
        assert "no such recipe file" in output


@pytest.mark.slow
def test_a_dry_run_prints_recipe_ledger_and_steps_and_trains_nothing(place: Path) -> None:
    status, output = run_command(["train", "r.yaml", "--dry-run", "train.max_steps=7"], place)
    assert status == 0, output
    assert "lora_rank: 4" in output
    assert "tokens  100.0%  raw" in output
    assert "7 optimizer steps in all; nothing was trained" in output
    assert not (place / "work_dirs").exists()


@pytest.mark.slow
def test_a_copied_recipe_is_explained_loads_and_trains(place: Path) -> None:
    status, output = run_command(["copy-cfg", "r.yaml", "out", "train.max_steps=2", "name=mine"], place)
    assert status == 0, output
    copied = place / "out" / "mine_copy.yaml"
    assert output.strip() == "out/mine_copy.yaml"
    assert "# Peak learning rate." in copied.read_text(encoding="utf-8")
    assert Recipe.load(copied).train.max_steps == 2
    status, output = run_command(["train", str(copied)], place)
    assert status == 0, output
    assert (place / "work_dirs" / "mine" / "hf" / "adapter_config.json").is_file()
    lines = next(place.glob("work_dirs/mine/runs/*/metrics.jsonl")).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
