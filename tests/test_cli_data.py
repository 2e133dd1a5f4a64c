"""The data commands: what they print, where, and with which exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minituner.cli import main
from minituner.data import load_tokenized, prepare
from minituner.data.formats import FORMATS
from tests.tiny import tiny_recipe, tiny_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: (exit status, standard output, standard error)."""

    def run_(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minituner", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run_


@pytest.fixture
def recipe(chats: Path, model_folder: Path, own_home: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    tiny_recipe(model_folder, chats).dump(path)
    return path


def test_inspect_a_recipe(run: Run, recipe: Path) -> None:
    status, out, err = run("inspect", recipe, "--n", 2)
    assert status == 0, err
    assert out.count("  trained | ") == 3, "record 1 has two answers, record 2 one"
    assert "these numbers are about 12 records: all there are" in out
    assert "packing best_fit" in out
    assert "再说一遍" in out


def test_inspect_a_file_with_overrides_before_and_after(run: Run, chats: Path, model_folder: Path) -> None:
    status, out, _ = run(
        "inspect", chats, "data.max_length=99", "--model", model_folder, "--template", "qwen_chat", "--ids"
    )
    assert status == 0
    assert "template qwen_chat" in out
    assert "at most 99 tokens" in out
    assert "<|im_end|>(258)" in out


def test_inspect_json_is_json(run: Run, recipe: Path) -> None:
    status, out, _ = run("inspect", recipe, "--json", "--n", 1, "--records", 4)
    facts = json.loads(out)
    assert status == 0
    assert facts["records_read"] == 4
    assert facts["reading_ended"] == "the first 4 of each source"
    assert len(facts["samples"]) == 1


def test_inspect_html(run: Run, recipe: Path, tmp_path: Path) -> None:
    status, _, err = run("inspect", recipe, "--html", tmp_path / "look.html")
    assert status == 0
    assert f"written: {tmp_path / 'look.html'}" in err
    text = re.sub("<[^>]*>", "", (tmp_path / "look.html").read_text(encoding="utf-8"))
    assert "再说一遍" in text


def test_wrong_use_is_a_message_and_2(run: Run, recipe: Path, tmp_path: Path) -> None:
    for arguments, words in [
        (["inspect", tmp_path / "gone.jsonl"], "no such file"),
        (["inspect", recipe, "--template", "qwen_chatt"], "qwen_chat"),
        (["inspect", recipe, "data.max_lenght=3"], "did you mean 'max_length'?"),
        (["check", "no_such_recipe"], "no_such_recipe"),
        (["data-order", tmp_path / "nowhere"], "no such folder"),
        (["log-dataset", recipe, "--show", "nothing"], "masked_text"),
    ]:
        status, out, err = run(*arguments)
        assert status == 2, arguments
        assert words in err
        assert "Traceback" not in err + out


def test_check_says_everything_and_exits_2_when_training_would_refuse(run: Run, recipe: Path, chats: Path) -> None:
    status, out, _ = run("check", recipe)
    assert status == 0
    assert out.rstrip().endswith("training would accept this data")
    with chats.open("a", encoding="utf-8") as stream:
        stream.write('{"messages": [{"role": "user", "content": "\\u202e{{name}}"}]}\n{oops\n')
    status, out, _ = run("check", recipe)
    assert status == 2
    assert f"{chats}:14: JSON:" in out
    assert "training would refuse: " in out
    assert "\u202e" not in out
    status, out, _ = run("check", recipe, "--json")
    assert status == 2
    assert json.loads(out)["exit_code"] == 2
    status, _, _ = run("check", recipe, "data.on_error=skip")
    assert status == 0


def test_list_formats_has_every_format(run: Run) -> None:
    status, out, _ = run("list-formats")
    assert status == 0
    for name, entry in FORMATS.items():
        assert f"\n{name} " in f"\n{out}"
        assert json.dumps(entry.example, ensure_ascii=False) in out
    assert run("list-dataset-format")[1] == out


def test_list_templates_marks_what_is_trained(run: Run) -> None:
    from minituner.catalog.lookup import load

    status, out, _ = run("list-templates")
    assert status == 0
    lines = out.splitlines()
    for key, entry in load("templates").items():
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{key} "))
        assert entry["for"] in lines[place]
        trained = lines[place + 1].split("«")[1].split("»")[0]
        assert trained.startswith("Hello!")
        assert trained != "Hello!", f"{key} trains no stop token"
    assert "Qwen" in out
    assert lines[0].startswith("native ")


def test_tokenize_writes_what_training_sees(
    run: Run, recipe: Path, tmp_path: Path, chats: Path, model_folder: Path
) -> None:
    status, out, err = run("tokenize", recipe, "--out", tmp_path / "bins")
    assert status == 0, err
    assert out.strip() == str(tmp_path / "bins" / "tokens.bin")
    prepared = prepare(tiny_recipe(model_folder, chats).data, tiny_tokenizer(), say=lambda line: None)
    data = load_tokenized(tmp_path / "bins")
    assert len(data) == len(prepared.rows)
    for number, row in enumerate(prepared.rows.tolist()):
        for column in ("input_ids", "labels"):
            assert np.array_equal(data[number][column], prepared.dataset[row][column])


def test_data_order(run: Run, recipe: Path, tmp_path: Path) -> None:
    for name in ("b", "a/c"):
        assert run("tokenize", recipe, "--out", tmp_path / "bins" / f"{name}.bin")[0] == 0
    assert run("data-order", tmp_path / "bins")[1].split() == ["b.bin", "a/c.bin"]
    status, out, _ = run("data-order", tmp_path / "bins", "--out", tmp_path / "order.txt")
    assert status == 0
    assert out.strip() == str(tmp_path / "order.txt")
    assert (tmp_path / "order.txt").read_text() == "b.bin\na/c.bin\n"


def test_old_names_work_and_are_hidden(run: Run, recipe: Path) -> None:
    status, out, _ = run("log-dataset", recipe, "--show", "all")
    assert status == 0
    assert "<|im_end|>(258)" in out
    assert run("check-custom-dataset", recipe)[0] == 0
    shown = run("--help")[1]
    assert "inspect" in shown
    assert "data-order" in shown
    assert "log-dataset" not in shown


def test_inspect_does_not_import_torch(chats: Path, model_folder: Path) -> None:
    """Importing torch takes two of the three seconds that the first sample of a large file may take."""
    code = (
        "import sys; from minituner.data.look import look; "
        f"look({str(chats)!r}, model={str(model_folder)!r}, say=lambda line: None); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
