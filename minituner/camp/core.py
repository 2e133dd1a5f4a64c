"""What an exercise is, and how an answer is checked."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from minituner.errors import UsageError


class Wrong(Exception):
    """Raised by a check: what is wrong with the answer, in words that help."""


@dataclass
class Exercise:
    """A question, a check that raises `Wrong`, and hints from gentle to plain."""

    question: str
    check: Callable[[Any], None]
    hints: tuple[str, ...]
    shown: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Outcome:
    """The result of a check; shows itself in a notebook, and is true when the answer is right."""

    right: bool
    text: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return ("right: " if self.right else "not yet: ") + self.text

    def _repr_html_(self) -> str:
        mark, colour = ("&#10003;", "#1a7f37") if self.right else ("&#10007;", "#9a6700")
        return f'<p style="border-left:4px solid {colour};padding-left:8px"><b>{mark}</b> {html.escape(self.text)}</p>'


def find(key: str) -> Exercise:
    """The exercise `LESSON.NUMBER`, e.g. "03.1".

    Raises:
        UsageError: there is no such exercise.
    """
    lesson, _, number = key.partition(".")
    try:
        exercises: dict[str, Exercise] = import_module(f"minituner.camp.lesson_{lesson}").EXERCISES
    except ModuleNotFoundError:
        raise UsageError(f"lesson {lesson!r} has no exercises", fix="write LESSON.NUMBER, e.g. '03.1'") from None
    if number not in exercises:
        raise UsageError(f"lesson {lesson} has no exercise {number!r}", fix=f"there are: {', '.join(exercises)}")
    return exercises[number]


def check(key: str, answer: Any) -> Outcome:
    """Check an answer; a wrong one is told what differs and how to get a hint."""
    exercise = find(key)
    if answer is None or answer is ...:
        return Outcome(False, f"no answer yet. {exercise.question}")
    try:
        exercise.check(answer)
    except Wrong as wrong:
        return Outcome(False, f"{wrong} (hint('{key}') helps)")
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        return Outcome(False, f"the check could not use this answer: {type(error).__name__}: {error}")
    return Outcome(True, exercise.question)


def hint(key: str) -> str:
    """The next hint of an exercise; after the last one, the last one again."""
    exercise = find(key)
    text = exercise.hints[min(exercise.shown, len(exercise.hints) - 1)]
    exercise.shown += 1
    return text
