"""What the ranks of the ZeRO lesson run: a model of bytes, trained with the toy at one stage, weighed and counted.

    on_ranks(2, train_toy, rows, 3, 5)              two ranks, stage 3, five steps
    on_ranks(2, train_every_stage, rows, 5)         the same at every stage
        -> per rank: losses, weights (the same on all), bytes held (measured), bytes sent (counted)

A row is one chat as bytes of UTF-8: no tokenizer, and Chinese needs nothing special. Lesson: notebook 07.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from minituner.train.ranks import Ranks
from minituner.train.toy_zero import ToyZero

Row = tuple[list[int], list[int]]
LEARNING_RATE, WEIGHT_DECAY = 0.01, 0.1


class Block(nn.Module):
    """x + a two-layer network of x; (T, width) in and out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the two roads."""
        return x + self.down(F.gelu(self.up(x)))


def toy_model(width: int = 32, blocks: int = 4, seed: int = 0) -> nn.Sequential:
    """Guesses the next byte from this one: (T,) byte values -> (T, 256) logits."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(256, width), *(Block(width) for _ in range(blocks)), nn.Linear(width, 256))


def chat_row(question: str, answer: str) -> Row:
    """A question and its answer as bytes; only the answer's are supervised (-100 elsewhere)."""
    asked, said = list(question.encode()), list(answer.encode())
    return asked + said, [-100] * len(asked) + said


def toy_loss(model: nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """Cross-entropy of each next byte, summed over the supervised ones; no rows: 0, with a graph.

    One call of the model, however many rows: at stage 3 every call is a conversation between all ranks.
    """
    ids = torch.tensor([number for row, _ in rows for number in row[:-1]], dtype=torch.long)
    labels = torch.tensor([number for _, row in rows for number in row[1:]], dtype=torch.long)
    return F.cross_entropy(model(ids), labels, ignore_index=-100, reduction="sum")


def supervised(rows: Sequence[Row]) -> int:
    """How many next bytes of these rows are asked for."""
    return sum(label != -100 for _, labels in rows for label in labels[1:])


def train_toy(ranks: Ranks, rows: Sequence[Row], stage: int, steps: int, micro_batches: int = 1) -> dict[str, Any]:
    """Train `toy_model` on `rows`, dealt to the ranks in turn, all of them in each step; what this rank saw.

    Gives losses (one a step, over all ranks), weights (flat arrays by layer), held (bytes, after the last backward),
    peak (bytes, the fullest moment), sent (bytes a step, by collective).
    """
    model = toy_model()
    optimizer = ToyZero(model, ranks, stage, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    mine = rows[ranks.rank :: ranks.world.world_size]
    (total,) = ranks.all_sums([supervised(mine)])
    losses, held = [], {}
    for _ in range(steps):
        own = 0.0
        for number in range(micro_batches):
            loss = toy_loss(model, mine[number::micro_batches])
            (loss / total).backward()
            own += loss.item()
        held = optimizer.held()
        optimizer.step()
        losses.append(ranks.all_sums([own])[0] / total)
    return {
        "losses": losses,
        "held": held,
        "peak": optimizer.peak,
        "sent": {name: count // steps for name, count in optimizer.ring.sent.items()},
        "weights": {name: row.numpy() for name, row in optimizer.full_weights().items()},
    }


def train_every_stage(ranks: Ranks, rows: Sequence[Row], steps: int, micro_batches: int = 1) -> list[dict[str, Any]]:
    """`train_toy` at stages 0, 1, 2 and 3, one after the other."""
    return [train_toy(ranks, rows, stage, steps, micro_batches) for stage in range(4)]


def one_step_short(ranks: Ranks, rows: Sequence[Row]) -> None:
    """Stage 3 as it must not be: the last rank's loop ends one step before the others'. Fails on every other rank."""
    model = toy_model()
    optimizer = ToyZero(model, ranks, 3, LEARNING_RATE)
    for _ in range(1 if ranks.rank == ranks.world.world_size - 1 else 2):
        toy_loss(model, rows).backward()
        optimizer.step()
