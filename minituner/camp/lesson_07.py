"""Exercises of lesson 07: bytes per rank, which stage fits, one global mean, reduce-scatter, bytes sent, heads.

What an exercise gives is a constant here, so that notebook and check cannot fall out of step:

    PARAMETERS, RANKS     ->  07.1 bytes per rank, 07.2 the smallest stage that fits into each of ROOMS
    SUPERVISED            ->  07.3 what each rank multiplies its loss by
    MICRO_BATCHES         ->  07.5 bytes sent
    TOKENS, HEADS, GROUP  ->  07.6 shapes under sequence parallel

Every right answer is computed with the functions that the lesson uses. Lesson: notebook 07.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minituner.camp.core import Exercise, Wrong
from minituner.train.zero_bytes import bytes_held, bytes_sent

PARAMETERS, RANKS = 7_000_000_000, 8
ROOMS = (120, 40, 30, 16)
SUPERVISED = (30, 10, 0, 60)
MICRO_BATCHES = 4
TOKENS, HEADS, GROUP = 12, 8, 4


def gigabytes(stage: int, world_size: int = RANKS) -> float:
    """What one rank holds of PARAMETERS in mixed precision, in GB (1e9 bytes)."""
    return sum(bytes_held(PARAMETERS, world_size, stage, "mixed").values()) / 1e9


def _check_bytes(answer: Any) -> None:
    value, right = float(answer), gigabytes(2)
    if abs(value - right) < 0.01:
        return
    if abs(value * 1e9 / 2**30 - right) < 0.01 or abs(value * 2**30 / 1e9 - right) < 0.01:
        raise Wrong("right idea, other unit: 1 GB is 1e9 bytes here")
    for stage in (0, 1, 3):
        if abs(value - gigabytes(stage)) < 0.01:
            also = ", or stage 2 in float32" if stage == 1 else ""  # the two have the same sum, 4 + 12 / RANKS
            raise Wrong(f"{value:g} GB is stage {stage}{also}; stage 2 cuts optimizer states and gradients, no more")
    raise Wrong(f"{value:g} GB: per parameter it is 2 (weights, whole) + 2 / {RANKS} + 12 / {RANKS} bytes")


def _check_stages(answer: Any) -> None:
    mine = [int(stage) for stage in answer]
    if len(mine) != len(ROOMS):
        raise Wrong(f"{len(ROOMS)} rooms, so {len(ROOMS)} stages; yours has {len(mine)}")
    for room, stage in zip(ROOMS, mine, strict=True):
        right = next(s for s in range(4) if gigabytes(s) <= room)
        if stage not in range(4):
            raise Wrong(f"{stage} is no ZeRO stage: they are 0, 1, 2 and 3")
        if gigabytes(stage) > room:
            raise Wrong(f"stage {stage} takes {gigabytes(stage):.2f} GB on each rank: more than {room} GB")
        if stage != right:
            raise Wrong(f"stage {stage} fits into {room} GB, but so does a smaller stage, which sends no more")


def _check_factors(answer: Any) -> None:
    mine = np.asarray(list(answer), dtype=float)
    right = len(SUPERVISED) * np.array(SUPERVISED) / sum(SUPERVISED)
    if mine.shape != right.shape:
        raise Wrong(f"{len(SUPERVISED)} ranks, so {len(SUPERVISED)} factors")
    if np.allclose(mine, right):
        return
    if np.allclose(mine, right / len(SUPERVISED)):
        raise Wrong("right if the ranks' gradients were summed; here they are averaged, which divides by the ranks")
    if np.allclose(mine, 1):
        raise Wrong("factors of 1 are the mean of means: a token of rank 1 would weigh six times one of rank 3")
    wrong = int(np.argmax(~np.isclose(mine, right)))
    raise Wrong(f"rank {wrong}: its {SUPERVISED[wrong]} of {sum(SUPERVISED)} tokens must weigh what all others weigh")


def _check_reduce_scatter(answer: Callable[..., Any]) -> None:
    if not callable(answer):
        raise Wrong("give the function itself: answer = reduce_scatter (no brackets)")
    draw = np.random.default_rng(0)
    for ranks in (1, 2, 3, 4):
        rows = draw.integers(-9, 10, (ranks, 2 * ranks)).astype(float)
        total = rows.sum(0)
        for rank in range(ranks):
            right = total[2 * rank : 2 * rank + 2]
            got = np.asarray(answer([row.copy() for row in rows], rank), dtype=float)
            if got.shape == right.shape and np.allclose(got, right):
                continue
            if got.shape == total.shape and np.allclose(got, total):
                raise Wrong("that is the whole sum on every rank: an all-reduce; keep part `rank` of it only")
            if got.shape == right.shape and np.allclose(got, right / ranks):
                raise Wrong("that is the mean over ranks; asked is the sum")
            if got.shape == right.shape and np.allclose(got, rows[rank][2 * rank : 2 * rank + 2]):
                raise Wrong("that is a part of the rank's own row; it has to be summed over all rows")
            raise Wrong(f"rows {rows.tolist()}, rank {rank}: the part is {right.tolist()}, yours {got.tolist()}")


def _sent(stage: int, micro_batches: int = MICRO_BATCHES) -> float:
    return sum(bytes_sent(PARAMETERS, RANKS, stage, micro_batches).values())


def _check_sent(answer: Any) -> None:
    value, right = float(answer), _sent(3) / _sent(1)
    if abs(value - right) < 0.01:
        return
    if abs(value - _sent(3, 1) / _sent(1, 1)) < 0.01:
        raise Wrong(f"right for one micro-batch; here stage 3 gathers and reduces in each of {MICRO_BATCHES}")
    if abs(value - 1 / right) < 0.01:
        raise Wrong("the other way round: how many times more does stage 3 send")
    raise Wrong(f"{value:g}: count passes of a whole row. Stage 1: one reduce-scatter and one all-gather a step")


def _check_shapes(answer: Any) -> None:
    if not isinstance(answer, dict) or set(answer) != {"outside", "inside"}:
        raise Wrong("answer with a dictionary: {'outside': (tokens, heads), 'inside': (tokens, heads)}")
    right = {"outside": (TOKENS // GROUP, HEADS), "inside": (TOKENS, HEADS // GROUP)}
    mine = {place: tuple(int(n) for n in shape) for place, shape in answer.items()}
    if mine["outside"] == right["inside"] and mine["inside"] == right["outside"]:
        raise Wrong("exchanged: attention needs whole documents, so inside it a rank has all tokens")
    for place, shape in right.items():
        if mine[place] != shape:
            cut = "the tokens are cut" if place == "outside" else "the heads are cut"
            raise Wrong(f"{place} attention {cut} into {GROUP}; your shape is {mine[place]}")


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        "How many GB does each of RANKS ranks hold of a model of PARAMETERS, mixed precision, ZeRO stage 2?",
        _check_bytes,
        (
            "Mixed precision: 2 bytes of weights, 2 of gradients, 12 of optimizer per parameter.",
            "Stage 2 cuts the optimizer's bytes and the gradients' into RANKS parts; the weights stay whole.",
            "PARAMETERS * (2 + 2 / RANKS + 12 / RANKS) / 1e9",
        ),
    ),
    "2": Exercise(
        "The same model and ranks: which is the smallest stage that fits into each of ROOMS (GB)? A list of stages.",
        _check_stages,
        (
            "Compute the GB per rank of all four stages first, as in 07.1.",
            "Then take for each room the first stage that is not larger than it.",
            "sum(bytes_held(PARAMETERS, RANKS, stage, 'mixed').values()) / 1e9",
        ),
    ),
    "3": Exercise(
        "Every rank takes the mean loss over its own SUPERVISED tokens, and gradients are averaged over ranks. By what"
        " must each rank multiply its loss so that every token weighs the same?",
        _check_factors,
        (
            "Now a token of rank r weighs 1 / n_r, then 1 / W by the averaging. What should it weigh?",
            "It should weigh 1 / N, N being all supervised tokens.",
            "[W * n / N for n in SUPERVISED]",
        ),
    ),
    "4": Exercise(
        "Write reduce_scatter(rows, rank): from the rows of all ranks, what rank `rank` holds afterwards.",
        _check_reduce_scatter,
        (
            "Reduce: add the rows, number by number. Scatter: each rank keeps a part of the sum.",
            "There are as many equal parts as rows; rank r keeps part r.",
            "np.split(sum(rows), len(rows))[rank]",
        ),
    ),
    "5": Exercise(
        "How many times more bytes does ZeRO stage 3 send than stage 1 in a step of MICRO_BATCHES micro-batches?",
        _check_sent,
        (
            "Stage 1, once a step: a reduce-scatter of the gradients, and an all-gather of the weights.",
            "Stage 3, in each micro-batch: a gather for the forward, one for the backward, and a reduce-scatter.",
            "3 * MICRO_BATCHES passes against 2",
        ),
    ),
    "6": Exercise(
        "A row of TOKENS tokens, a model with HEADS heads, GROUP ranks that share the row: the (tokens, heads) that one"
        " rank holds outside attention and inside it.",
        _check_shapes,
        (
            "Outside attention every token is alone: which of the two numbers can be cut without anyone noticing?",
            "Inside attention a token needs its whole document, but each head works for itself.",
            "outside: TOKENS / GROUP tokens and all heads; inside: all tokens and HEADS / GROUP heads",
        ),
    ),
}
