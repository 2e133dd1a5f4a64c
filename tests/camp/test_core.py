"""A check prints a sentence and never raises, whatever a learner hands to it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minituner.camp import check, grade, hint
from minituner.camp.compare import Wrong, difference, plain, same
from minituner.camp.limits import TooLong, time_limit
from minituner.errors import UsageError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


class Hostile:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    __hash__ = None


class Endless(list[Any]):
    def __init__(self) -> None:
        super().__init__()
        self.append(self)


def swallows(*case: Any) -> Any:
    while True:
        try:
            while True:
                pass
        except Exception:
            continue


def leaves(*case: Any) -> Any:
    raise SystemExit(0)


def recurses(*case: Any) -> Any:
    return recurses(*case)


# Made inside the tests: pytest looks into its parameters, and these do not like that.
ODD_VALUES: dict[str, Callable[[], Any]] = {
    "hostile": Hostile,
    "endless": Endless,
    "object": object,
    "class": lambda: Hostile,
    "complex": lambda: 1j,
    "nan": lambda: math.nan,
    "text": lambda: "text",
    "bytes": lambda: b"bytes",
    "hostile in a dictionary": lambda: {1: Hostile()},
    "hostile in a list": lambda: [Hostile()],
    "empty array": lambda: np.array([]),
    "number without end": lambda: [10**400],
}
ODD_ANSWERS: dict[str, Callable[[], Any]] = {
    "leaves": lambda: leaves,
    "recurses": lambda: recurses,
    "takes nothing": lambda: lambda: 1,
    "divides by zero": lambda: lambda turns: 1 / 0,
    "built in": lambda: len,
    "number": lambda: 3,
    "text": lambda: "text",
    "hostile": Hostile,
}


@pytest.mark.parametrize("name", ODD_VALUES)
def test_odd_values_become_a_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check.exercise_3_1(lambda turns: ODD_VALUES[name]())
    assert capsys.readouterr().out.startswith("3.1 not yet: ")


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_odd_answers_become_a_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check.exercise_3_1(ODD_ANSWERS[name]())
    assert capsys.readouterr().out.startswith("3.1 not yet: ")


def test_numbers_without_end_are_compared() -> None:
    assert same(10**400, 10**400)
    assert not same(10**400, 1.0)
    assert grade("4.5", lambda lens: 10**400).state == "not yet"


def test_a_hang_is_cut_even_where_exceptions_are_swallowed() -> None:
    outcome = grade("3.1", swallows, seconds=0.5)
    assert outcome.state == "not yet"
    assert "did not end within 0.5 seconds" in outcome.text


def test_elsewhere_there_is_no_limit_and_no_error() -> None:
    said: list[str] = []

    def work() -> None:
        with time_limit(0.001):
            said.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == ["done"]


def test_the_time_limit_gives_the_old_handler_back() -> None:
    import signal

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TooLong), time_limit(0.05):
        swallows()
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_unknown_exercises_are_told_about(capsys: pytest.CaptureFixture[str]) -> None:
    check.exercise_3_99(None)
    check.exercise_77_1(None)
    assert "there are: 1, 2, 3" in (out := capsys.readouterr().out)
    assert "'77' has no exercises" in out
    with pytest.raises(AttributeError, match=r"check\.exercise_3_2"):
        _ = check.exercise_three
    with pytest.raises(UsageError):
        hint("3.99")
    assert "exercise_3_2" in dir(check)


def test_a_notebook_shows_a_hint_as_the_sentence_it_is() -> None:
    from IPython.core.formatters import PlainTextFormatter

    told = hint("10.1")
    assert PlainTextFormatter()(told) == told
    assert told[0] not in "'\""


def test_arguments_are_copies() -> None:
    def spoils(turns: list[Any]) -> list[int]:
        turns.clear()
        return []

    assert grade("3.1", spoils).text == grade("3.1", lambda turns: []).text.replace("<lambda>", "spoils")


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(VALUES)
def test_a_value_is_the_same_as_itself_and_differs_in_words_from_another(value: Any) -> None:
    seen = plain(value)
    assert same(seen, plain(value))
    assert not same(seen, [seen])
    assert difference(seen, [seen, 1])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=6))
def test_arrays_tuples_and_lists_are_the_same(numbers: list[float]) -> None:
    assert same(plain(np.array(numbers)), plain(tuple(numbers)))
    assert same(plain({"a": np.array(numbers)}), plain({"a": numbers}))


@pytest.mark.parametrize(
    ("mine", "right", "words"),
    [
        (3, 2, "3 is too large"),
        ([1, 2], [1, 2, 3], "3 entries are wanted, these are 2"),
        ([1, [2, 9]], [1, [2, 3]], "entry 1: entry 1: 9 is too large"),
        ({"a": 1}, {"a": 1, "b": 2}, "the key 'b' is missing"),
        ({"a": 1, "c": 2}, {"a": 1}, "nobody asked for the key 'c'"),
        ("ab", "abc", "stops too early"),
        ("abcd", "abc", "goes on where it should end"),
        ("abx", "aby", "right up to 'ab'"),
        (None, [1], "this is nothing"),
        ("1", 1, "a number is wanted, and this is a text"),
        (math.nan, 1.0, "not a number"),
        (True, False, "True is not right"),
    ],
)
def test_differences_in_words(mine: Any, right: Any, words: str) -> None:
    assert not same(mine, right)
    assert words in difference(mine, right)


def test_endless_nesting_is_refused() -> None:
    with pytest.raises(Wrong, match="nested"):
        plain(Endless())
