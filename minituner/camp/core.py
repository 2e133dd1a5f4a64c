"""What an exercise is, and how an answer is checked.

An answer is a function. It is called on the case that the notebook shows and on cases drawn from a seed, so that a
number copied from a neighbour, or one that fits the shown case alone, does not pass:

    shown case      turns = [("prompt", [1, 71]), ("answer", [81, 2])]       labels_of(turns) == right(turns)?
    hidden case 1   turns = [("answer", [34, 80, 2]), ("prompt", [9]), ...]  the same question, drawn from the seed
    ...
    a mistake       a function too: where it gives what the learner's gives, its words are the likely cause

Right values are computed by the functions that training uses. A learner is told which case fails, what his function
gave and the likely cause, never the right value. Lesson: every notebook's exercises.
"""

from __future__ import annotations

import copy
import random
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import FunctionType
from typing import Any, Literal

from minituner.camp.compare import REL, Wrong, difference, plain, same
from minituner.camp.limits import TooLong, time_limit
from minituner.errors import UsageError

AT_MOST = 200  # further cases, for a mistake that few cases show
SECONDS = 30.0  # for one call of the learner's function; the right ones need milliseconds


def as_it_is(value: Any, *case: Any) -> Any:
    """The usual view of a value: compared as it is."""
    return value


@dataclass(frozen=True)
class Exercise:
    """One exercise: a function to write, how its cases are drawn, and what is right.

    name:      of the learner's function; its stub and its solution stand in `camp/solutions/lesson_NN.py`
    example:   the arguments of the shown case
    draw:      random numbers -> the arguments of a hidden case; plain values, numpy arrays, or functions
    right:     arguments -> the right value
    mistakes:  the likely cause in words -> a function that makes this mistake (at least two)
    view:      (value, *arguments) -> what is compared; may raise Wrong
    rel:       numbers are compared to this relative difference
    """

    name: str
    minutes: int
    example: tuple[Any, ...]
    draw: Callable[[random.Random], tuple[Any, ...]]
    right: Callable[..., Any]
    mistakes: Mapping[str, Callable[..., Any]]
    hints: tuple[str, ...]
    view: Callable[..., Any] = as_it_is
    cases: int = 8
    rel: float = REL

    def drawn(self, key: str, seed: int | str) -> list[tuple[Any, ...]]:
        """The shown case and the hidden ones of this seed: `cases` of them, and more until each known mistake fails."""
        numbers = random.Random(f"{seed}/{key}")  # noqa: S311
        cases = [self.example, *(self.draw(numbers) for _ in range(self.cases))]
        unseen = [mistake for mistake in self.mistakes.values() if not any(self.told_apart(mistake, c) for c in cases)]
        for _ in range(AT_MOST):
            if not unseen:
                break
            cases.append(self.draw(numbers))
            unseen = [mistake for mistake in unseen if not self.told_apart(mistake, cases[-1])]
        return cases

    def told_apart(self, mistake: Callable[..., Any], case: tuple[Any, ...]) -> bool:
        """Whether a mistake gives something else than the right value in this case (or nothing at all)."""
        try:
            return not same(self.seen(mistake, case), self.seen(self.right, case), self.rel)
        except Exception:  # it cannot even be made here
            return True

    def seen(self, function: Callable[..., Any], case: tuple[Any, ...]) -> Any:
        """What is compared of a function's value; each call gets its own copy of the case."""
        return plain(self.view(function(*copy.deepcopy(case)), *copy.deepcopy(case)))


@dataclass(frozen=True)
class Outcome:
    """What a check found: `state`, and a sentence about it. True when the exercise is passed."""

    state: Literal["passed", "not yet", "not started"]
    text: str
    key: str = field(default="", compare=False)

    def __bool__(self) -> bool:
        return self.state == "passed"

    def __str__(self) -> str:
        return f"{self.key} {self.state}" + (f": {self.text}" if self.text else "")


def lesson_of(key: str) -> tuple[str, str]:
    """("03", "2") of "3.2", "03.2" or "3_2"."""
    lesson, _, number = key.replace("_", ".").partition(".")
    return lesson.zfill(2), number


def exercises(lesson: str) -> dict[str, Exercise]:
    """The exercises of a lesson ("03"), by number.

    Raises:
        UsageError: the lesson has no exercises.
    """
    name = f"minituner.camp.lesson_{lesson}"
    try:
        return dict(import_module(name).EXERCISES)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UsageError(f"lesson {lesson!r} has no exercises", fix="write LESSON.NUMBER, e.g. '3.2'") from None


def find(key: str) -> Exercise:
    """The exercise `LESSON.NUMBER`, e.g. "3.1".

    Raises:
        UsageError: there is no such exercise.
    """
    lesson, number = lesson_of(key)
    known = exercises(lesson)
    if number not in known:
        raise UsageError(f"lesson {lesson} has no exercise {number!r}", fix=f"there are: {', '.join(known)}")
    return known[number]


