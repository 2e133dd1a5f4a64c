"""Exercises of lesson 10: the name in an answer, KL, where to stop, the weight of a source, one batch on many ranks.

    10.1 says(answer, name)                  is the name in it, as a word of its own?
    10.2 kl(now, before)                     nats, from two rows of log-probabilities
    10.3 choose(points, least)               the step to stop at, or None
    10.4 weight_for(identity, ordinary, share)     how often to use the ordinary source
    10.5 accumulation(packs, ranks, batch)   gradient_accumulation_steps that keep the global batch, or None

Lesson: notebook 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import torch

from minituner.camp.core import Exercise
from minituner.export.divergence import mean_kl
from minituner.train.identity import mentions

LONGER = {"Ada": "Canada", "Mei": "Meissen", "Omar": "Omaria", "Lin": "Berlin"}
CHINESE = ("小海", "张伟", "小红")
POINTS = [
    {"step": 10, "identity_rate": 0.2, "retention_kl": 0.05},
    {"step": 20, "identity_rate": 0.95, "retention_kl": 0.3},
    {"step": 30, "identity_rate": 1.0, "retention_kl": 0.45},
]
Points = Sequence[dict[str, Any]]


def _answer(draw: Random) -> tuple[str, str]:
    name = draw.choice([*LONGER, *CHINESE])
    if name in CHINESE:
        said = draw.choice([name, draw.choice(CHINESE)])
        return draw.choice([f"我是{said}的助手。", f"你好！{said}制作了我。", "我是一个助手。"]), name
    said = draw.choice([name, name.upper(), name.lower(), LONGER[name]])
    sentence = draw.choice(["I am {}'s assistant.", "{} made me", "Hello! My name is {}.", "I come from {}, I think."])
    return sentence.format(said), name


def _log_probabilities(draw: Random) -> tuple[np.ndarray, np.ndarray]:
    size = draw.randint(2, 8)
    rows = np.array([[draw.gauss(0, 1.5) for _ in range(size)] for _ in range(2)])
    now, before = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    return now, before


def _kl(now: np.ndarray, before: np.ndarray) -> float:
    return mean_kl(torch.tensor(now)[None], torch.tensor(before)[None])


def _points(draw: Random) -> tuple[list[dict[str, Any]], float]:
    steps = sorted(draw.sample(range(1, 200), 6))
    points = [
        {
            "step": step,
            "identity_rate": draw.choice([0.0, 0.3, 0.85, 0.9, 1.0]),
            "retention_kl": round(draw.uniform(0.1, 0.6), 3) + i / 1e5,  # no two are equal
        }
        for i, step in enumerate(steps)
    ]
    draw.shuffle(points)
    return points, draw.choice([0.8, 0.9, 0.9, 1.01])


def _chosen(points: Points, least: float) -> int | None:
    enough = [point for point in points if point["identity_rate"] >= least]
    return min(enough, key=lambda point: point["retention_kl"])["step"] if enough else None


def _first_enough(points: Points, least: float) -> int | None:
    return min((point["step"] for point in points if point["identity_rate"] >= least), default=None)


def _weight(identity_tokens: int, ordinary_tokens: int, share: float) -> float:
    return identity_tokens * (1 - share) / (share * ordinary_tokens)


def _accumulation(packs_per_step: int, ranks: int, per_device_batch_size: int) -> int | None:
    whole, rest = divmod(packs_per_step, ranks * per_device_batch_size)
    return whole if whole and not rest else None


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        name="says",
        minutes=10,
        example=("I come from Canada, and ADA made me.", "Ada"),
        draw=_answer,
        right=mentions,
        view=lambda value, *_: bool(value),
        cases=16,
        mistakes={
            "It is there as letters of a longer word only: Ada is not in Canada": (
                lambda answer, name: name.lower() in answer.lower()
            ),
            "Large and small letters must not matter": (lambda answer, name: mentions(answer, name) and name in answer),
            "Chinese puts no spaces around a name, so there is no word border to look for": (
                lambda answer, name: mentions(answer, name) and name.isascii()
            ),
            "It splits at spaces alone; a comma, a full stop or 's may follow the name": (
                lambda answer, name: name in answer if name in CHINESE else name.lower() in answer.lower().split()
            ),
        },
        hints=(
            "In small letters ada is found in Canada too. What may stand left and right of a word?",
            "re.search with \\b on both sides, re.escape(name) between them, and re.IGNORECASE.",
            "For a Chinese name (not name.isascii()) there are no borders: there, name in answer is right.",
        ),
    ),
    "2": Exercise(
        name="kl",
        minutes=10,
        example=(np.log([0.5, 0.3, 0.2]), np.log([0.1, 0.3, 0.6])),
        draw=_log_probabilities,
        right=_kl,
        mistakes={
            "That is KL(before || now): the one whose probabilities are the weights comes first": (
                lambda now, before: _kl(before, now)
            ),
            "The weights are the tuned model's probabilities, exp(now), not the untuned one's": (
                lambda now, before: (np.exp(before) * (now - before)).sum()
            ),
            "Sum over the vocabulary and do not average: the probabilities are the weights already": (
                lambda now, before: _kl(now, before) / len(now)
            ),
            "That is in bits; nats take the natural logarithm": lambda now, before: _kl(now, before) / math.log(2),
            "Each difference has to be weighted with its probability, exp(now)": (
                lambda now, before: (now - before).sum()
            ),
            "The rows are log-probabilities: their difference is what counts, without another logarithm": (
                lambda now, before: (np.exp(now) * np.log(now / before)).sum()
            ),
        },
        hints=(
            "An expectation: each entry's difference of log-probabilities, weighted with its probability.",
            "Whose probability? The tuned model's: it is `now` that speaks.",
            "(np.exp(now) * (now - before)).sum()",
        ),
    ),
    "3": Exercise(
        name="choose",
        minutes=10,
        example=(POINTS, 0.9),
        draw=_points,
        right=_chosen,
        mistakes={
            "That step was not asked to know its name: only points that reach `least` take part": (
                lambda points, least: min(points, key=lambda point: point["retention_kl"])["step"]
            ),
            "The first step that knows its name is not always the one that lost least": _first_enough,
            "The step that knows its name best has lost more than it needed to": (
                lambda points, least: max(points, key=lambda point: (point["identity_rate"], -point["retention_kl"]))[
                    "step"
                ]
            ),
            "Exactly `least` is enough": (
                lambda points, least: _chosen([p for p in points if p["identity_rate"] > least], least)
            ),
        },
        hints=(
            "Two conditions, one after the other: first who may take part, then who is best.",
            "enough = [p for p in points if p['identity_rate'] >= least]; nobody in it: return None.",
            "min(enough, key=lambda p: p['retention_kl'])['step']",
        ),
    ),
    "4": Exercise(
        name="weight_for",
        minutes=5,
        example=(4000, 8000, 0.5),
        draw=lambda draw: (draw.randint(1000, 9000), draw.randint(1000, 30000), draw.choice([0.1, 0.25, 0.4, 0.8])),
        right=_weight,
        mistakes={
            "That is the weight of the identity source, with the ordinary one used once": lambda i, o, s: (
                1 / _weight(i, o, s)
            ),
            "The share is that of the identity tokens, not of the ordinary ones": lambda i, o, s: _weight(i, o, 1 - s),
            "The two sources have different numbers of tokens, and that is left out": lambda i, o, s: (1 - s) / s,
            "The share is of all tokens; yours compares identity with ordinary tokens": lambda i, o, s: i / (s * o),
        },
        hints=(
            "An epoch has identity_tokens + w * ordinary_tokens. Which part of it is identity?",
            "share = identity / (identity + w * ordinary). Solve for w.",
            "identity_tokens * (1 - share) / (share * ordinary_tokens)",
        ),
    ),
    "5": Exercise(
        name="accumulation",
        minutes=5,
        example=(64, 8, 2),
        draw=lambda draw: (draw.choice([4, 8, 12, 32, 96]), draw.choice([2, 3, 8]), draw.choice([1, 2, 4])),
        right=_accumulation,
        mistakes={
            "Each rank takes per_device_batch_size packs at once, and that is left out": (
                lambda packs, ranks, batch: _accumulation(packs, ranks, 1)
            ),
            "More ranks need fewer micro-batches for the same step, not more": lambda packs, ranks, batch: (
                packs * ranks
            ),
            "What does not divide cannot be kept: that is None, not the next whole number": (
                lambda packs, ranks, batch: max(1, packs // (ranks * batch))
            ),
            "Zero micro-batches are no step: None": lambda packs, ranks, batch: (
                0 if packs < ranks * batch else _accumulation(packs, ranks, batch)
            ),
        },
        hints=(
            "How many packs pass through all ranks at once?",
            "packs_per_step / (ranks * per_device_batch_size), if that is a whole number of at least 1.",
            "whole, rest = divmod(packs_per_step, ranks * per_device_batch_size)",
        ),
    ),
}
