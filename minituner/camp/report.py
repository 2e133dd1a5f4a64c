"""Grade a class: every student's answers run again, whatever the notebooks' outputs claim.

    class/ada/03_bos_eos_and_masking.ipynb            3.1  3.2  3.3  3.4  3.5
    class/ben_03.ipynb                          ada    ✓    ✓    ✗    ·    ·     2 of 5
                                                ben    ✓    ✗    ·    ·    -     1 of 5

    ✓ passed   ✗ not yet   · not started   - the notebook has no such cell

Each answer is cut out of its notebook (`slicing.py`), run behind walls (`sandbox.py`), and asked for cases that are
drawn from a seed nobody knew. A folder is a class: `NAME/NN_*.ipynb` or `NAME_NN.ipynb`. Lesson: the teacher's kit.
"""

from __future__ import annotations

import json
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minituner.camp.book import lessons
from minituner.camp.compare import Wrong
from minituner.camp.core import Exercise, Outcome, exercises, grade
from minituner.camp.sandbox import Sandbox, walls
from minituner.camp.slicing import NO_CELL, code_cells, program_of
from minituner.errors import UsageError

LARGEST = 20_000_000  # bytes of a notebook that is read
FOREVER = 1e9  # the sandbox has the time limit
IN_FOLDER = re.compile(r"(\d\d)_.*\.ipynb")
BY_NAME = re.compile(r"(.+?)_(\d\d)(?:_.*)?\.ipynb")


@dataclass(frozen=True)
class Grade:
    """One student's outcome in one exercise. `state` is the outcome's, or "missing"."""

    student: str
    key: str
    state: str
    text: str


@dataclass
class Report:
    """All grades of a class, and how they were found."""

    grades: list[Grade] = field(default_factory=list)
    seed: str = ""
    walls: str = ""

    @property
    def students(self) -> list[str]:
        """In the alphabet's order."""
        return sorted({grade.student for grade in self.grades})

    @property
    def keys(self) -> list[str]:
        """The exercises of the lessons that anybody handed in, in their order."""
        return sorted({grade.key for grade in self.grades}, key=lambda key: [int(part) for part in key.split(".")])

    def of(self, student: str, key: str) -> Grade | None:
        """A student's grade in an exercise; None where the lesson was not handed in."""
        return next((grade for grade in self.grades if (grade.student, grade.key) == (student, key)), None)

    def passed(self, student: str) -> int:
        """How many exercises a student has passed."""
        return sum(grade.state == "passed" for grade in self.grades if grade.student == student)


def handed_in(folder: Path) -> list[tuple[str, str, Path]]:
    """(student, lesson, notebook) for every notebook of a class that belongs to a lesson with exercises.

    Raises:
        UsageError: there is none.
    """
    known, found = lessons(), []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            inside = ((IN_FOLDER.fullmatch(file.name), file) for file in sorted(path.iterdir()))
            found += [(path.name, match[1], file) for match, file in inside if match]
        elif match := BY_NAME.fullmatch(path.name):
            found.append((match[1], match[2], path))
    found = [entry for entry in found if entry[1] in known]
    if not found:
        raise UsageError(
            f"{folder}: no student's notebook is here",
            fix="lay them down as NAME/03_anything.ipynb or NAME_03.ipynb",
        )
    return found


def report(
    folder: Path,
    *,
    seed: str | None = None,
    seconds: float = 20.0,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Grade all notebooks of a class.

    seed: what hidden cases are drawn from; by default nobody can know it beforehand. seconds: for one exercise.

    Raises:
        UsageError: the folder has no student's notebook.
    """
    result = Report(seed=seed or secrets.token_hex(4), walls=walls())
    for student, lesson, path in handed_in(folder):
        say(f"{student}: lesson {lesson}")
        result.grades += list(_graded(student, lesson, path, result.seed, seconds))
    return result


def _graded(student: str, lesson: str, path: Path, seed: str, seconds: float) -> Iterator[Grade]:
    try:
        sources = code_cells(_read(path))
    except Wrong as wrong:
        yield from (Grade(student, f"{int(lesson)}.{n}", "not yet", str(wrong)) for n in exercises(lesson))
        return
    for number, exercise in exercises(lesson).items():
        key = f"{int(lesson)}.{number}"
        outcome = regrade(key, exercise, sources, seed, seconds)
        if outcome is None:
            yield Grade(student, key, "missing", NO_CELL)
        else:
            yield Grade(student, key, outcome.state, outcome.text)


def regrade(key: str, exercise: Exercise, sources: list[str], seed: str, seconds: float) -> Outcome | None:
    """The outcome of one exercise, by running the answer that is in these cells; None where there is no such cell."""
    try:
        program = program_of(key, exercise.name, sources)
        if program is None:
            return None
        if _is_stub(program, exercise.name):
            return grade(key, None)
        with Sandbox(program, exercise.name, seconds=seconds) as answer:
            return grade(key, answer, seed=seed, seconds=FOREVER)
    except Wrong as wrong:
        return Outcome("not yet", str(wrong), key)


def _is_stub(program: str, name: str) -> bool:
    """Whether the function's body is a docstring and `...`, or less."""
    import ast

    functions = [n for n in ast.parse(program).body if isinstance(n, ast.FunctionDef) and n.name == name]
    return bool(functions) and all(
        isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in functions[-1].body
    )


def _read(path: Path) -> dict[str, Any]:
    """A student's notebook, if it is a file of a sane size that holds JSON.

    Raises:
        Wrong: it is not.
    """
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise Wrong("this is a link or a folder, not a notebook: it was not read")
    if about.st_size > LARGEST:
        raise Wrong(f"the notebook has {about.st_size / 1e6:.0f} MB: it was not read")
    try:
        notebook = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError, OSError) as error:
        raise Wrong(f"the notebook cannot be read: {type(error).__name__}") from None
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise Wrong("this file is no notebook")
    return notebook