def short(key: str) -> str:
    """ "3.2" of "03.2"."""
    lesson, number = lesson_of(key)
    return f"{int(lesson)}.{number}"


def untouched(answer: Any) -> bool:
    """Whether this is the stub as it came: nothing, or a function whose body does nothing."""
    if answer is None or answer is ...:
        return True

    def bare() -> None: ...

    def documented() -> None:
        """A docstring is a constant in front of the None that is returned."""

    if not isinstance(answer, FunctionType):
        return False
    code, says = answer.__code__, answer.__doc__
    same_body = code.co_code in (bare.__code__.co_code, documented.__code__.co_code)
    return same_body and all(constant in (None, says) for constant in code.co_consts)


def grade(key: str, answer: Any, *, seed: int | str = 0, seconds: float = SECONDS) -> Outcome:
    """Check an answer on the shown case and on those that `seed` draws; whatever the answer does becomes a sentence."""
    exercise, key = find(key), short(key)
    if untouched(answer):
        return Outcome("not started", f"write {exercise.name}, then run the cell again", key)
    if not callable(answer):
        what = f"give the function itself, {exercise.name} without brackets; this is a {type(answer).__name__}"
        return Outcome("not yet", what, key)
    try:
        return Outcome("passed", _compared(key, exercise, answer, seed, seconds), key)
    except Wrong as wrong:
        return Outcome("not yet", f"{wrong} (hint('{key}') helps)", key)


def _compared(key: str, exercise: Exercise, answer: Callable[..., Any], seed: int | str, seconds: float) -> str:
    cases = exercise.drawn(key, seed)
    values: list[Any] = []
    failed = -1
    for number, case in enumerate(cases):
        mine = _called(exercise, answer, case, seconds)
        try:
            values.append(plain(exercise.view(mine, *copy.deepcopy(case))))
            fine = same(values[-1], exercise.seen(exercise.right, case), exercise.rel)
        except Wrong as wrong:
            raise Wrong(f"{_said(exercise, case)} gives {_brief(mine)}: {wrong}") from None
        except Exception as error:  # a value that the view cannot use: of the wrong kind somewhere inside
            told = f"{_said(exercise, case)} gives {_brief(mine)}, which is not of the kind that is asked for"
            raise Wrong(f"{told} ({type(error).__name__})") from None
        if not fine and failed < 0:
            failed, shown = number, mine
    if failed < 0:
        return f"the shown case and {len(cases) - 1} hidden ones"
    why = _likely_cause(exercise, cases, values, failed)
    if not why:
        why = difference(values[failed], exercise.seen(exercise.right, cases[failed]), exercise.rel)
    which = "this case" if failed == 0 else "this hidden case"
    raise Wrong(f"{which} fails: {_said(exercise, cases[failed])} gives {_brief(shown)}. {why}")


def _called(exercise: Exercise, answer: Callable[..., Any], case: tuple[Any, ...], seconds: float) -> Any:
    """The value of the learner's function; whatever goes wrong in it becomes Wrong (Ctrl-C stays Ctrl-C)."""
    try:
        with time_limit(seconds):
            return answer(*copy.deepcopy(case))
    except KeyboardInterrupt:
        raise
    except Wrong:
        raise
    except TooLong:
        told = f"did not end within {seconds:g} seconds: does a loop of yours never stop?"
        raise Wrong(f"{_said(exercise, case)} {told}") from None
    except BaseException as error:  # SystemExit too
        raise Wrong(f"{_said(exercise, case)} raises {type(error).__name__}: {_cut(str(error), 200)}") from None


def _likely_cause(exercise: Exercise, cases: list[tuple[Any, ...]], values: list[Any], failed: int) -> str:
    """The words of the mistake that gives what the answer gives, on all cases or at least on the one that fails."""
    partly = ""
    for words, mistake in exercise.mistakes.items():
        agrees = []
        for case, mine in zip(cases, values, strict=True):
            try:
                value = exercise.seen(mistake, case)
            except Exception:  # this mistake cannot even be made here
                agrees.append(False)
                continue
            agrees.append(same(mine, value, exercise.rel))
        if all(agrees):
            return words
        partly = partly or (words if agrees[failed] else "")
    return partly


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _brief(value: Any) -> str:
    """A value in at most 160 characters, whatever its __repr__ does."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 80
    brief.maxlist = brief.maxtuple = brief.maxset = brief.maxdict = 12
    try:
        return _cut(brief.repr(plain(value)), 160)
    except Exception:
        return f"a {type(value).__name__}"


def _said(exercise: Exercise, case: tuple[Any, ...]) -> str:
    arguments = (getattr(value, "__name__", "a function") if callable(value) else _brief(value) for value in case)
    return f"{exercise.name}({', '.join(arguments)})"
