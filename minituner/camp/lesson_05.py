"""Exercises of lesson 05: what LoRA adds, merging, NF4 by hand, nibbles, memory.

What an exercise gives is a constant here, so that notebook and check cannot fall out of step:

    LAYERS, RANK   ->  05.1 counts what LoRA trains     {"q_proj": (out, in), ...}
    BLOCK          ->  05.3 quantises it to NF4         NF4_LEVELS, 16 of them
    SEVEN_BILLION  ->  05.5 what training it holds      gigabytes, without activations

The levels are computed from the normal distribution, as the paper does; a test compares them with bitsandbytes'.
Lesson: notebook 05.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

from minituner.camp.core import Exercise, Wrong

LAYERS = {"q_proj": (576, 576), "k_proj": (192, 576), "down_proj": (576, 1536)}  # (out, in) of each weight
RANK = 4
BLOCK = (0.30, -1.20, 0.05, 0.62, -0.51, 0.0)
SEVEN_BILLION = {"linear": 6.5e9, "other": 0.3e9, "lora": 40e6, "bits": 4.127}


def nf4_levels(outermost: float = 0.9677083) -> tuple[float, ...]:
    """The 16 levels of NF4, -1 to 1: quantiles of the normal distribution, 7 below 0, 0 itself, and 8 above.

    Source: Dettmers et al. 2023 (QLoRA), appendix E; `outermost` is the quantile that becomes 1, as in bitsandbytes.
    """
    quantile = NormalDist().inv_cdf
    below = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    above = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    levels = sorted([*below, 0.0, *above])
    return tuple(level / levels[-1] for level in levels)


NF4_LEVELS = nf4_levels()


def _check_count(answer: Any) -> None:
    value, right = int(answer), sum(RANK * (out + into) for out, into in LAYERS.values())
    said = {
        sum(out * into for out, into in LAYERS.values()): "that is the number of weights which stay frozen",
        sum(RANK * into for _, into in LAYERS.values()): "that is A alone; B is trained too",
        sum(RANK * out for out, _ in LAYERS.values()): "that is B alone; A is trained too",
        2 * right: "twice too many: each layer gets one A and one B",
    }
    if value in said:
        raise Wrong(said[value])
    if value != right:
        raise Wrong(f"{value:,} is {'more' if value > right else 'less'} than A (rank x in) and B (out x rank) of each")


def _check_merge(answer: Callable[..., Any]) -> None:
    if not callable(answer):
        raise Wrong("give the function itself: answer = merged (no brackets)")
    draw = np.random.default_rng(0)
    for out, into, rank, alpha in ((3, 5, 2, 4.0), (6, 4, 1, 2.0), (4, 4, 4, 16.0)):
        weight, a, b = draw.normal(size=(out, into)), draw.normal(size=(rank, into)), draw.normal(size=(out, rank))
        before = weight.copy()
        mine = np.asarray(answer(weight, a, b, alpha))
        if not np.array_equal(weight, before):
            raise Wrong("your function changes the W it was given; return a new array instead")
        if mine.shape != weight.shape:
            raise Wrong(f"merged, W keeps its shape {weight.shape}; yours is {mine.shape}")
        x = draw.normal(size=into)
        wanted = weight @ x + alpha / rank * (b @ (a @ x))
        for factor, words in (
            (1.0, "the scaling alpha / r is missing"),
            (alpha, "you scale by alpha; it is alpha / r"),
            (alpha / math.sqrt(rank), "alpha / sqrt(r) is rsLoRA's scaling; plain LoRA divides by r"),
            (alpha / out, "r is the number of rows of A, not of W"),
            (alpha / into, "r is the number of rows of A, not of its columns"),
        ):
            if not math.isclose(factor, alpha / rank) and np.allclose(mine, weight + factor * (b @ a)):
                raise Wrong(words)
        if not np.allclose(mine @ x, wanted):
            raise Wrong(f"merged(W, A, B, alpha) @ x is not W @ x + alpha / r * B @ (A @ x), for r = {rank}")


def _check_block(answer: Any) -> None:
    if not isinstance(answer, dict) or not {"absmax", "indices"} <= set(answer):
        raise Wrong("answer with a dictionary: {'absmax': ..., 'indices': [...]}")
    absmax = max(abs(value) for value in BLOCK)
    if math.isclose(answer["absmax"], max(BLOCK), rel_tol=1e-6):
        raise Wrong("absmax is the largest *absolute* value: a minus sign does not make a number small")
    if not math.isclose(answer["absmax"], absmax, rel_tol=1e-6):
        raise Wrong(f"absmax: the largest absolute value of the block is not {answer['absmax']}")
    mine = [int(index) for index in answer["indices"]]
    if len(mine) != len(BLOCK):
        raise Wrong(f"{len(BLOCK)} values need {len(BLOCK)} indices, yours are {len(mine)}")
    right = _nearest([value / absmax for value in BLOCK])
    if mine == _nearest(list(BLOCK)) and mine != right:
        raise Wrong("divide by absmax before you look for the nearest level")
    for place, (index, wanted) in enumerate(zip(mine, right, strict=True)):
        if index != wanted:
            raise Wrong(
                f"value {place}: {BLOCK[place]} / absmax = {BLOCK[place] / absmax:.3f}; level {index} is not near"
            )


def _nearest(values: list[float]) -> list[int]:
    return [min(range(16), key=lambda index: abs(NF4_LEVELS[index] - value)) for value in values]


def _check_unpack(answer: Callable[..., Any]) -> None:
    if not callable(answer):
        raise Wrong("give the function itself: answer = unpack (no brackets)")
    draw = np.random.default_rng(5)
    for count in (1, 3, 64):
        indices = draw.integers(0, 16, 2 * count).astype(np.uint8)
        indices[:2] = (9, 4)  # told apart when swapped
        packed = (indices[0::2] << 4) | indices[1::2]
        mine = [int(index) for index in answer(packed.copy())]
        if len(mine) != len(indices):
            raise Wrong(f"{count} bytes hold {2 * count} indices; yours gives {len(mine)}")
        if mine == indices.tolist():
            continue
        if mine == indices.reshape(-1, 2)[:, ::-1].reshape(-1).tolist():
            raise Wrong("the first index of a pair is in the *high* four bits; yours comes second")
        if mine == [*indices[0::2].tolist(), *indices[1::2].tolist()]:
            raise Wrong("all right, but in the wrong order: the two indices of a byte stand side by side")
        raise Wrong(f"the bytes {packed[:3].tolist()} hold {indices[:6].tolist()}; yours gives {mine[:6]}")


def qlora_gigabytes() -> float:
    """Weights, gradients and AdamW's two averages for SEVEN_BILLION under QLoRA, the rest of the base in 2 bytes."""
    model = SEVEN_BILLION
    return (model["linear"] * model["bits"] / 8 + model["other"] * 2 + model["lora"] * (4 + 4 + 8)) / 1e9


