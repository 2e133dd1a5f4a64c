"""Lesson 07's exercises: right answers pass, typical wrong ones are told what differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minituner.camp import check, hint
from minituner.camp import lesson_07 as given


def reduce_scatter(rows: list[np.ndarray], rank: int) -> np.ndarray:
    return np.split(sum(rows), len(rows))[rank]


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("07.1", 7 * (2 + 2 / 8 + 12 / 8)),
        ("07.2", [0, 1, 2, 3]),
        ("07.3", [1.2, 0.4, 0.0, 2.4]),
        ("07.4", reduce_scatter),
        ("07.5", 3 * 4 / 2),
        ("07.6", {"outside": (3, 8), "inside": (12, 2)}),
        ("07.6", {"outside": [3, 8], "inside": [12, 2]}),
    ],
)
def test_right_answers_pass(key: str, answer: Any) -> None:
    assert check(key, answer)


@pytest.mark.parametrize(
    ("key", "answer", "words"),
    [
        ("07.1", 112, "stage 0"),
        ("07.1", 14, "stage 3"),
        ("07.1", 26.25 * 1e9 / 2**30, "1 GB is 1e9 bytes"),
        ("07.1", 7 * (4 + 4 / 8 + 8 / 8), "or stage 2 in float32"),
        ("07.1", 3, "2 (weights, whole)"),
        ("07.2", [0, 0, 2, 3], "stage 0 takes 112.00 GB"),
        ("07.2", [0, 2, 2, 3], "so does a smaller stage"),
        ("07.2", [0, 1, 2], "4 rooms"),
        ("07.2", [0, 1, 2, 4], "no ZeRO stage"),
        ("07.3", [0.3, 0.1, 0, 0.6], "averaged, which divides"),
        ("07.3", [1, 1, 1, 1], "mean of means"),
        ("07.3", [1.2, 0.4, 1, 2.4], "rank 2: its 0 of 100"),
        ("07.3", [1.2, 0.4], "4 factors"),
        ("07.4", lambda rows, rank: sum(rows), "an all-reduce"),
        ("07.4", lambda rows, rank: reduce_scatter(rows, rank) / len(rows), "the mean over ranks"),
        ("07.4", lambda rows, rank: np.split(rows[rank], len(rows))[rank], "summed over all rows"),
        ("07.4", lambda rows, rank: np.split(sum(rows), len(rows))[rank - 1], "the part is"),
        ("07.4", [1, 2], "the function itself"),
        ("07.5", 1.5, "right for one micro-batch"),
        ("07.5", 1 / 6, "the other way round"),
        ("07.5", 4, "count passes"),
        ("07.6", {"outside": (12, 2), "inside": (3, 8)}, "exchanged"),
        ("07.6", {"outside": (3, 8), "inside": (3, 2)}, "inside attention the heads are cut"),
        ("07.6", (3, 8), "with a dictionary"),
    ],
)
def test_wrong_answers_are_told_what_differs(key: str, answer: Any, words: str) -> None:
    outcome = check(key, answer)
    assert not outcome
    assert words in outcome.text


def test_the_stages_of_the_exercise_are_all_needed() -> None:
    assert [next(s for s in range(4) if given.gigabytes(s) <= room) for room in given.ROOMS] == [0, 1, 2, 3]


@pytest.mark.parametrize("key", [f"07.{number}" for number in given.EXERCISES])
def test_no_answer_yet_and_hints(key: str) -> None:
    assert check(key, None).text.startswith("no answer yet")
    assert hint(key)
