"""Exercises of lesson 08: parameters of a config, bytes of full fine-tuning, GB and GiB, logits, ZeRO by formula.

    8.1 parameters(config)                       how many
    8.2 full_gigabytes(trained)                  float32, AdamW, no activations
    8.3 gigabytes(mebibytes)                     the memory of a card in GB
    8.4 logits_gigabytes(row)                    all logits of a row
    8.5 per_rank(parameters, world_size, stage)  bytes under ZeRO, checked against train/zero_bytes.py

Lesson: notebook 08.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from minituner.camp.core import Exercise
from minituner.train.zero_bytes import bytes_held

CONFIG = {"vocab": 32_000, "hidden": 4_096, "intermediate": 11_008, "layers": 32, "tied": False}
ROW = {"tokens": 4_096, "vocab": 151_936, "bytes": 4}


def parameters(config: Mapping[str, Any], feed_forward: int = 3, attention: int = 4, norms: int = 1) -> int:
    """Of a Llama with as many key-value heads as heads; the three numbers are for what is often miscounted."""
    hidden, layers = config["hidden"], config["layers"]
    layer = attention * hidden**2 + feed_forward * hidden * config["intermediate"] + norms * 2 * hidden
    embeddings = (1 if config["tied"] else 2) * config["vocab"] * hidden
    return embeddings + layers * layer + norms * hidden


def _config(draw: Random) -> tuple[dict[str, Any]]:
    hidden = 64 * draw.randint(4, 64)
    sizes = {"vocab": draw.choice([32_000, 49_152, 151_936]), "hidden": hidden, "intermediate": hidden * 3 - 64}
    return ({**sizes, "layers": draw.randint(2, 80), "tied": draw.random() < 0.5},)


def _row(draw: Random) -> tuple[dict[str, int]]:
    vocab = draw.choice([32_000, 49_152, 151_936])
    return ({"tokens": draw.randint(512, 32_768), "vocab": vocab, "bytes": draw.choice([2, 4])},)


def _logits(row: Mapping[str, int]) -> float:
    return row["tokens"] * row["vocab"] * row["bytes"] / 1e9


def _ranks(draw: Random) -> tuple[int, int, int]:
    ranks = draw.choice([2, 4, 8])
    return 64 * draw.randint(1, 999), ranks, draw.randint(0, 3)


def _per_rank(parameters_: int, world_size: int, stage: int) -> float:
    return sum(bytes_held(parameters_, world_size, stage).values())


def _times(factor: float, right: Callable[..., float]) -> Callable[..., float]:
    """The mistake of an answer that is wrong by a factor."""
    return lambda *case: factor * right(*case)


def _full(trained: int) -> float:
    return _per_rank(trained, 1, 0) / 1e9


def _card(mebibytes: int) -> float:
    return mebibytes * 2**20 / 1e9


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        name="parameters",
        minutes=10,
        example=(CONFIG,),
        draw=_config,
        right=parameters,
        mistakes={
            "Where tied is False, embedding and head are two matrices": (
                lambda config: parameters({**config, "tied": True})
            ),
            "Where tied is True, the head is the embedding: one matrix, counted once": (
                lambda config: parameters({**config, "tied": False})
            ),
            "The feed-forward block has three matrices, not two": lambda config: parameters(config, feed_forward=2),
            "Attention has four matrices: for queries, keys, values, and the output": (
                lambda config: parameters(config, attention=3)
            ),
            "The norms are missing: two of (hidden,) in each layer, and one at the end": (
                lambda config: parameters(config, norms=0)
            ),
            "That is one layer; the model has several": lambda config: parameters({**config, "layers": 1}),
        },
        hints=(
            "Attention has four matrices of (hidden, hidden); the feed-forward block three of (hidden, intermediate).",
            "Embedding and head are (vocab, hidden) each; two norms of (hidden,) a layer, and one at the end.",
            "(1 if tied else 2) * V * H + L * (4 * H * H + 3 * H * I + 2 * H) + H",
        ),
    ),
    "2": Exercise(
        name="full_gigabytes",
        minutes=3,
        example=(1_500_000_000,),
        draw=lambda draw: (draw.randint(1, 700) * 10**8,),
        right=_full,
        mistakes={
            "Those are the weights alone": _times(4 / 16, _full),
            "Weights and gradients; AdamW's two averages are missing": _times(8 / 16, _full),
            "One of the four is missing: weight, gradient, and two averages of AdamW": _times(12 / 16, _full),
            "2 bytes a number would be bfloat16 weights alone": _times(2 / 16, _full),
            "Answer in GB: divide by 1e9": _times(1e9, _full),
            "That is in GiB; GB are 1e9 bytes": _times(1e9 / 2**30, _full),
        },
        hints=(
            "Each trained number is there four times. Which four?",
            "Weight, gradient, exp_avg, exp_avg_sq: 4 bytes each.",
            "16 * trained / 1e9",
        ),
        rel=1e-3,
    ),
    "3": Exercise(
        name="gigabytes",
        minutes=3,
        example=(24_564,),
        draw=lambda draw: (draw.randint(8_000, 200_000),),
        right=_card,
        mistakes={
            "A MiB is not a MB: it has 2**20 bytes": lambda mebibytes: mebibytes / 1e3,
            "That is in GiB; GB are 1e9 bytes": lambda mebibytes: mebibytes / 1024,
            "Answer in GB: divide by 1e9": lambda mebibytes: mebibytes * 2**20,
            "The other way round: MiB are the binary ones": lambda mebibytes: mebibytes * 1e6 / 2**30,
        },
        hints=("A MiB is 2**20 bytes.", "First to bytes, then to GB.", "mebibytes * 2**20 / 1e9"),
        rel=1e-4,
    ),
    "4": Exercise(
        name="logits_gigabytes",
        minutes=3,
        example=(ROW,),
        draw=_row,
        right=_logits,
        mistakes={
            "That counts numbers; each has bytes": lambda row: row["tokens"] * row["vocab"] / 1e9,
            "Answer in GB: divide by 1e9": _times(1e9, _logits),
            "That is one position's logits": lambda row: row["vocab"] * row["bytes"] / 1e9,
            "That is in GiB; GB are 1e9 bytes": _times(1e9 / 2**30, _logits),
        },
        hints=(
            "One number for each position and each entry of the vocabulary.",
            "tokens x vocab x bytes.",
            "row['tokens'] * row['vocab'] * row['bytes'] / 1e9",
        ),
        rel=1e-3,
    ),
    "5": Exercise(
        name="per_rank",
        minutes=10,
        example=(1200, 4, 2),
        draw=_ranks,
        right=_per_rank,
        mistakes={
            "At stage 0 every rank has everything": (
                lambda parameters_, world_size, stage: _per_rank(parameters_, 1, 0) / world_size
            ),
            "AdamW's two averages are missing": lambda parameters_, world_size, stage: (
                _per_rank(parameters_, world_size, stage) - bytes_held(parameters_, world_size, stage)["optimizer"]
            ),
            "Each stage cuts one part more than the one before: AdamW's averages, then gradients, then weights": (
                lambda parameters_, world_size, stage: _per_rank(parameters_, world_size, max(stage - 1, 0))
            ),
            "The stage makes no difference in yours": (
                lambda parameters_, world_size, stage: _per_rank(parameters_, world_size, 0)
            ),
        },
        hints=(
            "Without ZeRO: 4 + 4 + 8 bytes a parameter on every rank.",
            "Stage 1 divides the averages by world_size, stage 2 the gradients too, stage 3 the weights too.",
            "4 * p / (w if stage >= 3 else 1) + 4 * p / (w if stage >= 2 else 1) + 8 * p / (w if stage >= 1 else 1)",
        ),
    ),
}
