"""Lesson 05's exercises: right answers pass, typical wrong ones are told what differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minituner.camp import check, hint
from minituner.camp import lesson_05 as given

COUNT = 4 * (576 + 576 + 192 + 576 + 576 + 1536)
INDICES = [10, 0, 8, 13, 3, 7]
BASE = (6.5e9 * 4.127 / 8 + 0.3e9 * 2) / 1e9


def merged(weight: np.ndarray, a: np.ndarray, b: np.ndarray, alpha: float) -> np.ndarray:
    return weight + alpha / a.shape[0] * (b @ a)


def merged_in_place(weight: np.ndarray, a: np.ndarray, b: np.ndarray, alpha: float) -> np.ndarray:
    weight += alpha / a.shape[0] * (b @ a)
    return weight


def unpack(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)


def test_levels_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs the quantization extra")
    theirs = functional.get_4bit_type("nf4", device="cpu").numpy()
    assert len(given.NF4_LEVELS) == 16
    assert list(given.NF4_LEVELS) == pytest.approx(theirs.tolist(), abs=2e-7)
    assert given.NF4_LEVELS[7] == 0.0


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("05.1", COUNT),
        ("05.2", merged),
        ("05.2", lambda weight, a, b, alpha: (weight + alpha / len(a) * b @ a).tolist()),
        ("05.3", {"absmax": 1.2, "indices": INDICES}),
        ("05.3", {"absmax": np.float32(1.2).item(), "indices": np.array(INDICES)}),
        ("05.4", unpack),
        ("05.4", lambda packed: [half for byte in packed for half in divmod(int(byte), 16)]),
        ("05.5", BASE + 40e6 * 16 / 1e9),
        ("05.5", 4.6),
    ],
)
def test_right_answers_pass(key: str, answer: Any) -> None:
    outcome = check(key, answer)
    assert outcome, outcome


@pytest.mark.parametrize(
    ("key", "answer", "words"),
    [
        ("05.1", 576 * 576 + 192 * 576 + 576 * 1536, "stay frozen"),
        ("05.1", 4 * (576 + 576 + 1536), "B is trained too"),
        ("05.1", 4 * (576 + 192 + 576), "A is trained too"),
        ("05.1", 2 * COUNT, "one A and one B"),
        ("05.1", COUNT + 1, "more than A"),
        ("05.2", lambda w, a, b, alpha: w + b @ a, "alpha / r is missing"),
        ("05.2", lambda w, a, b, alpha: w + alpha * (b @ a), "you scale by alpha"),
        ("05.2", lambda w, a, b, alpha: w + alpha / a.shape[0] ** 0.5 * (b @ a), "rsLoRA"),
        ("05.2", lambda w, a, b, alpha: w + alpha / a.shape[1] * (b @ a), "not of its columns"),
        ("05.2", lambda w, a, b, alpha: w + alpha / w.shape[0] * (b @ a), "not of W"),
        ("05.2", lambda w, a, b, alpha: a @ w.T, "keeps its shape"),
        ("05.2", lambda w, a, b, alpha: a @ b, "could not use this answer"),
        ("05.2", lambda w, a, b, alpha: w, "is not W @ x"),
        ("05.2", merged_in_place, "changes the W"),
        ("05.2", np.eye(3), "the function itself"),
        ("05.3", {"absmax": 0.62, "indices": INDICES}, "absolute"),
        ("05.3", {"absmax": 2, "indices": INDICES}, "absmax"),
        ("05.3", {"absmax": 1.2, "indices": [11, 0, 8, 13, 2, 7]}, "divide by absmax before"),
        ("05.3", {"absmax": 1.2, "indices": INDICES[:-1]}, "6 indices"),
        ("05.3", {"absmax": 1.2, "indices": [10, 0, 8, 13, 3, 8]}, "value 5"),
        ("05.3", INDICES, "with a dictionary"),
        ("05.4", lambda packed: np.stack([packed & 15, packed >> 4], 1).reshape(-1), "yours comes second"),
        ("05.4", lambda packed: np.concatenate([packed >> 4, packed & 15]), "side by side"),
        ("05.4", lambda packed: packed, "2 indices; yours gives 1"),
        ("05.4", lambda packed: np.zeros(2 * len(packed), int), "yours gives [0"),
        ("05.4", [9, 4], "the function itself"),
        ("05.5", 6.8 * 16, "full fine-tuning"),
        ("05.5", BASE, "now the LoRA numbers"),
        ("05.5", BASE + 40e6 * 4 / 1e9, "gradients and AdamW"),
        ("05.5", BASE + 40e6 * 8 / 1e9, "AdamW's two averages are missing"),
        ("05.5", (6.8e9 * 4.127 / 8 + 40e6 * 16) / 1e9, "are not quantised"),
        ("05.5", 8 * (BASE + 40e6 * 16 / 1e9), "gigabits"),
        ("05.5", 4.6e9, "divide by 1e9"),
        ("05.5", 5.5, "too much"),
    ],
)
def test_wrong_answers_are_told_what_differs(key: str, answer: Any, words: str) -> None:
    outcome = check(key, answer)
    assert not outcome
    assert words in outcome.text


@pytest.mark.parametrize("key", [f"05.{number}" for number in given.EXERCISES])
def test_no_answer_yet_and_hints(key: str) -> None:
    assert check(key, None).text.startswith("no answer yet")
    assert hint(key)
