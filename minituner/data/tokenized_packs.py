"""Packs of exactly `packed_length` tokens from tokenised data, as InternEvo and XTuner make them.

Why: a pre-tokenised corpus is trained in rows of one length. Each file is shuffled by itself (numpy RandomState, the
same seed for every file), its samples are laid end to end, and the row of tokens is cut every `packed_length`:

    file a, shuffled    2 2 2 2 2 2 2 0 0 0 0 1 1 1 1 1 1 1 1 1     sample numbers: 7 + 4 + 9 = 20 tokens
    packed_length 8    |<---- 8 ---->|<---- 8 ---->|<- 4 ->|
    pack 0              sample 2, then the first token of sample 0: cumulative_len 0 7 8, position_ids 0..6 0
    pack 2              the tail: a shorter pack (XTuner drops it, in each file)

Two departures from XTuner by default, each with a switch back: the tail is kept, and the first label of every piece is
-100, because the only token that could predict it belongs to another document. Lesson: notebook 04.
"""

from __future__ import annotations

import operator

import numpy as np

from minituner.data.tokenized import IGNORE_INDEX, IntArray, TokenizedData
from minituner.errors import UsageError


class TokenizedPacks:
    """A lazy sequence of packs; `[i]` reads its samples and gives a dictionary of int64 arrays.

    `input_ids`, `labels`, `position_ids` (P,), positions from 0 in every piece; `cumulative_len` (pieces + 1,).
    `lengths` holds the tokens of each pack, `per_file` the number of packs of each file, `orders` each file's shuffled
    sample numbers, `dropped_tokens` what was left out.
    """

    def __init__(
        self, data: TokenizedData, packed_length: int, seed: int, keep_tail: bool, mask_boundary_labels: bool
    ) -> None:
        self.data, self.packed_length, self.mask_boundary_labels = data, packed_length, mask_boundary_labels
        self.orders: list[IntArray] = []
        self._ends: list[IntArray] = []  # for each file, the token after each shuffled sample
        self.per_file: list[int] = []
        self.dropped_tokens = 0
        lengths = [np.empty(0, np.int64)]
        for first, stop in zip(data.starts[:-1], data.starts[1:], strict=True):
            order = packed_order(int(stop - first), seed)
            ends = np.cumsum(data.lengths[first:stop][order], dtype=np.int64)
            full, tail = divmod(int(ends[-1]), packed_length)
            packs = [packed_length] * full + [tail] * (keep_tail and tail > 0)
            self.dropped_tokens += 0 if keep_tail else tail
            self.orders.append(order)
            self._ends.append(ends)
            self.per_file.append(len(packs))
            lengths.append(np.array(packs, dtype=np.int64))
        self.lengths: IntArray = np.concatenate(lengths)
        self._starts = np.cumsum([0, *self.per_file], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """What pack `index` is made of: `(sample, start, stop)`, a sample's number in `data` and its tokens."""
        number = operator.index(index)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        order, ends, first = self.orders[file], self._ends[file], int(self.data.starts[file])
        begin = (number - int(self._starts[file])) * self.packed_length
        end = begin + int(self.lengths[number])
        found = []
        for row in range(int(np.searchsorted(ends, begin, side="right")), len(order)):
            sample = first + int(order[row])
            row_begin = int(ends[row]) - int(self.data.lengths[sample])
            if row_begin >= end:
                break
            if row_begin < ends[row]:  # a sample of no tokens is no piece
                found.append((sample, max(begin, row_begin) - row_begin, min(end, int(ends[row])) - row_begin))
        return found

    def __getitem__(self, index: int) -> dict[str, IntArray]:
        """Pack `index`. Raises: IndexError; DataError for a sample that cannot be read."""
        pieces = self.pieces(index)
        input_ids, labels = [], []
        for sample, start, stop in pieces:
            read = self.data[sample]
            input_ids.append(read["input_ids"][start:stop])
            labels.append(read["labels"][start:stop])
        cumulative_len = np.cumsum([0, *(stop - start for _, start, stop in pieces)], dtype=np.int64)
        pack = {
            "input_ids": np.concatenate(input_ids),
            "labels": np.concatenate(labels),
            "cumulative_len": cumulative_len,
            "position_ids": np.concatenate([np.arange(stop - start, dtype=np.int64) for _, start, stop in pieces]),
        }
        if self.mask_boundary_labels:
            pack["labels"][cumulative_len[:-1]] = IGNORE_INDEX
        return pack


def packed_order(count: int, seed: int = 1024) -> IntArray:
    """The order (count,) in which InternEvo lays a file's samples: a numpy RandomState shuffle with that seed."""
    order = np.arange(count, dtype=np.int64)
    np.random.RandomState(seed).shuffle(order)
    return order


def pack_tokenized(
    data: TokenizedData,
    packed_length: int = 8192,
    seed: int = 1024,
    keep_tail: bool = True,
    mask_boundary_labels: bool = True,
) -> TokenizedPacks:
    """Pack every file of `data` to rows of `packed_length` tokens, lazily: nothing but the lengths is read here.

    `keep_tail=False, mask_boundary_labels=False` gives XTuner's `build_packed_dataset`, pack for pack.

    Raises:
        UsageError: packed_length below 1, or a seed outside 0 to 2**32 - 1.
    """
    if packed_length < 1:
        raise UsageError(f"packed_length: {packed_length} is not a row length", fix="give 1 or more tokens, e.g. 8192")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed: {seed} is outside 0 to 2**32 - 1", why="numpy's RandomState takes no other")
    return TokenizedPacks(data, packed_length, seed, keep_tail, mask_boundary_labels)
