"""Lesson 04's exercises: right answers pass, typical wrong ones are told what differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minituner.camp import check, hint
from minituner.camp import lesson_04 as given

BEST_FIT = [[1, 4], [5, 0], [3, 6, 2]]
POSITIONS = [0, 1, 2, 0, 1, 0, 1, 2, 3]
DOCUMENT = np.repeat([0, 1, 2], given.ROW)
SAME = DOCUMENT[:, None] == DOCUMENT[None, :]
CAUSAL = np.tri(len(DOCUMENT), dtype=bool)


def seq_lens_of(position_ids: np.ndarray) -> np.ndarray:
    starts = np.flatnonzero(position_ids == 0)
    return np.diff(np.append(starts, len(position_ids)))


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("04.1", BEST_FIT),
        ("04.1", [[2, 6, 3], [0, 5], [4, 1]]),  # packs and records in another order
        ("04.2", {"position_ids": POSITIONS, "cu_seqlens": [0, 3, 5, 9]}),
        ("04.3", SAME & CAUSAL),
        ("04.3", (SAME & CAUSAL).astype(int).tolist()),
        ("04.4", seq_lens_of),
        ("04.5", 1000**2 / (100**2 + 300**2 + 600**2)),
    ],
)
def test_right_answers_pass(key: str, answer: Any) -> None:
    assert check(key, answer)


@pytest.mark.parametrize(
    ("key", "answer", "words"),
    [
        ("04.1", BEST_FIT[:-1], "missing: [2, 3, 6]"),
        ("04.1", [[1, 2], [5, 0], [3, 4, 6]], "not the packs of best-fit"),
        ("04.1", [[1, 4], [5, 0], [3, 6, 2], [2]], "twice: [2]"),
        ("04.1", [[1, 5], [0, 4], [3, 6, 2]], "pack 0 holds 13 tokens"),
        ("04.1", [[i] for i in range(7)], "best-fit needs fewer"),
        ("04.1", [[0, 2, 4], [1, 6], [3], [5], [9]], "not a record number: [9]"),
        ("04.2", {"position_ids": list(range(9)), "cu_seqlens": [0, 3, 5, 9]}, "run on through the row"),
        ("04.2", {"position_ids": POSITIONS[:-1], "cu_seqlens": [0, 3, 5, 9]}, "9 numbers are needed"),
        ("04.2", {"position_ids": POSITIONS, "cu_seqlens": [3, 5, 9]}, "one entry more"),
        ("04.2", {"position_ids": POSITIONS, "cu_seqlens": [0, 3, 2, 4]}, "entry 2 is wrong"),
        ("04.2", POSITIONS, "with a dictionary"),
        ("04.3", CAUSAL, "token 3 (document 1) sees token 0 (document 0): a leak"),
        ("04.3", SAME, "comes later"),
        ("04.3", np.eye(9), "your mask hides it"),
        ("04.3", np.eye(4), "the shape (9, 9)"),
        ("04.4", lambda position_ids: [len(position_ids)], "come from seq_lens [3, 2, 4]"),
        ("04.4", [3, 2, 4], "the function itself"),
        ("04.5", 0.46, "the share which remains"),
        ("04.5", 3, "the square of the sum"),
    ],
)
def test_wrong_answers_are_told_what_differs(key: str, answer: Any, words: str) -> None:
    outcome = check(key, answer)
    assert not outcome
    assert words in outcome.text


@pytest.mark.parametrize("key", [f"04.{number}" for number in given.EXERCISES])
def test_no_answer_yet_and_hints(key: str) -> None:
    assert check(key, None).text.startswith("no answer yet")
    assert hint(key)
