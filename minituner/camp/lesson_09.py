"""Exercises of lesson 09: merging, what a merge costs, merging into a grid, what ends an answer, a full context.

    9.1 merged(weight, a, b, alpha)                     the layer that needs no adapter any more
    9.2 share_lost(base, trained, merged)               three models' probabilities -> KL(merge) / KL(training)
    9.3 kept(weights, updates, levels)                  which changes survive a merge into rounded weights
    9.4 stops(program, generation_config, tokenizer)    the ids that end an answer there
    9.5 first_sent(turns, message, answer, context)     the oldest turn that is still sent

Every right value is computed with the functions that merge, check and chat use. Lesson: notebook 09.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np

from minituner.camp.core import Exercise
from minituner.chat.session import Session
from minituner.data.conversation import Message
from minituner.errors import UsageError
from minituner.export.divergence import Divergence, mean_kl
from minituner.export.serving import PROGRAMS, ids_that_end

Rows = Sequence[Sequence[float]]
LEVELS = [-1.0, -0.5, -0.2, 0.0, 0.3, 0.6, 1.0]


def _merged(weight: np.ndarray, a: np.ndarray, b: np.ndarray, alpha: float) -> np.ndarray:
    """peft's own layer, merged."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    base.weight.data = torch.tensor(weight)
    layer = Linear(base, "default", LoraConfig(init_lora_weights=False), r=len(a), lora_alpha=alpha)
    layer.lora_A["default"].weight.data = torch.tensor(a)
    layer.lora_B["default"].weight.data = torch.tensor(b)
    layer.merge()
    return base.weight.detach().numpy()


def _layer(draw: Random) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    rows, columns, rank = draw.randint(2, 4), draw.randint(2, 4), draw.choice([2, 4])

    def matrix(height: int, width: int) -> np.ndarray:
        return np.array([[float(draw.randint(-3, 3)) for _ in range(width)] for _ in range(height)])

    return matrix(rows, columns), matrix(rank, columns), matrix(rows, rank), float(draw.choice([1, 8, 16]))


def _share(base: Rows, trained: Rows, merged: Rows) -> float:
    import torch

    b, t, m = (torch.tensor(rows, dtype=torch.float64).log() for rows in (base, trained, merged))
    return Divergence(mean_kl(m, t), mean_kl(t, b), len(trained)).ratio


def _rows_kl(p: Rows, q: Rows) -> list[float]:
    return [sum(x * math.log(x / y) for x, y in zip(a, b, strict=True)) for a, b in zip(p, q, strict=True)]


def _three(draw: Random) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    positions, words = draw.randint(1, 3), draw.randint(2, 4)

    def rows() -> list[list[float]]:
        drawn = [[draw.uniform(0.1, 1.0) for _ in range(words)] for _ in range(positions)]
        return [[value / sum(row) for value in row] for row in drawn]

    return rows(), rows(), rows()


def _kept(weights: Sequence[float], updates: Sequence[float], levels: Sequence[float]) -> list[bool]:
    """Which weights lie on another level after the sum is rounded to the grid of its own largest value."""
    return _moved(weights, updates, levels, _largest(weights), _largest(np.add(weights, updates)))


def _moved(
    weights: Sequence[float], updates: Sequence[float], levels: Sequence[float], scale: float, scale_after: float
) -> list[bool]:
    """The same with the scales given."""

    def places(values: np.ndarray) -> np.ndarray:
        return np.abs(values[:, None] - np.array(levels)).argmin(1)

    return (places(np.array(weights) / scale) != places(np.add(weights, updates) / scale_after)).tolist()


def _largest(values: Sequence[float] | np.ndarray) -> float:
    return float(np.abs(values).max())


def _block(draw: Random) -> tuple[list[float], list[float], list[float]]:
    """Weights that lie on their levels (scale 2), one of them the largest, and small updates that leave it alone."""
    places = [draw.randrange(len(LEVELS)) for _ in range(draw.randint(3, 5))]
    weights = [2.0, *(2 * LEVELS[place] for place in places)]
    return weights, [0.0, *(draw.choice([-1, 1]) * draw.choice([0.03, 0.1, 0.45, 0.9]) for _ in places)], LEVELS


def _ends(draw: Random) -> tuple[str, dict[str, Any], int]:
    one, two, three = draw.sample(range(2, 99), 3)
    listed = draw.choice([one, [one], [one, two], None])
    settings = {"do_sample": False} if listed is None else {"eos_token_id": listed}
    return draw.choice(PROGRAMS), settings, draw.choice([one, three])


def _first_sent(turns: Sequence[int], message: int, answer: int, context: int) -> int | None:
    """What chat's own session would send: each turn is two messages there."""
    lengths = [length for length in turns for _ in range(2)]
    history = [Message("user" if i % 2 == 0 else "assistant", "...") for i in range(len(lengths))]
    session = SimpleNamespace(
        first=0,
        messages=history,
        loaded=SimpleNamespace(context=context),
        say=lambda line: None,
        _ids=lambda text, first: range(sum(lengths[first::2]) + message),
    )
    try:
        Session._fitted(session, "...", answer)  # type: ignore[arg-type]
    except UsageError:
        return None
    return session.first // 2


