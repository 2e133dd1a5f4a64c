"""Which rank holds what: the stages of ZeRO, and a row of tokens under sequence parallel.

              rank 0                rank 1
    stage 1   weights   [########]  weights   [########]      all of it, on every rank
              averages  [####    ]  averages  [    ####]      cut: each rank answers for its part

Lesson: notebook 07.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minituner.errors import UsageError
from minituner.viz.picture import Picture, frame, new_figure
from minituner.viz.style import OUTLINE, bar, styled

KINDS = ("weights", "gradients", "averages")
CUT_FROM = {"averages": 1, "gradients": 2, "weights": 3}  # the stage from which each kind is cut


@styled
def shard_map(world_size: int = 4) -> Picture:
    """ZeRO stages 0 to 3: what each rank stores of weights, gradients and AdamW's averages.

    `data` has held: `{(stage, rank): {kind: (start, end)}}`, shares of the whole from 0 to 1.

    Raises:
        UsageError: fewer than one rank.
    """
    if world_size < 1:
        raise UsageError(f"world_size={world_size}: at least one rank is needed")
    held = {(s, r): {k: _share(k, s, r, world_size) for k in KINDS} for s in range(4) for r in range(world_size)}
    figure = new_figure(max(5.0, 1.9 * world_size), 3.4)
    axes = figure.add_subplot()
    for (stage, rank), kinds in held.items():
        for line, (start, end) in enumerate(kinds.values()):
            left, bottom = rank * 1.15, -stage * 1.25 - line * 0.3
            axes.barh(bottom, 1, left=left, height=0.24, color="none", edgecolor=OUTLINE, linewidth=0.6)
            axes.barh(bottom, end - start, left=left + start, height=0.24, **bar(line))
    for line, kind in enumerate(KINDS):
        axes.barh(0, 0, label=kind + (" (m, v)" if kind == "averages" else ""), **bar(line))
    axes.set(
        xticks=[rank * 1.15 + 0.5 for rank in range(world_size)],
        xticklabels=[f"rank {rank}" for rank in range(world_size)],
        yticks=[-stage * 1.25 - 0.3 for stage in range(4)],
        yticklabels=[f"stage {stage}" for stage in range(4)],
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    frame(axes, ())
    figure.legend(loc="outside lower center", ncols=3)
    return Picture(figure, {"held": held}, f"what each of {world_size} ranks stores at ZeRO stages 0 to 3")


def _share(kind: str, stage: int, rank: int, world_size: int) -> tuple[float, float]:
    return (rank / world_size, (rank + 1) / world_size) if stage >= CUT_FROM[kind] else (0.0, 1.0)


@styled
def sequence_split(seq_lens: Sequence[int], heads: int, world_size: int = 2) -> Picture:
    """A packed row under sequence parallel: who holds which token of which head, outside attention and inside.

    `data` has outside and inside: (heads, tokens) integer arrays, the rank that holds each place.

    Raises:
        UsageError: tokens or heads cannot be dealt out equally.
    """
    tokens = sum(seq_lens)
    if tokens % world_size or heads % world_size:
        raise UsageError(f"{tokens} tokens and {heads} heads cannot be dealt out equally to {world_size} ranks")
    outside = np.tile(np.repeat(np.arange(world_size), tokens // world_size), (heads, 1))
    inside = np.tile(np.repeat(np.arange(world_size), heads // world_size)[:, None], (1, tokens))
    figure = new_figure(8, 1.0 + 0.28 * heads)
    borders = np.cumsum(seq_lens)[:-1]
    for place, (title, ranks) in enumerate({"outside attention": outside, "inside attention": inside}.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        _grid(axes, ranks, title, borders.tolist())
    for rank in range(world_size):
        figure.axes[0].barh(0, 0, label=f"rank {rank}", **bar(rank))
    figure.axes[0].plot([], [], color="black", linewidth=2, label="border of documents")
    figure.legend(loc="outside lower center", ncols=world_size + 1)
    summary = f"{tokens} tokens, {heads} heads on {world_size} ranks: cut by tokens outside attention, by heads inside"
    return Picture(figure, {"outside": outside, "inside": inside}, summary)


def _grid(axes: Any, ranks: np.ndarray, title: str, borders: Sequence[int]) -> None:
    heads, tokens = ranks.shape
    for head in range(heads):
        for token in range(tokens):
            axes.barh(head, 1, left=token, height=0.96, linewidth=0.6, **bar(int(ranks[head, token])))
    for border in borders:
        axes.axvline(border, color="black", linewidth=2)
    axes.set(xlim=(0, tokens), ylim=(heads - 0.5, -0.5), xlabel="token", ylabel="head", yticks=range(heads))
    axes.set_title(title)
    frame(axes, ())
