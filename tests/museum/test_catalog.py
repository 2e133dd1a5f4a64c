"""The catalogue has the ten faults, each with code, a tool and public threads; and answers without heavy imports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from minituner.cli import app
from minituner.errors import UsageError
from minituner.museum import FAULTS, find
from minituner.museum.catalog import table
from minituner.museum.exhibit import see_for
from minituner.museum.injection import put_in
from tests.museum.conftest import recipe_for

TEN = {
    "double-bos",
    "pad-as-eos",
    "mask-everything",
    "mask-nothing",
    "packed-leak",
    "shifted-labels",
    "mean-of-means",
    "merge-into-4bit",
    "frozen-warm-up",
    "lost-tail",
}


def test_the_ten_faults_are_there_with_code_and_threads() -> None:
    assert {fault.name for fault in FAULTS} == TEN
    assert len(FAULTS) == len(TEN)
    for fault in FAULTS:
        assert callable(put_in(fault))
        assert callable(see_for(fault))
        assert fault.threads
        assert all(re.fullmatch(r"[\w-]+/[\w-]+#\d+", thread) for thread in fault.threads)
        assert fault.lesson in {"03", "04", "05", "07", "09"}
        assert all(len(line) <= 120 for line in fault.story())


@pytest.mark.parametrize("spelling", ["Pad_as_EOS", "pad as eos", "pad-as-eos"])
def test_names_may_be_spelled_as_people_do(spelling: str) -> None:
    assert find(spelling).name == "pad-as-eos"


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'packed-leak'"):
        find("packt-leak")
    with pytest.raises(UsageError, match=r"one of double-bos.*lost-tail"):
        find("xyz")


def test_the_table_names_every_fault_its_tool_and_thread() -> None:
    text = "\n".join(table())
    for fault in FAULTS:
        assert fault.name in text
        assert fault.threads[0] in text
        assert fault.tool.partition(":")[0] in text


def test_the_command_lists_and_tells(capsys: pytest.CaptureFixture[str]) -> None:
    app(["museum"], standalone_mode=False)
    output = capsys.readouterr().out
    assert all(name in output for name in TEN)
    app(["museum", "lost_tail"], standalone_mode=False)
    assert "https://github.com/huggingface/transformers/issues/17908" in capsys.readouterr().out
    with pytest.raises(UsageError, match="did you mean 'lost-tail'"):
        app(["museum", "lost-tial"], standalone_mode=False)


def test_the_command_asks_the_tool(
    tmp_path: Path, model_folder: Path, fault_data: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_for("lost-tail", model_folder, fault_data).dump(tmp_path / "r.yaml")
    app(["museum", "lost-tail", str(tmp_path / "r.yaml"), "data.max_length=100"], standalone_mode=False)
    output = capsys.readouterr().out
    assert "-> passes" in output
    assert "-> DOES NOT PASS" in output


def test_the_list_needs_nothing_heavy() -> None:
    code = (
        "import sys; from minituner.museum import FAULTS; from minituner.museum.catalog import table; table();"
        "print(sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
