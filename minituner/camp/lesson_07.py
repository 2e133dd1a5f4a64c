"""Exercises of lesson 07: bytes per rank, which stage fits, one global mean, reduce-scatter, bytes sent, heads.

    7.1 gigabytes(parameters, ranks)               what a rank holds at ZeRO stage 2
    7.2 smallest_stages(parameters, ranks, rooms)  the smallest stage that fits into each room
    7.3 factors(supervised)                        what each rank multiplies its loss by
    7.4 reduce_scatter(rows, rank)                 what a rank holds afterwards
    7.5 times_more(micro_batches)                  what stage 3 sends, against stage 1
    7.6 shapes(tokens, heads, group)               what a rank holds under sequence parallel

Every right value is computed with the functions that the lesson uses. Lesson: notebook 07.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from minituner.camp.compare import Wrong
from minituner.camp.core import Exercise
from minituner.train.zero_bytes import bytes_held, bytes_sent

PARAMETERS, RANKS = 7_000_000_000, 8


def held(parameters: int, ranks: int, stage: int, precision: str = "mixed") -> float:
    """What one rank holds, in GB (1e9 bytes)."""
    return sum(bytes_held(parameters, ranks, stage, precision).values()) / 1e9


def _model(draw: Random) -> tuple[int, int]:
    return draw.randint(1, 80) * 10**9, draw.choice([2, 4, 8, 16, 64])


def _rooms(draw: Random) -> tuple[int, int, list[float]]:
    """Rooms between what two neighbouring stages take, well away from both, in any order."""
    parameters, ranks = _model(draw)
    takes = [held(parameters, ranks, stage) for stage in range(4)]
    rooms = [2 * takes[0], *((a + b) / 2 for a, b in itertools.pairwise(takes)), 1.05 * takes[3]]
    return parameters, ranks, [round(room, 2) for room in draw.sample(rooms, draw.randint(2, 4))]


def _stages(parameters: int, ranks: int, rooms: Sequence[float]) -> list[int]:
    return [next(s for s in range(4) if held(parameters, ranks, s) <= room) for room in rooms]


def _factors(supervised: Sequence[int]) -> np.ndarray:
    return len(supervised) * np.array(supervised) / sum(supervised)


def _rows(draw: Random) -> tuple[list[np.ndarray], int]:
    ranks, part = draw.randint(2, 4), draw.randint(1, 3)
    rows = [np.array([float(draw.randint(-9, 9)) for _ in range(ranks * part)]) for _ in range(ranks)]
    return rows, draw.randrange(ranks)


def _scattered(rows: Sequence[np.ndarray], rank: int) -> np.ndarray:
    return np.split(np.sum(rows, axis=0), len(rows))[rank]


def _sent(stage: int, micro_batches: int) -> float:
    return sum(bytes_sent(PARAMETERS, RANKS, stage, micro_batches).values())


def _times(micro_batches: int) -> float:
    return _sent(3, micro_batches) / _sent(1, micro_batches)


def _shapes(tokens: int, heads: int, group: int) -> dict[str, list[int]]:
    return {"outside": [tokens // group, heads], "inside": [tokens, heads // group]}


def _whole_stages(value: Any, *case: Any) -> list[int]:
    stages = [int(stage) for stage in value]
    if strange := [stage for stage in stages if stage not in range(4)]:
        raise Wrong(f"{strange[0]} is no ZeRO stage: they are 0, 1, 2 and 3")
    return stages


def _drawn_shapes(draw: Random) -> tuple[int, int, int]:
    group = draw.choice([2, 4, 8])
    return group * draw.randint(1, 9), group * draw.randint(1, 4), group


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        name="gigabytes",
        minutes=5,
        example=(PARAMETERS, RANKS),
        draw=_model,
        right=lambda parameters, ranks: held(parameters, ranks, 2),
        mistakes={
            "That is without ZeRO; stage 2 cuts optimizer states and gradients into as many parts as ranks": (
                lambda parameters, ranks: held(parameters, ranks, 0)
            ),
            "That is stage 1; stage 2 cuts the gradients too": lambda parameters, ranks: held(parameters, ranks, 1),
            "That is stage 3; at stage 2 every rank keeps all weights": (
                lambda parameters, ranks: held(parameters, ranks, 3)
            ),
            "Right idea, other unit: 1 GB is 1e9 bytes here": (
                lambda parameters, ranks: held(parameters, ranks, 2) * 1e9 / 2**30
            ),
            "Answer in GB: divide by 1e9": lambda parameters, ranks: held(parameters, ranks, 2) * 1e9,
        },
        hints=(
            "Mixed precision: 2 bytes of weights, 2 of gradients, 12 of optimizer per parameter.",
            "Stage 2 cuts the optimizer's bytes and the gradients' into one part a rank; the weights stay whole.",
            "parameters * (2 + 2 / ranks + 12 / ranks) / 1e9",
        ),
        rel=1e-4,
    ),
    "2": Exercise(
        name="smallest_stages",
        minutes=10,
        example=(PARAMETERS, RANKS, [120, 40, 30, 16]),
        draw=_rooms,
        right=_stages,
        view=_whole_stages,
        mistakes={
            "A smaller stage would do for one of the rooms, and it sends no more": (
                lambda parameters, ranks, rooms: [3] * len(rooms)
            ),
            "That is the largest stage that does not fit; asked is the smallest that does": (
                lambda parameters, ranks, rooms: [max(stage - 1, 0) for stage in _stages(parameters, ranks, rooms)]
            ),
            "One of these stages takes more than its room has: gradients are cut from stage 2 on, weights at stage 3": (
                lambda parameters, ranks, rooms: [min(stage, 1) for stage in _stages(parameters, ranks, rooms)]
            ),
        },
        hints=(
            "Compute the GB per rank of all four stages first, as in 7.1.",
            "Then take for each room the first stage that is not larger than it.",
            "Cut by ranks: stage 1 the 12 bytes, stage 2 also 2 of gradients, stage 3 also 2 of weights.",
        ),
    ),
    "3": Exercise(
        name="factors",
        minutes=10,
        example=([30, 10, 0, 60],),
        draw=lambda draw: ([draw.randint(1, 90), *(draw.choice([0, 1, 10, 55]) for _ in range(draw.randint(1, 5)))],),
        right=_factors,
        mistakes={
            "Right if the ranks' gradients were summed; here they are averaged, which divides by the ranks": (
                lambda supervised: np.array(supervised) / sum(supervised)
            ),
            "Factors of 1 are the mean of means: a token of a rank with few tokens would weigh more than others": (
                lambda supervised: [1] * len(supervised)
            ),
            "That is upside down: a rank with more tokens has more to say": (
                lambda supervised: [sum(supervised) / (len(supervised) * max(n, 1)) for n in supervised]
            ),
        },
        hints=(
            "Now a token of rank r weighs 1 / n_r, then 1 / W by the averaging. What should it weigh?",
            "It should weigh 1 / N, N being all supervised tokens.",
            "[W * n / N for n in supervised]",
        ),
    ),
    "4": Exercise(
        name="reduce_scatter",
        minutes=5,
        example=([np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 20.0, 30.0, 40.0])], 1),
        draw=_rows,
        right=_scattered,
        mistakes={
            "That is the whole sum on every rank: an all-reduce; keep part `rank` of it only": (
                lambda rows, rank: np.sum(rows, axis=0)
            ),
            "That is the mean over ranks; asked is the sum": lambda rows, rank: _scattered(rows, rank) / len(rows),
            "That is a part of the rank's own row; it has to be summed over all rows": (
                lambda rows, rank: np.split(rows[rank], len(rows))[rank]
            ),
            "Every rank gets the same part; rank r keeps part r": lambda rows, rank: _scattered(rows, 0),
            "Ranks count from 0": lambda rows, rank: _scattered(rows, rank - 1),
        },
        hints=(
            "Reduce: add the rows, number by number. Scatter: each rank keeps a part of the sum.",
            "There are as many equal parts as rows; rank r keeps part r.",
            "np.split(sum(rows), len(rows))[rank]",
        ),
    ),
    "5": Exercise(
        name="times_more",
        minutes=5,
        example=(4,),
        draw=lambda draw: (draw.randint(1, 64),),
        right=_times,
        mistakes={
            "Right for one micro-batch; stage 3 gathers and reduces in each of them": lambda micro_batches: _times(1),
            "The other way round: asked is stage 3 against stage 1": lambda micro_batches: 1 / _times(micro_batches),
            "Stage 3 gathers the weights twice in each micro-batch, for the forward and for the backward": (
                lambda micro_batches: 2 * _times(micro_batches) / 3
            ),
            "Stage 1 sends two rows a step: it reduce-scatters gradients and gathers weights": (
                lambda micro_batches: 2 * _times(micro_batches)
            ),
        },
        hints=(
            "Stage 1, once a step: a reduce-scatter of the gradients, and an all-gather of the weights.",
            "Stage 3, in each micro-batch: a gather for the forward, one for the backward, and a reduce-scatter.",
            "3 * micro_batches passes against 2",
        ),
    ),
    "6": Exercise(
        name="shapes",
        minutes=5,
        example=(12, 8, 4),
        draw=_drawn_shapes,
        right=_shapes,
        mistakes={
            "Exchanged: attention needs whole documents, so inside it a rank has all tokens": (
                lambda tokens, heads, group: dict(
                    zip(("inside", "outside"), _shapes(tokens, heads, group).values(), strict=True)
                )
            ),
            "Inside attention the heads are cut, so that all tokens are there": (
                lambda tokens, heads, group: {"outside": [tokens // group, heads], "inside": [tokens, heads]}
            ),
            "Outside attention the tokens are cut": (
                lambda tokens, heads, group: {"outside": [tokens, heads], "inside": [tokens, heads // group]}
            ),
        },
        hints=(
            "Outside attention every token is alone: which of the two numbers can be cut without anyone noticing?",
            "Inside attention a token needs its whole document, but each head works for itself.",
            "outside: tokens / group tokens and all heads; inside: all tokens and heads / group heads",
        ),
    ),
}
