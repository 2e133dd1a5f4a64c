"""The tool that shows a fault, asked twice: about the recipe as it is, and with the fault in it.

    show("packed-leak", recipe)
        clean     changing a packed document moves its neighbour's logits by 0
        broken    packed documents see each other: changing one moved its neighbour's logits by 0.571

Nothing is kept: what a tool has to train or write goes into a temporary folder. Lesson: notebook 03.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from minituner.museum.catalog import Fault, find
from minituner.museum.fitting import fitting
from minituner.museum.injection import injected
from minituner.museum.seen import See, Seen
from minituner.recipe import Recipe


def show(name: str, recipe: Recipe | str | Path, say: Callable[[str], None] = print) -> tuple[Seen, Seen]:
    """What the fault's tool says about the recipe, clean and broken; both are said.

    Raises:
        UsageError: no such fault, it cannot happen in this recipe, or it found nothing to spoil there.
    """
    fault = find(name)
    recipe = fitting(fault, recipe if isinstance(recipe, Recipe) else Recipe.load(recipe))
    see = see_for(fault)
    say(f"{fault.name}: {fault.tool}")
    with tempfile.TemporaryDirectory() as place:
        (clean_place := Path(place) / "clean").mkdir()
        (broken_place := Path(place) / "broken").mkdir()
        clean = see(recipe, clean_place)
        _tell(say, "clean", clean)
        with injected(fault.name, lambda line: None) as injection:
            broken = see(recipe, broken_place)
        injection.must_have_acted()
        _tell(say, "broken", broken)
    return clean, broken


def see_for(fault: Fault) -> See:
    """The function that asks the fault's tool."""
    room = import_module(f"minituner.museum.{fault.room}")
    return getattr(room, f"see_{fault.name.replace('-', '_')}")


def _tell(say: Callable[[str], None], which: str, seen: Seen) -> None:
    for number, line in enumerate(seen.says.splitlines()):
        say(f"  {which if not number else '':8}  {line}")
    say(f"  {'':8}  -> {'passes' if seen.passes else 'DOES NOT PASS'}")
