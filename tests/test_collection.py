"""Garbage collection sleeps while a program starts, and never longer; it is seldom in a command, but it comes."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from minituner.collection import collect_seldom, collection_paused


@pytest.fixture(params=[True, False], ids=["was on", "was off"])
def before(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Collection as somebody had set it."""
    (gc.enable if request.param else gc.disable)()
    yield request.param
    gc.enable()


def test_paused_within_and_as_it_was_afterwards(before: bool) -> None:
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() == before


def test_as_it_was_after_an_error_too(before: bool) -> None:
    with pytest.raises(KeyError), collection_paused():
        raise KeyError
    assert gc.isenabled() == before


class Knot:
    """Refers to itself: only collection can take it away."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture
def seldom() -> Iterator[None]:
    """Collection as in a command, and the session's own afterwards."""
    before = gc.get_threshold()
    collect_seldom()
    yield
    gc.set_threshold(*before)


@pytest.mark.usefixtures("seldom")
def test_seldom_is_not_never() -> None:
    gc.collect()
    knots = [Knot() for _ in range(30_000)]
    first = weakref.ref(knots[0])
    knots.clear()
    assert first() is not None, "30,000 are too few to look for them"
    kept = [[] for _ in range(100_000)]
    assert first() is None
    assert len(kept) == 100_000


def test_a_command_collects_seldom_and_whoever_imports_it_as_ever() -> None:
    code = (
        "import gc, sys; from minituner import cli; before = gc.get_threshold(); sys.argv = ['minituner', '--help']\n"
        "try: cli.console()\n"
        "except SystemExit: print(before, gc.get_threshold())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "(700, 10, 10) (100000, 50, 1000)"
