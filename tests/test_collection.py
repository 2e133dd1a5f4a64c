"""Garbage collection sleeps while a program starts, and never longer."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from minituner.collection import collection_paused


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
