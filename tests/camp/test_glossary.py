"""The glossary is whole: every word that a notebook says was learned is in it, linked to that notebook, and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
GLOSSARY = NOTEBOOKS / "teaching" / "glossary.md"
ENTRY = re.compile(r"^- \*\*(?P<terms>[^*]+)\*\*: (?P<meaning>.+?) (?P<links>\[\d\d\]\(.+)$")
LINK = re.compile(r"\[(\d\d)\]\(([^)]+)\)")


def words_learned(notebook: Path) -> list[str]:
    """The words in a notebook's "Words learned" list: bold ones, else italic ones, else those between commas."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    lists = [found[1] for text in texts for found in re.finditer(r"Words learned:?(?:\*\*)?:?\s(.*)", text, re.DOTALL)]
    assert len(lists) == 1, f"{notebook.name} has {len(lists)} lists of words learned"
    text = re.split(r"\n\n(?=\*{0,2}Next|This was)", lists[0].strip())[0]
    pieces = (
        re.findall(r"\*\*(.+?)\*\*", text, re.DOTALL) or re.findall(r"(?<!\*)\*([^*]+)\*", text) or [text.rstrip(".")]
    )
    return [word for piece in pieces for part in piece.split(",") if (word := " ".join(part.split()))]


def entries() -> dict[str, dict[str, str]]:
    """Word -> {number of a notebook: where the link goes}."""
    found: dict[str, dict[str, str]] = {}
    for line in GLOSSARY.read_text(encoding="utf-8").splitlines():
        if not line.startswith("- "):
            continue
        entry = ENTRY.match(line)
        assert entry, f"not an entry: {line}"
        assert len(entry["meaning"].split()) >= 3, f"not explained: {line}"
        for word in entry["terms"].split(","):
            assert word.strip() not in found, f"{word.strip()!r} is there twice"
            found[word.strip()] = dict(LINK.findall(entry["links"]))
    return found


def notebooks() -> list[Path]:
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("notebook", notebooks(), ids=lambda path: path.stem)
def test_every_word_of_a_notebook_is_in_the_glossary_and_linked_to_it(notebook: Path) -> None:
    words, known = words_learned(notebook), entries()
    assert len(words) >= 5
    assert not [word for word in words if word not in known]
    assert not [word for word in words if notebook.name[:2] not in known[word]], f"not linked to {notebook.name}"


def test_every_link_leads_to_a_notebook_that_teaches_the_word() -> None:
    taught = {notebook.name: words_learned(notebook) for notebook in notebooks()}
    for word, links in entries().items():
        assert links, word
        for number, target in links.items():
            path = (GLOSSARY.parent / target).resolve()
            assert path.name in taught, f"{word}: {target} leads nowhere"
            assert path.name.startswith(number), f"{word}: [{number}] leads to {target}"
            assert word in taught[path.name], f"{word}: {target} does not teach it"


def test_the_glossary_is_in_order() -> None:
    first = [line.split("**")[1] for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]
    assert len(first) > 50
    assert first == sorted(first, key=lambda word: word.lstrip("-").casefold())


def test_a_word_list_is_read_in_each_of_its_forms(tmp_path: Path) -> None:
    def read(text: str) -> list[str]:
        cell = {"cell_type": "markdown", "source": [text]}
        (tmp_path / "n.ipynb").write_text(json.dumps({"cells": [cell]}))
        return words_learned(tmp_path / "n.ipynb")

    assert read("x\n\n**Words learned:** token, stop\ntoken.\n\nNext: more.") == ["token", "stop token"]
    assert read("**Words learned:** *record* (an entry) · *a, b c* (two).\n\n**Next:** *no*") == ["record", "a", "b c"]
    assert read("## Words learned\n\n**rank,\nworld size** · **x** an *it* word\n\nNext: **07**") == [
        "rank",
        "world size",
        "x",
    ]
