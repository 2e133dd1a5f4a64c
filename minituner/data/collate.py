"""Collate: documents become one batch, without padding.

Every pack of a micro-batch is laid into one row. `cu_seqlens` says where each document begins; positions restart there,
and labels are shifted inside each document, so the last token of one never predicts the first of the next:

    documents      [a b c] [d e]
    input_ids      a  b  c  d  e        (1, T)
    position_ids   0  1  2  0  1        (1, T)
    shift_labels   b  c  -  e  -        (1, T)   - is -100
    cu_seqlens     0        3     5     (documents + 1,) int32

`pad_batch` is the classic layout for comparison: one document a row, right-padded, masked by length and never by id.
Lesson: notebook 04.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from minituner.data.encoding import IGNORE

if TYPE_CHECKING:
    import torch

    from minituner.data.prefixes import Prefixes


Document = tuple[np.ndarray, np.ndarray]  # input_ids and labels, (n,) each


@dataclass(slots=True)
class Batch:
    """One micro-batch; tensors as drawn above.

    `seq_lens` are the lengths that attention keeps apart; `supervised_tokens` counts targets and `tokens` the real
    ones, both among this batch's own (1, T): a slice keeps the borders of the whole row, see `slice_of_row`. Where
    documents begin alike, `prefixes` says which tokens `input_ids` and `position_ids` (1, N) still hold (prefixes.py);
    where tails were cut (tails.py), no tensor holds them, and `tokens` counts them all the same.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    shift_labels: torch.Tensor
    cu_seqlens: torch.Tensor
    seq_lens: list[int]
    supervised_tokens: int
    tokens: int
    prefixes: Prefixes | None = None

    @property
    def computed_tokens(self) -> int:
        """Those that the model computes."""
        return min(self.tokens, self.input_ids.shape[1])  # a slice of a padded row holds more than its real ones

    def to(self, device: Any) -> Batch:
        """The same batch with its tensors on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device, non_blocking=True) if hasattr(v, "to") else v for k, v in values.items()})


def collate(packs: Sequence[Sequence[Document]], *, isolate: bool = True) -> Batch:
    """Lay packs of documents, each `(input_ids, labels)` of equal length, into one row.

    With `isolate=False` the documents of one pack see each other and positions run on through the pack (packs never see
    each other, and labels are shifted inside each document either way).
    """
    import torch

    packs = [[document for document in pack if len(document[0])] for pack in packs]
    documents = [document for pack in packs for document in pack]
    empty = np.zeros(0, dtype=np.int64)
    input_ids = np.concatenate([empty, *(ids for ids, _ in documents)])
    labels = np.concatenate([empty, *(labels for _, labels in documents)])
    lengths = [len(ids) for ids, _ in documents]
    shift_labels = np.full_like(labels, IGNORE)
    shift_labels[:-1] = labels[1:]
    shift_labels[np.cumsum(lengths, dtype=np.int64) - 1] = IGNORE  # a document's last token predicts nothing
    seq_lens = lengths if isolate else [n for pack in packs if (n := sum(len(ids) for ids, _ in pack))]
    starts = np.concatenate([[0], np.cumsum(seq_lens)]).astype(np.int64)
    positions = np.arange(len(input_ids)) - np.repeat(starts[:-1], seq_lens)
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        shift_labels=torch.from_numpy(shift_labels)[None],
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        seq_lens=seq_lens,
        supervised_tokens=int((shift_labels != IGNORE).sum()),
        tokens=len(input_ids),
    )


def slice_of_row(batch: Batch, part: int, parts: int) -> Batch:
    """One of `parts` equal slices of a row, for ranks that share it (train/sequence_parallel.py).

    Labels were shifted before, so the last token of a slice predicts the first of the next. A row that does not divide
    is padded by a document of its own without labels; an empty row becomes such a document alone. Borders stay those of
    the whole, padded row, because attention sees all of it:

        row, 5 tokens   a b c d e      part 0 of 2   a b c      seq_lens [3, 2, 1]
        documents       [3, 2]         part 1        d e +      seq_lens [3, 2, 1]   + is padding
    """
    import torch

    length = batch.input_ids.shape[1]
    width = max(1, -(-length // parts))
    padding, start = width * parts - length, part * width

    def cut(tensor: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, pad.to(tensor)[None]], dim=1)[:, start : start + width]

    shift_labels = cut(batch.shift_labels, torch.full((padding,), IGNORE))
    borders = [batch.cu_seqlens, batch.cu_seqlens.new_full((min(padding, 1),), length + padding)]
    return Batch(
        input_ids=cut(batch.input_ids, torch.zeros(padding)),
        position_ids=cut(batch.position_ids, torch.arange(padding)),
        shift_labels=shift_labels,
        cu_seqlens=torch.cat(borders),
        seq_lens=[*batch.seq_lens, padding] if padding else batch.seq_lens,
        supervised_tokens=int((shift_labels != IGNORE).sum()),
        tokens=min(max(length - start, 0), width),
    )


def pad_batch(documents: Sequence[Document], pad_id: int) -> dict[str, torch.Tensor]:
    """One document a row, right-padded: input_ids, labels and attention_mask, each (B, T)."""
    import torch

    longest = max(len(input_ids) for input_ids, _ in documents)
    shape = (len(documents), longest)
    input_ids, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    for row, (ids, targets) in enumerate(documents):
        input_ids[row, : len(ids)], labels[row, : len(ids)], mask[row, : len(ids)] = ids, targets, 1
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "attention_mask": torch.from_numpy(mask),
    }
