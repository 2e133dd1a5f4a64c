"""Lesson 05's levels are those of the quantiser that training uses."""

from __future__ import annotations

import pytest

from minituner.camp import lesson_05 as given


def test_levels_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs the quantization extra")
    theirs = functional.get_4bit_type("nf4", device="cpu").numpy()
    assert len(given.NF4_LEVELS) == 16
    assert list(given.NF4_LEVELS) == pytest.approx(theirs.tolist(), abs=2e-7)
    assert given.NF4_LEVELS[7] == 0.0
