"""Exercises of lesson 08: parameters of a config, bytes of full fine-tuning, GB and GiB, logits, ZeRO by formula.

What an exercise gives is a constant here, so that notebook and check cannot fall out of step:

    CONFIG    ->  08.1 how many parameters           ROW       ->  08.4 the bytes of its logits
    TRAINED   ->  08.2 GB without activations        per_rank  ->  08.5 checked against train/zero_bytes.py
    CARD_MIB  ->  08.3 the same memory in GB

Lesson: notebook 08.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from minituner.camp.core import Exercise, Wrong
from minituner.train.zero_bytes import bytes_held

CONFIG = {"vocab": 32_000, "hidden": 4_096, "intermediate": 11_008, "layers": 32, "tied": False}
TRAINED = 1_500_000_000
CARD_MIB = 24_564
ROW = {"tokens": 4_096, "vocab": 151_936, "bytes": 4}


def parameters() -> int:
    """Of CONFIG, a Llama with as many key-value heads as heads, norms included."""
    c = CONFIG
    layer = 4 * c["hidden"] ** 2 + 3 * c["hidden"] * c["intermediate"] + 2 * c["hidden"]
    return 2 * c["vocab"] * c["hidden"] + c["layers"] * layer + c["hidden"]


def _near(value: float, wanted: float, share: float = 0.002) -> bool:
    return abs(value - wanted) <= share * abs(wanted)


def _explain(value: float, said: Mapping[float, str], right: float) -> None:
    """Raise the words that belong to a typical wrong value."""
    for wrong, words in said.items():
        if _near(value, wrong) and not _near(value, right):
            raise Wrong(words)


def _check_parameters(answer: Any) -> None:
    value, right, c = float(answer), parameters(), CONFIG
    embedding, layer = c["vocab"] * c["hidden"], 4 * c["hidden"] ** 2 + 3 * c["hidden"] * c["intermediate"]
    said = {
        right - embedding: "embedding and head are two matrices here (tied is False)",
        right - 2 * embedding: "embedding and head are missing",
        right - c["layers"] * c["hidden"] * c["intermediate"]: "the feed-forward block has three matrices, not two",
        2 * embedding + layer: "that is one layer; the model has several",
    }
    _explain(value, said, right)
    if not _near(value, right, 1e-4):
        raise Wrong(f"{value:,.0f} is {'more' if value > right else 'less'} than two embeddings and all layers")


def _check_full(answer: Any) -> None:
    value, right = float(answer), 16 * TRAINED / 1e9
    said = {
        4 * TRAINED / 1e9: "those are the weights alone",
        8 * TRAINED / 1e9: "weights and gradients; AdamW's two averages are missing",
        12 * TRAINED / 1e9: "one of the four is missing: weight, gradient, and two averages of AdamW",
        2 * TRAINED / 1e9: "2 bytes a number would be bfloat16 weights alone",
        right * 1e9: "answer in GB: divide by 1e9",
        16 * TRAINED / 2**30: "that is in GiB; GB are 1e9 bytes",
    }
    _explain(value, said, right)
    if not _near(value, right):
        raise Wrong(f"{value:.4g} GB is {'too much' if value > right else 'too little'}")


def _check_units(answer: Any) -> None:
    value, right = float(answer), CARD_MIB * 2**20 / 1e9
    said = {
        CARD_MIB / 1e3: "a MiB is not a MB: it has 2**20 bytes",
        CARD_MIB / 1024: "that is in GiB; GB are 1e9 bytes",
        CARD_MIB * 2**20: "answer in GB: divide by 1e9",
        CARD_MIB * 1e6 / 2**30: "the other way round: MiB are the binary ones",
    }
    _explain(value, said, right)
    if not _near(value, right):
        raise Wrong(f"{value:.5g} GB is {'too much' if value > right else 'too little'}")


def _check_logits(answer: Any) -> None:
    value, right = float(answer), ROW["tokens"] * ROW["vocab"] * ROW["bytes"] / 1e9
    said = {
        right / ROW["bytes"]: "that counts numbers; each has 4 bytes",
        right / 2: "in float32 a number has 4 bytes",
        right * 1e9: "answer in GB: divide by 1e9",
        ROW["vocab"] * ROW["bytes"] / 1e9: "that is one position's logits",
    }
    _explain(value, said, right)
    if not _near(value, right):
        raise Wrong(f"{value:.4g} GB is {'too much' if value > right else 'too little'}")


def _check_rank(answer: Callable[..., Any]) -> None:
    if not callable(answer):
        raise Wrong("give the function itself: answer = per_rank (no brackets)")
    for parameters_, world, stage in ((1000, 1, 0), (1200, 4, 0), (1200, 4, 1), (1200, 4, 2), (1200, 4, 3)):
        mine, held = float(answer(parameters_, world, stage)), bytes_held(parameters_, world, stage)
        right = sum(held.values())
        if _near(mine, right):
            continue
        where = f"per_rank({parameters_}, {world}, {stage})"
        if stage == 0 and _near(mine, right / world):
            raise Wrong(f"{where}: at stage 0 every rank has everything")
        if _near(mine, right - held["optimizer"]):
            raise Wrong(f"{where}: AdamW's two averages are missing")
        if stage and _near(mine, sum(bytes_held(parameters_, world, stage - 1).values())):
            raise Wrong(f"{where}: that is stage {stage - 1}; stage {stage} cuts one part more")
        raise Wrong(f"{where} is {mine:,.0f}, and {right:,.0f} by the formula")


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        "How many parameters has the Llama of CONFIG? (as many key-value heads as heads)",
        _check_parameters,
        (
            "Attention has four matrices of (hidden, hidden); the feed-forward block three of (hidden, intermediate).",
            "Embedding and head are (vocab, hidden) each; two norms of (hidden,) a layer, and one at the end.",
            "2 * V * H + L * (4 * H * H + 3 * H * I + 2 * H) + H",
        ),
    ),
    "2": Exercise(
        "GB of weights, gradients and AdamW's averages when TRAINED numbers are trained in float32.",
        _check_full,
        (
            "Each trained number is there four times. Which four?",
            "Weight, gradient, exp_avg, exp_avg_sq: 4 bytes each.",
            "16 * TRAINED / 1e9",
        ),
    ),
    "3": Exercise(
        "A card shows CARD_MIB MiB. How many GB (1e9 bytes) are that?",
        _check_units,
        ("A MiB is 2**20 bytes.", "First to bytes, then to GB.", "CARD_MIB * 2**20 / 1e9"),
    ),
    "4": Exercise(
        "GB of all logits of the row ROW, if every position had a target and nothing went in pieces.",
        _check_logits,
        (
            "One number for each position and each entry of the vocabulary.",
            "tokens x vocab x bytes.",
            "ROW['tokens'] * ROW['vocab'] * ROW['bytes'] / 1e9",
        ),
    ),
    "5": Exercise(
        "Write per_rank(parameters, world_size, stage): bytes of float32 weights, gradients and AdamW's averages.",
        _check_rank,
        (
            "Without ZeRO: 4 + 4 + 8 bytes a parameter on every rank.",
            "Stage 1 divides the averages by world_size, stage 2 the gradients too, stage 3 the weights too.",
            "4 * p / (w if stage >= 3 else 1) + 4 * p / (w if stage >= 2 else 1) + 8 * p / (w if stage >= 1 else 1)",
        ),
    ),
}
