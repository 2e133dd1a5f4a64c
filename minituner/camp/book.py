"""One source, two notebooks: the learner's with stubs, the teacher's with solutions.

    solutions/lesson_03.py          the learner's notebook        the solution notebook
    # EXERCISE 3.2 (5 min)          # EXERCISE 3.2 (5 min)        # EXERCISE 3.2 (5 min)
    def shift_labels(documents):    def shift_labels(documents):  def shift_labels(documents):
        '''What each ...'''             '''What each ...'''           '''What each ...'''
        return [label for ...]          ...                           return [label for ...]
                                    check.exercise_3_2(...)       check.exercise_3_2(...)

`make notebooks` writes the stubs into the learner's notebooks, which are committed (a test holds their exercise cells
equal to `stub`), and builds the solution notebooks, which are not, and which differ in these cells alone. Exercise
cells are found by their first line, which is why a learner should leave it there. Lesson: every notebook's exercises.
"""

from __future__ import annotations

import ast
import copy
import json
import re
from collections.abc import Callable
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from minituner.camp.core import exercises, find, grade, lesson_of, short
from minituner.errors import UsageError

MARK = re.compile(r"\s*#\s*EXERCISE\s+(\d+)\.(\d+)\b")


def lessons() -> list[str]:
    """The lessons that have exercises, e.g. ["01", "02", ...]."""
    names = (entry.name for entry in files("minituner.camp").iterdir())
    return sorted(found[1] for name in names if (found := re.fullmatch(r"lesson_(\d+)\.py", name)))


def exercise_of(source: str) -> str | None:
    """The key ("3.2") of an exercise cell, by the mark in its first line that is not empty; None for other cells."""
    found = MARK.match(source.lstrip("\n"))
    return f"{int(found[1])}.{int(found[2])}" if found else None


def solution(key: str) -> str:
    """The source of an exercise's solution, from its mark to the end of its function.

    Raises:
        UsageError: the lesson has no solutions, or none of this exercise.
    """
    lesson, _ = lesson_of(key)
    file = files("minituner.camp.solutions") / f"lesson_{lesson}.py"
    if file.is_file():
        for block in re.split(r"(?m)^(?=# EXERCISE )", file.read_text(encoding="utf-8"))[1:]:
            if exercise_of(block) == short(key):
                return block.rstrip()
    raise UsageError(f"there is no solution of exercise {short(key)}", fix=f"write it in camp/solutions/{file.name}")


def stub(key: str) -> str:
    """The learner's cell: the solution's head and docstring, nothing in the body, and the check."""
    source = solution(key)
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    docstring_ends = function.body[0].end_lineno
    return "\n".join([*source.splitlines()[:docstring_ends], "    ...", "", "", _check(key)])


def solved(key: str) -> str:
    """The teacher's cell: the solution, and the check."""
    return f"{solution(key)}\n\n\n{_check(key)}"


def _check(key: str) -> str:
    return f"check.exercise_{short(key).replace('.', '_')}({find(key).name})"


def source_of(cell: dict[str, Any]) -> str:
    """The text of a notebook's cell; on disk it may be a list of lines."""
    text = cell.get("source", "")
    return "".join(text) if isinstance(text, list) else str(text)


def write_stubs(notebooks: Path) -> list[Path]:
    """Bring the exercise cells of the learner's notebooks up to date; returns the files that had to be changed.

    Raises:
        UsageError: there is no notebook in the folder.
    """
    changed = []
    for path in _notebooks(notebooks):
        if _rewritten(path, path, stub, lambda key: None):
            changed.append(path)
    return changed


def write_solutions(notebooks: Path, out: Path) -> list[Path]:
    """Write a solution notebook for each of `notebooks` that has exercises; returns the files written.

    The solutions are checked on the way, and each cell shows what its check said.

    Raises:
        UsageError: there is no notebook in the folder, or `out` is that folder.
    """
    if out.resolve() == notebooks.resolve():
        raise UsageError("solutions would overwrite the learner's notebooks", fix="name another folder")
    found = _notebooks(notebooks)
    out.mkdir(parents=True, exist_ok=True)
    return [out / path.name for path in found if _rewritten(path, out / path.name, solved, function_of)]


def _notebooks(folder: Path) -> list[Path]:
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise UsageError(f"{folder}: there is no notebook NN_*.ipynb here", fix="name the folder with the notebooks")
    return found


def _rewritten(path: Path, out: Path, text: Callable[[str], str], answer: Callable[[str], Any]) -> bool:
    """Write the notebook with other exercise cells, and with what their checks say; False where nothing changes."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    before = copy.deepcopy(notebook)
    for cell in notebook["cells"]:
        key = exercise_of(source_of(cell)) if cell["cell_type"] == "code" else None
        if key is not None:
            said = f"{grade(key, answer(key))}\n"
            cell["source"] = text(key).splitlines(keepends=True)
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": [said]}]
    if notebook == before:
        return False
    out.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return True


def function_of(key: str) -> Any:
    """The solution of an exercise as a function."""
    lesson, number = lesson_of(key)
    module = import_module(f"minituner.camp.solutions.lesson_{lesson}")
    return getattr(module, exercises(lesson)[number].name)
