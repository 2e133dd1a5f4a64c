"""Tails: what stands behind a document's last target is not computed.

    document     s  s  u  u  a  a  E  n       E the end token, n the newline that the template puts behind it
    predicts     -  -  -  a  a  E  -  -       the shifted labels
    computed     s  s  u  u  a  a             up to the last token that predicts one

In a causal model a token acts on the tokens behind it in its document and on nothing else. Behind the last target
there is no loss that it could change, so loss and gradients are those of the whole document (tested). The last token
of any document is such a one; templates add a newline, and a chat may end with a question. A document without targets
goes as a whole. Whether a model is causal is proved on it first (model/fewer_tokens.py). Lesson: notebook 04.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from minituner.data.encoding import IGNORE

if TYPE_CHECKING:
    from minituner.data.collate import Batch


def needed(batch: Batch) -> np.ndarray:
    """For each token of the row (T,), whether it, or a later one of its document, predicts a target."""
    starts = np.cumsum([0, *batch.seq_lens])
    places = np.arange(starts[-1])
    document = np.repeat(np.arange(len(batch.seq_lens)), batch.seq_lens)
    predicts = (batch.shift_labels[0].numpy() != IGNORE).nonzero()[0]
    last = np.full(len(batch.seq_lens), -1)
    np.maximum.at(last, document[predicts], predicts)
    return places <= last[document]


def cut_tails(batch: Batch) -> Batch:
    """The batch, on the CPU, without the tails of its documents; `tokens` still counts them."""
    import torch

    keep = needed(batch)
    starts = np.cumsum([0, *batch.seq_lens])
    left = np.diff(np.concatenate([[0], np.cumsum(keep)])[starts])
    seq_lens = [int(length) for length in left if length]
    kept = torch.from_numpy(keep.nonzero()[0])
    return replace(
        batch,
        input_ids=batch.input_ids[:, kept],
        position_ids=batch.position_ids[:, kept],
        shift_labels=batch.shift_labels[:, kept],
        cu_seqlens=torch.from_numpy(np.cumsum([0, *seq_lens]).astype(np.int32)),
        seq_lens=seq_lens,
    )
