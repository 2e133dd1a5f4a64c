"""Lesson 08's exercises: right answers pass, typical wrong ones are told what differs."""

from __future__ import annotations

from typing import Any

import pytest

from minituner.camp import check, hint
from minituner.camp import lesson_08 as given

PARAMETERS = 6_738_415_616  # Llama 2 7B, as published
EMBEDDING = 32_000 * 4_096


def per_rank(p: int, w: int, stage: int) -> float:
    return 4 * p / (w if stage >= 3 else 1) + 4 * p / (w if stage >= 2 else 1) + 8 * p / (w if stage >= 1 else 1)


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("08.1", PARAMETERS),
        ("08.2", 24),
        ("08.3", 25.757),
        ("08.4", 4096 * 151_936 * 4 / 1e9),
        ("08.5", per_rank),
    ],
)
def test_right_answers_pass(key: str, answer: Any) -> None:
    outcome = check(key, answer)
    assert outcome, outcome


@pytest.mark.parametrize(
    ("key", "answer", "words"),
    [
        ("08.1", PARAMETERS - EMBEDDING, "two matrices"),
        ("08.1", PARAMETERS - 2 * EMBEDDING, "are missing"),
        ("08.1", PARAMETERS - 32 * 4096 * 11_008, "three matrices"),
        ("08.1", 1e10, "more than"),
        ("08.2", 6, "weights alone"),
        ("08.2", 12, "averages are missing"),
        ("08.2", 18, "one of the four"),
        ("08.2", 24e9, "divide by 1e9"),
        ("08.2", 16 * 1.5e9 / 2**30, "GiB"),
        ("08.2", 30, "too much"),
        ("08.3", 24.564, "not a MB"),
        ("08.3", 24_564 / 1024, "in GiB"),
        ("08.3", 24_564 * 1e6 / 2**30, "other way round"),
        ("08.3", 20, "too little"),
        ("08.4", 4096 * 151_936 / 1e9, "counts numbers"),
        ("08.4", 4096 * 151_936 * 2 / 1e9, "4 bytes"),
        ("08.4", 151_936 * 4 / 1e9, "one position"),
        ("08.4", 9, "too much"),
        ("08.5", 16, "the function itself"),
        ("08.5", lambda p, w, stage: 16 * p / w, "every rank has everything"),
        ("08.5", lambda p, w, stage: 8 * p, "averages are missing"),
        ("08.5", lambda p, w, stage: per_rank(p, w, max(0, stage - 1)), "cuts one part more"),
        ("08.5", lambda p, w, stage: 7 * p, "by the formula"),
        ("08.5", lambda p: p, "could not use this answer"),
    ],
)
def test_wrong_answers_are_told_what_differs(key: str, answer: Any, words: str) -> None:
    outcome = check(key, answer)
    assert not outcome
    assert words in outcome.text


@pytest.mark.parametrize("key", [f"08.{number}" for number in given.EXERCISES])
def test_no_answer_yet_and_hints(key: str) -> None:
    assert check(key, None).text.startswith("no answer yet")
    assert hint(key)
