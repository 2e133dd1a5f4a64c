"""The feed: packs become windows of micro-batches, the same ones after a resume.

    epoch 0, seed 42   packs in a drawn order      [4 0 3 1 2]
    micro-batches of 1, windows of 2               [4][0] | [3][1] | [2]        one optimizer step per window

Where `sequence_parallel_size` ranks share a row, they get the same packs and each a slice of every row:

    4 ranks, size 2    ranks 0 and 1   [4]    ranks 2 and 3   [0]     rank 0 the first half of pack 4, rank 1 the second

The order of an epoch depends on the seed and the epoch's number only, so a window is found again by its step. The last
window of an epoch may be shorter; it is weighted by its own supervised tokens. Lesson: notebook 07.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from minituner.data.collate import Batch, collate, slice_of_row
from minituner.data.order import batches
from minituner.data.prefixes import share_prefixes
from minituner.data.prepare import Prepared
from minituner.data.tails import cut_tails
from minituner.errors import UsageError
from minituner.recipe import Recipe


class Feed:
    """Windows of micro-batches for one rank; every rank has the same number, some micro-batches may be empty."""

    def __init__(self, prepared: Prepared, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        self.prepared, self.recipe = prepared, recipe
        self.parts = recipe.distributed.sequence_parallel_size
        # A dry run looks at such a recipe from one rank alone; it then sees what the first group would get.
        self.data_rank, self.data_world_size = rank // self.parts, max(1, world_size // self.parts)
        self.part = rank % self.parts
        train = recipe.train
        per_rank = math.ceil(len(prepared.packs) / (train.per_device_batch_size * self.data_world_size))
        self.steps_per_epoch = math.ceil(per_rank / train.gradient_accumulation_steps)
        self.total_steps = train.max_steps or math.ceil(train.num_epochs * self.steps_per_epoch)
        self.cut_tails = self.share_prefixes = False  # set after their proofs on the model (run.py)
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
                rank=self.data_rank,
                world_size=self.data_world_size,
            )
            self._epoch = epoch
        start = window * train.gradient_accumulation_steps
        return [batch.tolist() for batch in self._batches[start : start + train.gradient_accumulation_steps]]

    def window(self, step: int, to_device: Callable[[Batch], Batch] = lambda batch: batch) -> list[Batch]:
        """The micro-batches of optimizer step `step`, or this rank's slices of them."""
        isolate = self.recipe.data.isolate_documents
        rows = (collate([self.prepared.documents(n) for n in numbers], isolate=isolate) for numbers in self.packs(step))
        if self.parts > 1:
            rows = (slice_of_row(row, self.part, self.parts) for row in rows)
        if self.cut_tails:
            rows = map(cut_tails, rows)
        if self.share_prefixes:
            rows = map(share_prefixes, rows)
        return [to_device(row) for row in rows]