def _conversation(draw: Random) -> tuple[list[int], int, int, int]:
    turns = [draw.randint(10, 60) for _ in range(draw.randint(2, 5))]
    message, answer = draw.randint(5, 20), draw.randint(10, 50)
    spare = draw.choice([0, 0, -1, 3])  # exactly full, one too many, some left
    return turns, message, answer, sum(turns[draw.randint(0, len(turns)) :]) + message + answer + spare


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        name="merged",
        minutes=5,
        example=(np.array([[1.0, 2.0], [0.0, -1.0]]), np.array([[1.0, -1.0]]), np.array([[2.0], [0.0]]), 2.0),
        draw=_layer,
        right=_merged,
        mistakes={
            "alpha counts as alpha / rank, and the rank is the number of rows of a": (
                lambda weight, a, b, alpha: weight + alpha * b @ a
            ),
            "That divides alpha by a side of the weight; the rank is the number of rows of a": (
                lambda weight, a, b, alpha: weight + alpha / len(weight) * b @ a
            ),
            "That is the update alone; it is added to the weight": lambda weight, a, b, alpha: alpha / len(a) * b @ a,
            "alpha is missing: the update counts alpha / rank times": lambda weight, a, b, alpha: weight + b @ a,
        },
        hints=(
            "The layer computes W x + (alpha / rank) B (A x). Which one matrix does the same to every x?",
            "B A has the shape of W: multiply them in that order. The rank is len(a).",
            "weight + alpha / len(a) * b @ a",
        ),
    ),
    "2": Exercise(
        name="share_lost",
        minutes=10,
        example=([[0.5, 0.5]], [[0.9, 0.1]], [[0.8, 0.2]]),
        draw=_three,
        right=_share,
        mistakes={
            "The first KL is KL(merged || trained): p, in front and as the weight of the mean, is the merged model": (
                lambda base, trained, merged: sum(_rows_kl(trained, merged)) / sum(_rows_kl(trained, base))
            ),
            "The effect of the training is KL(trained || base), in this order": (
                lambda base, trained, merged: sum(_rows_kl(merged, trained)) / sum(_rows_kl(base, trained))
            ),
            "That is the KL of the merge alone; it is asked as a share of what the training changed": (
                lambda base, trained, merged: sum(_rows_kl(merged, trained)) / len(base)
            ),
            "That compares the merged model with the base; what was lost is its distance from the trained one": (
                lambda base, trained, merged: sum(_rows_kl(merged, base)) / sum(_rows_kl(trained, base))
            ),
        },
        hints=(
            "KL(p || q) of one position is the sum of p * log(p / q). Two KLs are needed.",
            "What the merge changed: KL(merged || trained). What the training changed: KL(trained || base).",
            "Mean over positions of each, then the first divided by the second.",
        ),
    ),
    "3": Exercise(
        name="kept",
        minutes=10,
        example=([2.0, 0.6, -0.4, 0.0], [0.0, 0.1, 0.45, -0.1], LEVELS),
        draw=_block,
        right=_kept,
        mistakes={
            "Not every change survives: the sum goes back to the nearest level, often the one it came from": (
                lambda weights, updates, levels: [update != 0 for update in updates]
            ),
            "Levels are shares of the block's largest weight: divide by max(abs(...)) before looking for the nearest": (
                lambda weights, updates, levels: _moved(weights, updates, levels, 1.0, 1.0)
            ),
            "The sum has a largest weight of its own, and is divided by that one": (
                lambda weights, updates, levels: _moved(weights, updates, levels, _largest(weights), _largest(weights))
            ),
        },
        hints=(
            "Find the nearest level of each weight before and after. Where are they different?",
            "A block is divided by its largest absolute value first; after the sum that may be another one.",
            "def places(x): return np.abs(x[:, None] / np.abs(x).max() - np.array(levels)).argmin(1)",
        ),
    ),
    "4": Exercise(
        name="stops",
        minutes=10,
        example=("vLLM", {"eos_token_id": 7}, 2),
        draw=_ends,
        right=ids_that_end,
        mistakes={
            "vLLM and LMDeploy also stop on the tokenizer's own end token": (
                lambda program, generation_config, tokenizer: ids_that_end("transformers", generation_config, None)
            ),
            "transformers and its server do not look at the tokenizer's end token: only at generation_config": (
                lambda program, generation_config, tokenizer: ids_that_end("vLLM", generation_config, tokenizer)
            ),
        },
        hints=(
            "eos_token_id may be missing, one number, or a list. Make a set of it first.",
            "For two of the four programs the tokenizer's end token belongs into the set.",
            "ids = generation_config.get('eos_token_id'); then a list of it, unless it is one or None",
        ),
    ),
    "5": Exercise(
        name="first_sent",
        minutes=10,
        example=([40, 30, 20], 10, 20, 80),
        draw=_conversation,
        right=_first_sent,
        mistakes={
            "The answer needs room as well: max_new_tokens counts against the context": (
                lambda turns, message, answer, context: _first_sent(turns, message, 0, context)
            ),
            "A context that is exactly full is fine": (
                lambda turns, message, answer, context: _first_sent(turns, message, answer, context - 1)
            ),
            "One turn less is not always enough: drop until the rest fits": (
                lambda turns, message, answer, context: min(1, _first_sent(turns, message, answer, context) or 0)
            ),
            "The new message itself is sent too, and takes room": (
                lambda turns, message, answer, context: _first_sent(turns, 0, answer, context)
            ),
        },
        hints=(
            "Try first = 0, 1, 2, ... What must fit: the turns from there on, the message, and the answer.",
            "sum(turns[first:]) + message + answer <= context. Nothing fits at all: None.",
            "for first in range(len(turns) + 1): if ... : return first",
        ),
    ),
}
