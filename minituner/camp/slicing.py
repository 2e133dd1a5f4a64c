"""The part of a notebook that an answer needs, and no other line of it.

    cell 2    import numpy as np                      np is named by shift_labels: kept
    cell 5    result = train(recipe)                  nobody names it: never run
    cell 9    IGNORE = -100                           plain data that is named: kept
    cell 50   # EXERCISE 3.2 (5 min)
              def shift_labels(documents): ...        the answer
              check.exercise_3_2(shift_labels)        never run: the report asks for itself

So an answer is graded in a second, though its notebook trains for minutes. Kept are, as far as the answer names them:
imports, functions and classes of any cell, assignments of plain data, and any assignment in the exercise's own cell.
Stored outputs are never looked at. Lesson: the teacher's kit.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import Any

from minituner.camp.book import exercise_of, source_of
from minituner.camp.compare import Wrong

NO_CELL = "there is no exercise cell"


def code_cells(notebook: dict[str, Any]) -> list[str]:
    """The sources of a notebook's code cells."""
    cells = notebook.get("cells", [])
    return [source_of(cell) for cell in cells if isinstance(cell, dict) and cell.get("cell_type") == "code"]


def program_of(key: str, name: str, sources: Sequence[str]) -> str | None:
    """The program that defines the answer `name` of exercise `key`; None where the notebook has no such cell.

    Raises:
        Wrong: the exercise's cell is not Python, or defines nothing of that name.
    """
    mine = max((i for i, source in enumerate(sources) if exercise_of(source) == key), default=None)
    if mine is None:
        return None
    statements = list(_statements(sources, mine))
    bound: dict[str, int] = {}
    for place, (cell, node) in enumerate(statements):
        for known in _bound(node):
            if cell <= mine or known not in bound:  # the last one before the exercise, or the first one after it
                bound[known] = place
    if name not in bound or statements[bound[name]][0] != mine:
        raise Wrong(f"the cell defines no function {name}")
    needed: set[int] = set()
    ahead = [name]
    while ahead:
        place = bound.get(ahead.pop())
        if place is not None and place not in needed:
            needed.add(place)
            ahead += [node.id for node in ast.walk(statements[place][1]) if isinstance(node, ast.Name)]
    return "\n\n".join(ast.unparse(statements[place][1]) for place in sorted(needed)) + "\n"


def _statements(sources: Sequence[str], mine: int) -> Iterator[tuple[int, ast.stmt]]:
    """(cell, statement) of what may be kept, in order."""
    for cell, source in enumerate(sources):
        try:
            tree = ast.parse(_without_magic(source))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if cell == mine:
                line = f" in line {error.lineno}" if isinstance(error, SyntaxError) else ""
                raise Wrong(f"the cell is not Python{line}: {error.args[0] if error.args else error}") from None
            continue
        for node in tree.body:
            if _may_be_kept(node, cell == mine):
                yield cell, node


def _without_magic(source: str) -> str:
    """Notebook magics are no Python: %matplotlib, !pip, a trailing question mark."""
    if source.lstrip().startswith("%%"):
        return ""
    lines = source.split("\n")
    return "\n".join("" if line.lstrip()[:1] in ("%", "!", "?") or line.endswith("?") else line for line in lines)


def _may_be_kept(node: ast.stmt, own: bool) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
        return True
    return isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and (own or _is_data(node.value))


def _is_data(node: ast.expr) -> bool:
    plain = (ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.UnaryOp, ast.unaryop, ast.expr_context)
    return all(isinstance(part, plain) for part in ast.walk(node))


def _bound(node: ast.stmt) -> Iterator[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))
