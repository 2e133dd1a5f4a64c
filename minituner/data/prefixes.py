"""Shared prefixes: what documents of one row begin alike with is computed once.

    documents      [S S S a b]  [S S S c]  [S S S d]      S S S: the system prompt in front of every record
    the row        S S S a b S S S c S S S d              (1, T), 13 tokens
    computed       S S S a b       c       d              (1, N), 7 of them: input_ids and position_ids
    rows           0 1 2 3 4 0 1 2 5 0 1 2 6              (T,) where each token's state lies among the computed

In a causal model a token's state depends on the tokens before it in its document and on nothing else. Equal beginnings
therefore have equal states in every layer, whatever follows them, and the gradients that flow back into them add up:
loss and gradients are those of the whole row (tested to rounding). Targets stay where they are, one for each token
of the row, for what follows a beginning differs. Attention lays the row out whole again (model/shared_prefixes.py).
Source: the prefix trees that servers keep (SGLang's RadixAttention), here in training. Lesson: notebook 04.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from minituner.data.collate import Batch

LEAST = 0.02  # of a row's tokens must be repeated, or laying it out again costs more than it saves


@dataclass(frozen=True, slots=True, eq=False)
class Prefixes:
    """Which tokens of a row (T,) are computed, and where the others find their states; int64 tensors."""

    rows: torch.Tensor
    """(T,) for each token, the number of its state among the computed ones."""
    own: torch.Tensor
    """(N,) the tokens that are computed, in the order of the row."""

    def to(self, device: Any, *, non_blocking: bool = False) -> Prefixes:
        """The same on `device`."""
        return Prefixes(*(tensor.to(device, non_blocking=non_blocking) for tensor in (self.rows, self.own)))


def owners(documents: list[np.ndarray]) -> np.ndarray:
    """For each token of a row (T,), the first one with an equal beginning, which is computed for all of them.

    Sorted like words in a dictionary, a document shares its longest beginning with the one before it.
    """
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in documents])]).astype(np.int64)
    owner = np.arange(starts[-1])
    order = sorted(range(len(documents)), key=lambda n: documents[n].astype(">u8").tobytes())
    for before, after in pairwise(order):
        shorter = min(len(documents[before]), len(documents[after]))
        differs = (documents[before][:shorter] != documents[after][:shorter]).nonzero()[0]
        common = int(differs[0]) if len(differs) else shorter
        owner[starts[after] : starts[after] + common] = owner[starts[before] : starts[before] + common]
    first = np.arange(len(owner))
    np.minimum.at(first, owner, first.copy())
    return first[owner]


def share_prefixes(batch: Batch) -> Batch:
    """The batch, on the CPU, with each beginning once; itself where too little is repeated."""
    import torch

    ids = batch.input_ids[0].numpy()
    owner = owners(np.split(ids, np.cumsum(batch.seq_lens)[:-1]) if batch.seq_lens else [])
    own = (owner == np.arange(len(owner))).nonzero()[0]
    if len(owner) - len(own) <= LEAST * len(owner):
        return batch
    prefixes = Prefixes(torch.from_numpy(np.searchsorted(own, owner)), torch.from_numpy(own))
    return replace(
        batch,
        input_ids=batch.input_ids[:, prefixes.own],
        position_ids=batch.position_ids[:, prefixes.own],
        prefixes=prefixes,
    )
