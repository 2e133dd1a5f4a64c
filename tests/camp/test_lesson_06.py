"""Lesson 06's exercises: right answers pass, typical wrong ones are told what differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minituner.camp import check, hint
from minituner.camp import lesson_06 as given

WEIGHTS, LOGSUMEXP = 32 * 4096 * 4096 * 2, 32 * 4096 * 4
ARGUMENTS = {"cu_seq_q": [0, 3, 8, 10], "max_q": 5, "window_size": (3, 0)}


def merge(a: given.State, b: given.State) -> given.State:
    m = np.maximum(a[0], b[0])
    fa, fb = np.exp(a[0] - m), np.exp(b[0] - m)
    return m, a[1] * fa + b[1] * fb, a[2] * fa + b[2] * fb


def without_rescaling(a: given.State, b: given.State) -> given.State:
    return np.maximum(a[0], b[0]), a[1] + b[1], a[2] + b[2]


def sum_only(a: given.State, b: given.State) -> given.State:
    m, total, _ = merge(a, b)
    return m, total, a[2] + b[2]


def without_maximum(a: given.State, b: given.State) -> given.State:
    m = np.maximum(a[0], b[0])
    raw = a[1] * np.exp(a[0]) + b[1] * np.exp(b[0])  # overflows where scores are large
    return m, raw / np.exp(m), (a[2] * np.exp(a[0]) + b[2] * np.exp(b[0])) / np.exp(m)


A, B = np.arange(20, 30), np.arange(100, 104)


def leaks(call: given.Call) -> bool:
    row, other_a, other_b = call([A, B]), call([A + 5, B]), call([A, B + 5])
    behind, in_front = row[len(A) :] - other_a[len(A) :], row[: len(A)] - other_b[: len(A)]
    return max(behind.abs().max().item(), in_front.abs().max().item()) > 1e-4


def looks_behind_only(call: given.Call) -> bool:
    return bool((call([A, B])[len(A) :] - call([A + 5, B])[len(A) :]).abs().max() > 1e-4)


def looks_in_front_only(call: given.Call) -> bool:
    return bool((call([A, B])[: len(A)] - call([A, B + 5])[: len(A)]).abs().max() > 1e-4)


def looks_everywhere(call: given.Call) -> bool:
    return bool((call([A, B]) - call([A + 5, B])).abs().max() > 1e-4)  # a document moves when it is changed itself


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("06.1", merge),
        ("06.2", {"weights": WEIGHTS, "logsumexp": LOGSUMEXP}),
        ("06.3", ARGUMENTS),
        ("06.3", {**ARGUMENTS, "cu_seq_q": np.array([0, 3, 8, 10], dtype=np.int32), "window_size": [3, 0]}),
        ("06.4", 19),
        ("06.5", leaks),
    ],
)
def test_right_answers_pass(key: str, answer: Any) -> None:
    assert check(key, answer), check(key, answer).text


@pytest.mark.parametrize(
    ("key", "answer", "words"),
    [
        ("06.1", without_rescaling, "the sum is not that of all scores together"),
        ("06.1", sum_only, "the weighted sum is not"),
        ("06.1", without_maximum, "not finite for scores around 2000"),
        ("06.1", lambda a, b: merge(a, b)[:2], "three things"),
        ("06.1", lambda a, b: (*merge(a, b)[:2], 0.0), "has the shape ()"),
        ("06.1", merge(given.state(np.ones(2), np.ones((2, 2))), given.state(np.ones(2), np.ones((2, 2)))), "itself"),
        ("06.2", {"weights": WEIGHTS // 32, "logsumexp": LOGSUMEXP}, "that is one head"),
        ("06.2", {"weights": WEIGHTS // 2, "logsumexp": LOGSUMEXP}, "asked are bytes"),
        ("06.2", {"weights": 1.07, "logsumexp": LOGSUMEXP}, "each pair of tokens"),
        ("06.2", {"weights": WEIGHTS, "logsumexp": LOGSUMEXP // 2}, "each of bytes_per_logsumexp"),
        ("06.2", WEIGHTS, "with a dictionary"),
        ("06.3", {**ARGUMENTS, "window_size": (4, 0)}, "4 tokens back and the token itself are 5"),
        ("06.3", {**ARGUMENTS, "window_size": (-1, 0)}, "sees everything back"),
        ("06.3", {**ARGUMENTS, "window_size": (3, 3)}, "not causal"),
        ("06.3", {**ARGUMENTS, "max_q": 10}, "the whole row"),
        ("06.3", {**ARGUMENTS, "max_q": 3}, "the longest document"),
        ("06.3", {**ARGUMENTS, "cu_seq_q": [3, 8, 10]}, "begins with 0"),
        ("06.3", [0, 3, 8, 10], "with a dictionary"),
        ("06.4", 28, "one causal row"),
        ("06.4", 30, "above the diagonal"),
        ("06.4", 12, "a begun tile is a tile"),
        ("06.5", looks_behind_only, "the first document hears of the second leaks"),
        ("06.5", looks_in_front_only, "call B (sdpa, position_ids that restart, use_cache not mentioned) leaks"),
        ("06.5", looks_everywhere, "call A (sdpa, position_ids that restart, use_cache=False) keeps documents apart"),
        ("06.5", lambda call: False, "does not notice"),
        ("06.5", True, "the function itself"),
    ],
)
def test_wrong_answers_are_told_what_differs(key: str, answer: Any, words: str) -> None:
    outcome = check(key, answer)
    assert not outcome
    assert words in outcome.text


@pytest.mark.parametrize("key", [f"06.{number}" for number in given.EXERCISES])
def test_no_answer_yet_and_hints(key: str) -> None:
    assert check(key, None).text.startswith("no answer yet")
    assert hint(key)


def test_tiles_are_those_that_the_picture_counts() -> None:
    viz = pytest.importorskip("minituner.viz.cost")
    assert check("06.4", len(viz.tiles(given.DOCUMENTS, given.BLOCK).data["tiles"]))


def test_calls_that_leak_leak_by_far_and_the_others_not_at_all() -> None:
    moved = {name: given.movement(call) for name, call in given.calls(given.tiny_llama()).items()}
    assert all(moved.pop(letter) > 0.1 for letter in "BCD")
    assert moved.pop("the one that hears ahead") > 0.01
    assert set(moved) == set("AEF")
    assert max(moved.values()) < 1e-5
    assert moved["E"] == 0.0


def test_what_the_attention_lets_through() -> None:
    back = np.subtract.outer(np.arange(6), np.arange(6))
    assert (given.visible(6, None) == (back >= 0)).all()
    assert (given.visible(6, 3) == ((back >= 0) & (back < 3))).all()
