"""Exercises of lesson 05: what LoRA adds, merging, NF4 by hand, nibbles, memory.

    5.1 lora_numbers(layers, rank)      -> how many numbers LoRA trains
    5.2 merged(W, A, B, alpha)          -> one matrix that does what W and the adapter do together
    5.3 quantised(block, levels)        -> absmax and the index of the nearest level for each value
    5.4 unpacked(packed)                -> two 4-bit indices out of each byte
    5.5 qlora_gigabytes(model)          -> what training holds, without activations

The levels are computed from the normal distribution, as the paper does; a test compares them with bitsandbytes'.
Lesson: notebook 05.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random
from statistics import NormalDist
from typing import Any

import numpy as np

from minituner.camp.core import Exercise

LAYERS = {"q_proj": (576, 576), "k_proj": (192, 576), "down_proj": (576, 1536)}  # (out, in) of each weight
BLOCK = [0.30, -1.20, 0.05, 0.62, -0.51, 0.0]
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


def _layers(draw: Random) -> tuple[dict[str, tuple[int, int]], int]:
    names = draw.sample(["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], draw.randint(1, 4))
    return {name: (64 * draw.randint(1, 20), 64 * draw.randint(1, 20)) for name in names}, draw.choice([2, 4, 8, 16])


def _lora_numbers(layers: Mapping[str, tuple[int, int]], rank: int) -> int:
    return sum(rank * (out + into) for out, into in layers.values())


def _matrices(draw: Random) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    numbers = np.random.default_rng(draw.getrandbits(32))
    out, into, rank = draw.randint(2, 6), draw.randint(2, 6), draw.randint(2, 5)
    weight, a, b = numbers.normal(size=(out, into)), numbers.normal(size=(rank, into)), numbers.normal(size=(out, rank))
    return weight.round(2), a.round(2), b.round(2), float(2 ** draw.randint(1, 5))


def _merged(scale: str, weight: np.ndarray, a: np.ndarray, b: np.ndarray, alpha: float) -> np.ndarray:
    """W + s * B @ A with the right scaling s, or a wrong one by its name."""
    scales = {
        "right": alpha / len(a),
        "none": 1.0,
        "alpha": alpha,
        "rslora": alpha / math.sqrt(len(a)),
        "columns": alpha / a.shape[1],
        "rows of W": alpha / len(weight),
    }
    return weight + scales[scale] * (b @ a)


def _block(draw: Random) -> tuple[list[float], tuple[float, ...]]:
    """A block whose values are not near the middle between two levels, so that rounding does not decide."""
    block = [round(draw.gauss(0, 0.6), 2) or 0.01 for _ in range(draw.randint(4, 8))]
    block[draw.randrange(len(block))] = -round(1.3 * max(map(abs, block)), 2)
    absmax = max(map(abs, block))
    kept = [value for value in block if _gap(value / absmax) > 1e-3]
    return kept, NF4_LEVELS


def _gap(value: float) -> float:
    nearest, second = sorted(abs(level - value) for level in NF4_LEVELS)[:2]
    return second - nearest


def _quantised(block: Sequence[float], levels: Sequence[float]) -> dict[str, Any]:
    absmax = max(map(abs, block))
    return {"absmax": absmax, "indices": _nearest([value / absmax for value in block], levels)}


def _nearest(values: Sequence[float], levels: Sequence[float]) -> list[int]:
    return [min(range(len(levels)), key=lambda index: abs(levels[index] - value)) for value in values]


def _signed(block: Sequence[float], levels: Sequence[float]) -> dict[str, Any]:
    return {"absmax": max(block), "indices": _nearest([value / (max(block) or 1.0) for value in block], levels)}


def _bytes(draw: Random) -> tuple[np.ndarray]:
    return (np.array([draw.randrange(256) for _ in range(draw.randint(2, 6))], dtype=np.uint8),)


def _unpacked(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)


def _model(draw: Random) -> tuple[dict[str, float]]:
    linear = draw.randint(5, 700) * 1e8
    other, bits = round(linear * draw.uniform(0.02, 0.2), -6), draw.choice([4.127, 4.5])
    return ({"linear": linear, "other": other, "lora": draw.randint(5, 200) * 1e6, "bits": bits},)


def qlora_gigabytes(model: Mapping[str, float], lora_bytes: int = 4 + 4 + 8, other_bits: float = 16) -> float:
    """Weights, gradients and AdamW's two averages under QLoRA, in GB (1e9 bytes); the rest of the base in 2 bytes."""
    bits = model["linear"] * model["bits"] + model["other"] * other_bits
    return (bits / 8 + model["lora"] * lora_bytes) / 1e9


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        name="lora_numbers",
        minutes=5,
        example=(LAYERS, 4),
        draw=_layers,
        right=_lora_numbers,
        mistakes={
            "That is the number of weights which stay frozen": (
                lambda layers, rank: sum(out * into for out, into in layers.values())
            ),
            "That is A alone; B is trained too": lambda layers, rank: sum(rank * into for _, into in layers.values()),
            "That is B alone; A is trained too": lambda layers, rank: sum(rank * out for out, _ in layers.values()),
            "Twice too many: each layer gets one A and one B": lambda layers, rank: 2 * _lora_numbers(layers, rank),
        },
        hints=(
            "Each layer gets two matrices. Which shapes must they have so that B @ A has the shape of W?",
            "A is (r, in) and B is (out, r).",
            "sum(rank * (out + into) for out, into in layers.values())",
        ),
    ),
    "2": Exercise(
        name="merged",
        minutes=5,
        example=_matrices(Random(5)),  # noqa: S311
        draw=_matrices,
        right=lambda *case: _merged("right", *case),
        mistakes={
            "The scaling alpha / r is missing": lambda *case: _merged("none", *case),
            "You scale by alpha; it is alpha / r": lambda *case: _merged("alpha", *case),
            "alpha / sqrt(r) is rsLoRA's scaling; plain LoRA divides by r": lambda *case: _merged("rslora", *case),
            "r is the number of rows of A, not of its columns": lambda *case: _merged("columns", *case),
            "r is the number of rows of A, not of W": lambda *case: _merged("rows of W", *case),
            "That is the update alone; W is to be kept and the update added": (
                lambda w, a, b, alpha: _merged("right", 0 * w, a, b, alpha)
            ),
        },
        hints=(
            "W @ x + s * (B @ (A @ x)) is the same as (W + something) @ x.",
            "The rank is A.shape[0], and s = alpha / rank.",
            "return W + alpha / A.shape[0] * (B @ A)",
        ),
    ),
    "3": Exercise(
        name="quantised",
        minutes=10,
        example=(BLOCK, NF4_LEVELS),
        draw=_block,
        right=_quantised,
        mistakes={
            "absmax is the largest *absolute* value: a minus sign does not make a number small": _signed,
            "Divide by absmax before you look for the nearest level": (
                lambda block, levels: {**_quantised(block, levels), "indices": _nearest(block, levels)}
            ),
            "An index is asked for, and these are the levels themselves": (
                lambda block, levels: {
                    "absmax": max(map(abs, block)),
                    "indices": [levels[index] for index in _quantised(block, levels)["indices"]],
                }
            ),
            "The nearest level may be below the value or above it; yours is always the one below": (
                lambda block, levels: {
                    "absmax": max(map(abs, block)),
                    "indices": [sum(level <= value / max(map(abs, block)) for level in levels) - 1 for value in block],
                }
            ),
        },
        hints=(
            "absmax = max(abs(value) for value in block); after dividing by it everything lies between -1 and 1.",
            "For each value / absmax: which of the 16 levels is nearest? Index 7 is the level 0.",
            "[int(np.abs(np.array(levels) - value / absmax).argmin()) for value in block]",
        ),
    ),
    "4": Exercise(
        name="unpacked",
        minutes=5,
        example=(np.array([148, 32], dtype=np.uint8),),
        draw=_bytes,
        right=_unpacked,
        mistakes={
            "The first index of a pair is in the *high* four bits; yours comes second": (
                lambda packed: np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
            ),
            "All right, but in the wrong order: the two indices of a byte stand side by side": (
                lambda packed: np.concatenate([packed >> 4, packed & 15])
            ),
            "A byte holds two indices; yours gives one": lambda packed: packed >> 4,
            "The low half is what the four low bits hold: packed & 15": (
                lambda packed: np.stack([packed >> 4, packed], axis=1).reshape(-1)
            ),
        },
        hints=(
            "packed >> 4 is the high half of every byte, packed & 15 the low half.",
            "The two belong side by side: high, low, high, low.",
            "np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)",
        ),
    ),
    "5": Exercise(
        name="qlora_gigabytes",
        minutes=10,
        example=(SEVEN_BILLION,),
        draw=_model,
        right=qlora_gigabytes,
        mistakes={
            "That is full fine-tuning: here only the LoRA numbers have gradients and averages": (
                lambda model: (model["linear"] + model["other"]) * 16 / 1e9
            ),
            "The base is right; now the LoRA numbers: weights, gradients, and AdamW's two averages": (
                lambda model: qlora_gigabytes(model, 0)
            ),
            "Gradients and AdamW's two averages are missing for the LoRA numbers": (
                lambda model: qlora_gigabytes(model, 4)
            ),
            "AdamW's two averages are missing for the LoRA numbers": lambda model: qlora_gigabytes(model, 8),
            "Embeddings and norms are not quantised: 2 bytes each": (
                lambda model: qlora_gigabytes(model, other_bits=model["bits"])
            ),
            "That is in gigabits; 8 bits are a byte": lambda model: 8 * qlora_gigabytes(model),
            "Answer in gigabytes: divide by 1e9": lambda model: 1e9 * qlora_gigabytes(model),
        },
        hints=(
            "Quantised: linear x bits / 8 bytes. Not quantised: other x 2 bytes (bfloat16).",
            "Each LoRA number is float32 with a gradient and two averages of AdamW: 16 bytes.",
            "For the 7B model: (6.5e9 * 4.127 / 8 + 0.3e9 * 2 + 40e6 * 16) / 1e9",
        ),
        rel=1e-3,
    ),
}
