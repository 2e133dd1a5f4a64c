"""What a tool says about a run: does it pass, in which words, with which numbers.

    Seen(passes=False, says="changing one moved its neighbour's logits by 0.57", facts={...})

Each fault has a function `see_NAME(recipe, scratch) -> Seen` beside it, which knows nothing of the fault: it asks the
tool, and is called once for the clean pipeline and once for the broken one (exhibit.py).
Lessons: the museum's cells in notebooks 03, 04, 05, 07 and 09.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minituner.recipe import Recipe
    from minituner.train.run import Run


@dataclass(frozen=True, slots=True)
class Seen:
    """A tool's answer; `facts` are its numbers."""

    passes: bool
    says: str
    facts: dict[str, Any] = field(default_factory=dict)


See = Callable[["Recipe", Path], Seen]


def ready(recipe: Recipe, scratch: Path) -> Run:
    """The recipe's run just before its first step, on this process alone; nothing is printed.

    Raises:
        UsageError, MinitunerError: what training itself would say.
    """
    from minituner.train.ranks import Ranks
    from minituner.train.run import set_up

    return set_up(recipe, scratch, scratch, lambda line: None, Ranks())


def in_float32(recipe: Recipe) -> Recipe:
    """A copy of the recipe that computes in float32, where two ways of adding up agree to many digits."""
    copy = recipe.model_copy(deep=True)
    copy.model.dtype, copy.model.attention = "float32", "auto"
    return copy


def as_file(recipe: Recipe, scratch: Path) -> Path:
    """The recipe as a file, for tools that are pointed at one."""
    file = scratch / "recipe.yaml"
    recipe.dump(file)
    return file
