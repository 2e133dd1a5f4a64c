"""A class is graded by running answers again: stored outputs count for nothing, hostile notebooks pass nothing.

Every hostile answer below tries to be graded "passed" for 3.1, to harm, or to break the report for the others.
"""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minituner.camp import sandbox
from minituner.camp.book import solution, stub
from minituner.camp.compare import Wrong
from minituner.camp.core import find
from minituner.camp.report import handed_in, regrade, report
from minituner.camp.report_files import page, printable, table, write
from minituner.camp.sandbox import Sandbox, walls
from minituner.camp.slicing import program_of
from minituner.camp.worker import decode, encode
from minituner.cli import app
from minituner.errors import UsageError

RIGHT = solution("3.1")
SETUP = "import numpy as np\nfrom minituner.camp import check"


def cell(source: str, said: str = "") -> dict[str, Any]:
    output = {"output_type": "stream", "name": "stdout", "text": [said]}
    return {"cell_type": "code", "source": source, "outputs": [output] if said else [], "metadata": {}}


def notebook(path: Path, *cells: dict[str, Any] | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [entry if isinstance(entry, dict) else cell(entry) for entry in cells]
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")


def outcome_of(body: str, *, seconds: float = 60.0, before: str = "", key: str = "3.1") -> tuple[str, str]:
    """State and text of an answer to 3.1 with this body."""
    name = find(key).name
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    source = f"# EXERCISE {key} (5 min)\n{before}\ndef {name}(*case):\n{lines}\n"
    outcome = regrade(key, find(key), [SETUP, source], "a seed", seconds)
    assert outcome is not None
    return outcome.state, outcome.text


@pytest.mark.parametrize("key", ["3.1", "3.3", "2.4", "6.1", "6.5", "5.3"])
def test_solutions_pass_behind_walls(key: str) -> None:
    outcome = regrade(key, find(key), [SETUP, solution(key)], "a seed", 240.0)
    assert outcome, outcome


FORGED = json.dumps({"value": [-100, -100, -100, 81, 82, 2, -100, -100, -100, 83, 2]})
HOSTILE: dict[str, tuple[str, str]] = {
    "leaves at once": ("import os\nos._exit(0)", "without"),
    "leaves politely": ("raise SystemExit(0)", "SystemExit"),
    "prints a pass": ("print('3.1 passed: the shown case and 8 hidden ones')", "gives None"),
    "returns a pass": ("return '3.1 passed'", "a list is wanted"),
    "writes replies to every pipe": (
        f"import os\nfor number in range(20):\n    try:\n        os.write(number, b'''{FORGED}\\n''')\n"
        "    except OSError:\n        pass\nreturn [0]",
        "",
    ),
    "asks the answer key": (
        "from minituner.camp.lesson_03 import EXERCISES\nreturn EXERCISES['1'].right(*case)",
        "without minituner",
    ),
    "reads the answer key": (
        f"return open({str(sandbox.PACKAGE / 'camp' / 'lesson_03.py')!r}).read()",
        "without files",
    ),
    "looks into the grader": ("import os\nreturn open(f'/proc/{os.getppid()}/environ').read()", "without files"),
    "climbs into the guard": (
        "import builtins, sys\nbuiltins.isinstance = lambda *a: True\nframe = sys._getframe()\n"
        "while frame:\n    frame.f_globals['DENIED'] = ()\n    frame = frame.f_back\n"
        "import subprocess\nsubprocess.run(['true'])",
        "without",
    ),
    "opens a socket": ("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)", "without socket"),
    "starts a program": ("import os\nos.system('true')", "without os.system"),
    "calls C": ("import ctypes\nctypes.CDLL(None)", "without ctypes"),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)", "without os.kill"),
    "eats memory": ("return bytearray(1 << 40)", "MemoryError"),
    "floods": ("return ['x' * 1000] * 10_000", "more than"),
    "nests": ("x = []\nfor _ in range(10**5):\n    x = [x]\nreturn x", "nested"),
    "recurses": ("return labels_of(*case)", "Recursion"),
    "raises what cannot be said": (
        "class Odd(Exception):\n    def __str__(self):\n        raise RuntimeError\nraise Odd",
        "ended without an answer|RuntimeError",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_do_not_pass(name: str) -> None:
    body, words = HOSTILE[name]
    state, text = outcome_of(body)
    assert state == "not yet", text
    assert any(choice in text for choice in words.split("|")), text


@pytest.mark.slow
def test_an_endless_loop_is_cut() -> None:
    state, text = outcome_of("while True:\n    try:\n        pass\n    except BaseException:\n        pass", seconds=5)
    assert state == "not yet"
    assert "did not end within 5 seconds" in text


@pytest.mark.slow
def test_an_endless_loop_while_it_is_loaded_is_cut() -> None:
    state, text = outcome_of("return 1", before="EVIL = [0 for _ in iter(int, 1)]\nUSED = EVIL\n", seconds=5)
    assert state == "not yet"  # not named by the answer: never run
    state, text = outcome_of("return EVIL", before="EVIL = [0 for _ in iter(int, 1)]\n", seconds=5)
    assert "did not end within 5 seconds" in text or "computing time" in text or "MemoryError" in text


def test_no_file_is_written(tmp_path: Path) -> None:
    for target in (tmp_path / "outside", Path("inside")):
        _, text = outcome_of(f"open({str(target)!r}, 'w').write('x')")
        assert "without files" in text
    assert not any(tmp_path.iterdir())
    assert not Path("inside").exists()


def alive(group: int) -> list[str]:
    """The processes of a group that have not ended; those that nobody has waited for yet do not count."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = file.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended just now
            continue
        if int(pgrp) == group and state not in "ZX":
            found.append(file.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_no_process_is_left_behind() -> None:
    with Sandbox("def f():\n    return 1\n", "f", seconds=60) as answer:
        assert answer() == 1
        process = answer._process
        assert alive(process.pid)
    assert process.poll() is not None
    deadline = time.monotonic() + 60
    while alive(process.pid) and time.monotonic() < deadline:
        pass
    assert not alive(process.pid)


def test_without_namespaces_the_guard_alone_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "namespaces", lambda: ())
    assert "not permitted here" in walls()
    for name in ("opens a socket", "reads the answer key", "asks the answer key", "starts a program", "leaves at once"):
        body, words = HOSTILE[name]
        state, text = outcome_of(body)
        assert state == "not yet"
        assert words in text
    assert regrade("3.1", find("3.1"), [SETUP, RIGHT], "seed", 60.0)


def test_a_class_is_graded_whatever_its_outputs_claim(tmp_path: Path) -> None:
    room = tmp_path / "class"
    lie = "3.1 passed: the shown case and 8 hidden ones"
    notebook(room / "ada" / "03_bos.ipynb", SETUP, RIGHT, solution("3.2"), stub("3.3"))
    notebook(room / "<b>ben" / "03_x.ipynb", SETUP, cell(stub("3.1"), lie), cell(RIGHT.replace("-100]", "-1]"), lie))
    notebook(room / "=mei_03.ipynb", SETUP, "# EXERCISE 3.1 (5 min)\ndef labels_of(turns:\n", stub("3.2"))
    (room / "omar_03.ipynb").write_text("[" * 100_000, encoding="utf-8")
    (room / "lin_03.ipynb").symlink_to(room / "ada" / "03_bos.ipynb")
    (room / "notes.txt").write_text("no notebook", encoding="utf-8")
    found = report(room, seed="s", seconds=60)
    states = {(grade.student, grade.key): grade.state for grade in found.grades}
    assert [states["ada", f"3.{n}"] for n in range(1, 6)] == ["passed", "passed", "not started", "missing", "missing"]
    assert (
        states["<b>ben", "3.1"] == states["=mei", "3.1"] == states["omar", "3.1"] == states["lin", "3.1"] == "not yet"
    )
    assert "not Python in line" in found.of("=mei", "3.1").text
    assert "link" in found.of("lin", "3.1").text
    assert found.passed("ada") == 2
    shown = table(found)
    assert "2 of 5" in shown
    assert "seed s" in shown
    as_csv, as_page = write(found, tmp_path / "out")
    rows = list(csv.reader(as_csv.open(encoding="utf-8-sig")))
    assert ["ada", "3.1", "passed"] in [row[:3] for row in rows]
    assert not any(value.startswith("=") for row in rows for value in row)
    assert "<b>ben" not in as_page.read_text("utf-8")
    assert "&lt;b&gt;ben" in as_page.read_text("utf-8")
    assert "<script" not in page(found)


def test_the_command_writes_both_files_and_can_repeat_its_cases(tmp_path: Path) -> None:
    notebook(tmp_path / "class" / "ada_03.ipynb", SETUP, RIGHT)
    result = CliRunner().invoke(
        app, ["camp", "report", str(tmp_path / "class"), "-o", str(tmp_path), "--seconds", "60"]
    )
    assert result.exit_code == 0, result.output
    assert "1 of 5" in result.output
    assert (tmp_path / "report.csv").is_file()
    assert (tmp_path / "report.html").is_file()
    first, second = (report(tmp_path / "class", seconds=60).seed for _ in range(2))
    assert first != second


def test_an_empty_folder_says_how_to_hand_in(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match=r"NAME_03\.ipynb"):
            handed_in(folder)


def test_only_what_the_answer_names_is_run() -> None:
    cells = [
        "import numpy as np\nimport time\n%matplotlib inline\nIGNORE = -100\nmodel = train()",
        "!pip install x\ndef helper(ids):\n    return [IGNORE] * len(ids)\nraise SystemExit",
        "# EXERCISE 3.1 (5 min)\ndef labels_of(turns):\n    return helper(turns)\n\ncheck.exercise_3_1(labels_of)",
        "IGNORE = 5",
    ]
    program = program_of("3.1", "labels_of", cells)
    assert (
        program
        == "IGNORE = -100\n\ndef helper(ids):\n    return [IGNORE] * len(ids)\n\ndef labels_of(turns):\n    "
        + ("return helper(turns)\n")
    )
    helper = "def helper(ids):\n    return [IGNORE] * len(ids)"
    assert program == f"IGNORE = -100\n\n{helper}\n\ndef labels_of(turns):\n    return helper(turns)\n"
    assert program_of("3.2", "shift_labels", cells) is None
    with pytest.raises(Wrong, match="defines no function"):
        program_of("3.1", "labels_of", ["def labels_of(x): ...", "# EXERCISE 3.1\nx = 1"])


def test_values_survive_the_pipe() -> None:
    import numpy as np

    value = {"a": (1, [2.5, None, "é"]), 3: {4, 5}, "array": np.arange(6.0).reshape(2, 3), "bytes": b"\x00\xff"}
    back = decode(json.loads(json.dumps(encode(value))))
    assert back.pop("array").tolist() == value.pop("array").tolist()
    assert back == value
    for forged in ({"$array": ["x"], "dtype": "U999999999"}, {"$array": [1], "dtype": "V999999999"}):
        with pytest.raises((ValueError, KeyError)):
            decode(forged)
    with pytest.raises(ValueError, match="unknown kind"):
        decode({"$other": 1})


def test_terminals_are_not_steered() -> None:
    assert printable("a\x1b[2Jb\nc") == "a [2Jb c"


def test_names_that_nothing_defines_are_explained() -> None:
    state, text = outcome_of("return TABLE[0]")
    assert state == "not yet"
    assert "put the rest into the exercise's cell" in text


def test_functions_are_handed_over() -> None:
    with Sandbox("def f(call):\n    return call(1) + call(2)\n", "f", seconds=60) as answer:
        assert answer(lambda number: number + 1) == 5
