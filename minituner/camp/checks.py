"""What a learner types: `check.exercise_3_2(my_function)` and `hint("3.2")`.

    check.exercise_3_2(shift_labels)
    3.2 not yet: this case fails: shift_labels([...]) gives [...]. That is before the shift (hint('3.2') helps)

A check prints and never raises, so that "run all cells" goes through. Lesson: every notebook's exercises.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

from minituner.camp.core import exercises, find, grade, short
from minituner.errors import UsageError

NAME = re.compile(r"exercise_(\d+)_(\d+)")


class Checks:
    """One function for each exercise: `exercise_3_2(answer)` prints the outcome of 3.2."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        found = NAME.fullmatch(name)
        if not found:
            raise AttributeError(f"there is no check {name!r}; write check.exercise_3_2(answer) for exercise 3.2")
        key = f"{found[1]}.{found[2]}"

        def check_it(answer: Any = None) -> None:
            try:
                print(grade(key, answer))
            except UsageError as error:
                print(error.text())

        check_it.__name__, check_it.__doc__ = name, f"Print whether the answer to exercise {key} is right."
        return check_it

    def __dir__(self) -> Iterator[str]:
        for path in sorted(entry.name for entry in files("minituner.camp").iterdir()):
            if found := re.fullmatch(r"lesson_(\d+)\.py", path):
                yield from (f"exercise_{int(found[1])}_{number}" for number in exercises(found[1]))


class Hint(str):
    """A hint, which a notebook shows as the sentence it is, without quotes."""

    def __repr__(self) -> str:
        return str(self)


class Hints:
    """`hint("3.2")`: the next hint of an exercise, from gentle to plain; after the last one, the last one again."""

    def __init__(self) -> None:
        self._left: dict[str, Iterator[str]] = {}

    def __call__(self, key: str) -> Hint:
        """The next hint.

        Raises:
            UsageError: there is no such exercise.
        """
        hints, key = find(key).hints, short(key)
        ahead = self._left.setdefault(key, itertools.chain(hints, itertools.repeat(hints[-1])))
        return Hint(next(ahead))


check = Checks()
hint = Hints()
