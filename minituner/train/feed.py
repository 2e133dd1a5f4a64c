"""The feed: packs become windows of micro-batches, the same ones after a resume.

    epoch 0, seed 42   packs in a drawn order      [4 0 3 1 2]
    micro-batches of 1, windows of 2               [4][0] | [3][1] | [2]        one optimizer step per window

The order of an epoch depends on the seed and the epoch's number only, so a window is found again by its step. The last
window of an epoch may be shorter; it is weighted by its own supervised tokens. Lesson: notebook 07.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from minituner.data.collate import Batch, collate
from minituner.data.order import batches
from minituner.data.prepare import Prepared
from minituner.errors import UsageError
from minituner.recipe import Recipe


class Feed:
    """Windows of micro-batches for one rank; every rank has the same number, some micro-batches may be empty."""

    def __init__(self, prepared: Prepared, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        self.prepared, self.recipe, self.rank, self.world_size = prepared, recipe, rank, world_size
        train = recipe.train
        per_rank = math.ceil(len(prepared.packs) / (train.per_device_batch_size * world_size))
        self.steps_per_epoch = math.ceil(per_rank / train.gradient_accumulation_steps)
        self.total_steps = train.max_steps or math.ceil(train.num_epochs * self.steps_per_epoch)
        self._epoch, self._batches = -1, []
        if not self.steps_per_epoch:
            raise UsageError("there are no packs to train on", next_command="minituner inspect")

    def packs(self, step: int) -> list[list[int]]:
        """The pack numbers of each micro-batch in the window of optimizer step `step` (counted from 0)."""
        train = self.recipe.train
        epoch, window = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._batches = batches(
                len(self.prepared.packs),
                seed=train.seed,
                epoch=epoch,
                shuffle=self.recipe.data.shuffle,
                batch_size=train.per_device_batch_size,
                rank=self.rank,
                world_size=self.world_size,
            )
            self._epoch = epoch
        start = window * train.gradient_accumulation_steps
        return [batch.tolist() for batch in self._batches[start : start + train.gradient_accumulation_steps]]

    def window(self, step: int, to_device: Callable[[Batch], Batch] = lambda batch: batch) -> list[Batch]:
        """The micro-batches of optimizer step `step`."""
        isolate = self.recipe.data.isolate_documents
        return [
            to_device(collate([self.prepared.documents(number) for number in numbers], isolate=isolate))
            for numbers in self.packs(step)
        ]
