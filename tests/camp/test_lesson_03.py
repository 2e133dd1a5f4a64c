"""Lesson 03's exercises: right answers pass, typical wrong ones are told what differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minituner.camp import check, hint
from minituner.camp import lesson_03 as given

RIGHT_LABELS = [-100, -100, -100, 81, 82, 2, -100, -100, -100, 83, 2, -100]
RIGHT_SHIFT = [-100, 81, 2, -100, 83, 2, -100]


def by_length(labels: np.ndarray, lengths: list[int]) -> np.ndarray:
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    return labels


def by_id(labels: np.ndarray, lengths: list[int]) -> np.ndarray:
    return np.where(labels == given.STOP, -100, labels)


def test_the_given_documents_are_what_the_notebook_says() -> None:
    assert given.document().labels.tolist() == RIGHT_LABELS
    assert len(given.long_document()) == sum(given.LONG.values())
    assert any("呢" in message.text for message in given.CHAT.messages)


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("03.1", RIGHT_LABELS),
        ("03.1", np.array(RIGHT_LABELS)),
        ("03.2", RIGHT_SHIFT),
        ("03.3", by_length),
        ("03.4", [True, False, None]),
        ("03.4", [True, None, True]),
        ("03.5", {"trained": 9, "masked": 23, "truncated": 7}),
    ],
)
def test_right_answers_pass(key: str, answer: Any) -> None:
    assert check(key, answer)


@pytest.mark.parametrize(
    ("key", "answer", "words"),
    [
        ("03.1", RIGHT_LABELS[:-1], "one number for each of the 12 tokens"),
        ("03.1", [*RIGHT_LABELS[1:], -100], "shifted already"),
        ("03.1", [-100 if label == 2 else label for label in RIGHT_LABELS], "the stop token"),
        ("03.1", given.document().input_ids.tolist(), "nobody asks the model to produce it"),
        ("03.1", [-100] * 12, "its label is its own id"),
        ("03.2", [-100, -100, 81, 2, 82, 83, 2], "before the shift"),
        ("03.2", [-100, 81, 2, 82, 83, 2, -100], "must not predict the next document"),
        ("03.2", [-100, 81, 2, -100, 83, 2, 2], "nothing comes after"),
        ("03.3", by_id, "the stop token at position 3 is real text"),
        ("03.3", lambda labels, lengths: labels, "still has labels"),
        ("03.3", [[1]], "the function itself"),
        ("03.3", lambda labels, lengths: labels[:1], "of the shape you were given"),
        ("03.4", [None, None, None], "'4' is not trained"),
        ("03.4", [True, True, True], "'7' is trained"),
        ("03.4", [True, False], "each of the 3 assistant messages"),
        ("03.5", {"trained": 15, "masked": 17, "truncated": 7}, "trained is off by 6"),
        ("03.5", {"trained": 15, "masked": 24, "truncated": 7}, "must add up"),
        ("03.5", {"trained": 9}, "missing: masked, truncated"),
        ("03.5", 9, "with a dictionary"),
    ],
)
def test_wrong_answers_are_told_what_differs(key: str, answer: Any, words: str) -> None:
    outcome = check(key, answer)
    assert not outcome
    assert words in outcome.text


@pytest.mark.parametrize("key", [f"03.{number}" for number in given.EXERCISES])
def test_no_answer_yet_and_hints(key: str) -> None:
    assert check(key, ...).text.startswith("no answer yet")
    assert hint(key)