def _check_memory(answer: Any) -> None:
    value, right, model = float(answer), qlora_gigabytes(), SEVEN_BILLION
    base = (model["linear"] * model["bits"] / 8 + model["other"] * 2) / 1e9
    everything = model["linear"] + model["other"]
    said = {
        everything * 16 / 1e9: "that is full fine-tuning: here only the LoRA numbers have gradients and averages",
        base: "the base is right; now the LoRA numbers: weights, gradients, and AdamW's two averages",
        base + model["lora"] * 4 / 1e9: "gradients and AdamW's two averages are missing for the LoRA numbers",
        base + model["lora"] * 8 / 1e9: "AdamW's two averages are missing for the LoRA numbers",
        (everything * model["bits"] / 8 + model["lora"] * 16)
        / 1e9: "embeddings and norms are not quantised: 2 bytes each",
        right * 8: "that is in gigabits; 8 bits are a byte",
    }
    for wrong, words in said.items():
        if abs(value - wrong) < 0.004 * wrong and abs(value - right) > 0.004 * right:
            raise Wrong(words)
    if value > 1e6:
        raise Wrong("answer in gigabytes: divide by 1e9")
    if abs(value - right) > 0.01 * right:
        raise Wrong(f"{value:.3g} GB is {'too much' if value > right else 'too little'}")


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        "How many numbers does LoRA of rank RANK train beside the three layers of LAYERS?",
        _check_count,
        (
            "Each layer gets two matrices. Which shapes must they have so that B @ A has the shape of W?",
            "A is (r, in) and B is (out, r).",
            "sum(RANK * (out + into) for out, into in LAYERS.values())",
        ),
    ),
    "2": Exercise(
        "Write merged(W, A, B, alpha): the one matrix that does what W and the adapter do together.",
        _check_merge,
        (
            "W @ x + s * (B @ (A @ x)) is the same as (W + something) @ x.",
            "The rank is A.shape[0], and s = alpha / rank.",
            "return W + alpha / A.shape[0] * (B @ A)",
        ),
    ),
    "3": Exercise(
        "Quantise BLOCK to NF4: its absmax, and for each value the index of the nearest of NF4_LEVELS.",
        _check_block,
        (
            "absmax = max(abs(value) for value in BLOCK); after dividing by it everything lies between -1 and 1.",
            "For each value / absmax: which of the 16 levels is nearest? Index 7 is the level 0.",
            "[int(np.abs(np.array(NF4_LEVELS) - value / absmax).argmin()) for value in BLOCK]",
        ),
    ),
    "4": Exercise(
        "Write unpack(packed): two indices out of every byte, the first from its high four bits.",
        _check_unpack,
        (
            "packed >> 4 is the high half of every byte, packed & 15 the low half.",
            "The two belong side by side: high, low, high, low.",
            "np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)",
        ),
    ),
    "5": Exercise(
        "Gigabytes of weights, gradients and optimizer states when the model of SEVEN_BILLION is trained by QLoRA.",
        _check_memory,
        (
            "Quantised: linear x bits / 8 bytes. Not quantised: other x 2 bytes (bfloat16).",
            "Each LoRA number is float32 with a gradient and two averages of AdamW: 16 bytes.",
            "(6.5e9 * 4.127 / 8 + 0.3e9 * 2 + 40e6 * 16) / 1e9",
        ),
    ),
}
