"""The pages around the notebooks are whole: every lesson is there, every link leads somewhere, counts are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minituner.camp.core import exercises

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
PAGES = [NOTEBOOKS / "README.md", *sorted((NOTEBOOKS / "teaching").glob("*.md"))]
LESSONS = sorted(path.name for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def row(lesson: str) -> list[str]:
    """The cells of a lesson's line in the table of notebooks/README.md."""
    text = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|") and f"({lesson})" in line]
    assert len(lines) == 1, f"{lesson} has {len(lines)} lines"
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in text.splitlines()
        if line[:1] == "#"
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        if place:
            assert (page.parent / place).is_file(), f"{page.name}: {target}"
        else:
            assert anchor in headings, f"{page.name}: no section {anchor}"


@pytest.mark.parametrize("lesson", LESSONS)
def test_every_lesson_is_on_the_arc_with_its_number_of_exercises(lesson: str) -> None:
    cells = row(lesson)
    assert len(cells) == 5
    assert all(cells)
    if (NOTEBOOKS.parent / "minituner" / "camp" / f"lesson_{lesson[:2]}.py").is_file():
        assert cells[-1] == str(len(exercises(lesson[:2])))


def test_the_plans_for_teachers_teach_every_lesson() -> None:
    text = (NOTEBOOKS / "teaching" / "README.md").read_text(encoding="utf-8")
    two_days, rest = text.split("## Two days")[1].split("## Six evenings")
    evenings, rest = rest.split("## Lesson by lesson")
    for number in (lesson[:2] for lesson in LESSONS):
        for name, part in (("two days", two_days), ("six evenings", evenings), ("lesson by lesson", rest)):
            assert re.search(rf"(?<!\d){number}(?!\d)", part), f"{number} is not in {name}"
