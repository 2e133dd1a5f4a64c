"""Learner's and solution notebooks come from one source, and differ in the marked cells alone."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from minituner.camp.book import exercise_of, lessons, solved, source_of, stub, write_solutions, write_stubs
from minituner.camp.core import exercises
from minituner.cli import app
from minituner.errors import UsageError

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
LEARNERS = sorted(path for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb") if path.name[:2] in lessons())


@pytest.mark.parametrize("path", LEARNERS, ids=lambda path: path.stem)
def test_the_committed_exercise_cells_are_the_stubs_in_their_order(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    found = {key: cell for cell in cells if cell.cell_type == "code" and (key := exercise_of(cell.source))}
    lesson = path.name[:2]
    assert list(found) == [f"{int(lesson)}.{number}" for number in exercises(lesson)]
    for key, cell in found.items():
        assert cell.source == stub(key)
        assert [output.text for output in cell.outputs] == [
            f"{key} not started: write {exercises(lesson)[key.split('.')[1]].name}, then run the cell again\n"
        ]


def test_every_lesson_with_exercises_has_its_notebook() -> None:
    assert [path.name[:2] for path in LEARNERS] == lessons()


def test_solutions_differ_in_the_marked_cells_alone_and_pass(tmp_path: Path) -> None:
    out = tmp_path / "solutions"
    result = CliRunner().invoke(app, ["camp", "solutions", str(out), "--notebooks", str(NOTEBOOKS)])
    assert result.exit_code == 0, result.output
    assert [path.name for path in sorted(out.iterdir())] == [path.name for path in LEARNERS]
    for learner in LEARNERS:
        nbformat.validate(nbformat.read(out / learner.name, as_version=4))
        before, after = (json.loads(path.read_text("utf-8")) for path in (learner, out / learner.name))
        assert {k: v for k, v in before.items() if k != "cells"} == {k: v for k, v in after.items() if k != "cells"}
        for cell, other in zip(before["cells"], after["cells"], strict=True):
            key = exercise_of(source_of(cell)) if cell["cell_type"] == "code" else None
            if key is None:
                assert cell == other
                continue
            assert source_of(other) == solved(key) != source_of(cell)
            assert source_of(other).startswith(source_of(cell).split("    ...")[0])  # head and docstring are kept
            assert source_of(other).endswith(source_of(cell).splitlines()[-1])  # and so is the check
            assert "".join(other["outputs"][0]["text"]).startswith(f"{key} passed: ")
            kept = {"source", "outputs"}
            assert {k: v for k, v in cell.items() if k not in kept} == {k: v for k, v in other.items() if k not in kept}


def test_stubs_are_renewed_where_they_are_old_and_nothing_else_is_touched(tmp_path: Path) -> None:
    third = next(path for path in LEARNERS if path.name.startswith("03"))
    for path in (LEARNERS[0], third):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert write_stubs(tmp_path) == []
    old = tmp_path / third.name
    old.write_text(old.read_text("utf-8").replace("def shift_labels(documents)", "def shift_labels(rows)"), "utf-8")
    assert write_stubs(tmp_path) == [old]
    assert old.read_bytes() == third.read_bytes()


def test_learners_notebooks_are_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="overwrite"):
        write_solutions(NOTEBOOKS, NOTEBOOKS)
    with pytest.raises(UsageError, match="there is no notebook"):
        write_solutions(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "key"),
    [("# EXERCISE 3.2 (5 min)\nx", "3.2"), ("\n  #EXERCISE 03.2", "3.2"), ("x = 1  # EXERCISE 3.2", None), ("", None)],
)
def test_the_mark(source: str, key: str | None) -> None:
    assert exercise_of(source) == key
