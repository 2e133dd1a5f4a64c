"""Every notebook is as it should be: outputs in run order, something checked, nothing leaked.

nbval re-runs them (see the Makefile); with stripped outputs it would pass anything, hence these guards.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LEAKS = re.compile(r"(?<![\w.])/(root|home|Users|work|opt|usr)/|file://")


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
    assert [path.name for path in NOTEBOOKS] == sorted(path.name for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_fit_to_publish(path: Path) -> None:
    raw = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(raw, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    checked = [cell for cell in code if "nbval-check-output" in cell.metadata.get("tags", [])]
    assert len(checked) >= 2, "at least two cells whose outputs are checked"
    assert all(cell.outputs for cell in checked), "a checked cell without output checks nothing"
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "outputs come from one run, top to bottom"
    kinds = {output.output_type for cell in code for output in cell.outputs}
    expected = {o.output_type for c in code if "raises-exception" in c.metadata.get("tags", []) for o in c.outputs}
    assert "error" not in kinds - expected
    assert "widgets" not in notebook.metadata, "no widget state"
    assert not LEAKS.search(raw), f"a path of some machine: {LEAKS.search(raw)}"
    assert len(raw.encode()) < 200_000, f"{len(raw.encode()) / 1000:.0f} kB"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_readable(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 25, cell.source[:80]
    prose = sum(cell.cell_type == "markdown" for cell in notebook.cells)
    assert prose >= len(notebook.cells) * 0.3
