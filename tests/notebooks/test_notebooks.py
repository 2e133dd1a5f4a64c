"""Every notebook is as it should be: outputs in run order, something checked, nothing leaked.

nbval re-runs them (see the Makefile); with stripped outputs it would pass anything, hence these guards.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from minituner.camp.core import exercises

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if re.match(r"\d\d_", path.name)]
CHECKED = 5  # cells of each notebook whose outputs nbval compares
HEADER = re.compile(
    r"\*Lesson (?P<number>\d\d) of 10 · before this: [^·*]+ · after this: [^·*]+ · computing: [^·*]+"
    r" · (?P<exercises>\d+) exercises\*"
)
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
    assert len(checked) >= CHECKED, f"at least {CHECKED} cells whose outputs are checked"
    assert all(cell.outputs for cell in checked), "a checked cell without output checks nothing"
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "outputs come from one run, top to bottom"
    kinds = {output.output_type for cell in code for output in cell.outputs}
    expected = {o.output_type for c in code if "raises-exception" in c.metadata.get("tags", []) for o in c.outputs}
    assert "error" not in kinds - expected
    assert "widgets" not in notebook.metadata, "no widget state"
    assert not LEAKS.search(raw), f"a path of some machine: {LEAKS.search(raw)}"
    assert len(raw.encode()) < 200_000, f"{len(raw.encode()) / 1000:.0f} kB"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_says_where_it_stands_and_how_long_it_takes(path: Path) -> None:
    """One header line of one form, under the promise, with the number of exercises that there are."""
    opening = nbformat.read(path, as_version=4).cells[0].source
    found = HEADER.findall(" ".join(opening.split()))
    assert len(found) == 1, "*Lesson NN of 10 · before this: .. · after this: .. · computing: .. · N exercises*"
    number, count = found[0]
    assert number == path.name[:2]
    assert int(count) == (len(exercises(number)) if number in with_exercises() else 0)


def with_exercises() -> set[str]:
    """The lessons that have any: `minituner/camp/lesson_NN.py`."""
    return {file.stem[-2:] for file in (ROOT / "minituner" / "camp").glob("lesson_*.py")}


def test_the_header_s_form_is_not_met_by_another() -> None:
    line = "*Lesson 03 of 10 · before this: 01, 02 · after this: 04 · computing: 10 s, 1 GB · 5 exercises*"
    assert HEADER.findall(line) == [("03", "5")]
    for old, new in ((" · ", ", "), ("Lesson 03", "Lesson 3"), ("5 exercises", "exercises"), ("*", "")):
        assert not HEADER.findall(line.replace(old, new)), new


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_has_the_one_look_and_words_beside(path: Path) -> None:
    """What a notebook draws with pyplot itself is shown as a `viz.Picture` too: its summary is the image's alt text."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    if any("import matplotlib.pyplot" in cell.source for cell in cells):
        assert any("viz.use_style()" in cell.source for cell in cells)
    shown = [output.data for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert not [data["text/plain"] for data in shown if not re.match(r"Picture\(.+\)", data["text/plain"])]


def test_the_strict_notebook_leaves_out_few_cells_and_says_so() -> None:
    """`make test` compares every output of one notebook; what cannot be the same on two machines is tagged."""
    (name,) = re.findall(r"^STRICT := (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    cells = nbformat.read(ROOT / name, as_version=4).cells
    with_output = [set(cell.metadata.get("tags", [])) for cell in cells if cell.cell_type == "code" and cell.outputs]
    ignored = [tags for tags in with_output if "nbval-ignore-output" in tags]
    assert 1 <= len(ignored) <= 6
    assert len(with_output) - len(ignored) >= 20
    assert not any("nbval-check-output" in tags for tags in ignored)


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
