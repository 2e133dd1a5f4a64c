"""Packing: put many short records into few long sequences, so that no step is spent on padding.

A batch is a rectangle. Records of 3, 5 and 8 tokens in a rectangle of three rows waste a third of it; laid end to end
they fill two rows of 8 without a gap. Attention keeps them apart (`seq_lens`, `cu_seqlens`), and positions restart:

    lengths    5 3 8 2 6        max_length 8

    none       best_fit         concat (XTuner's)
    |00000...| |22222222|       |00000111|   `best_fit` never splits a record: largest first, each into the fullest bin
    |111.....| |44444433|       |22222222|   that still has room. `concat` lays everything in one line and cuts it every
    |22222222| |00000111|       |33444444|   max_length tokens, so that a record may continue in the next pack; the
    |33......|                               shorter last pack is kept. `none` is one record a pack.
    |444444..|

Best-fit, as it is taught (and as the tests check it):

    bins = []                                                           # the room left in each bin
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(bins) if room >= length]
        if not fitting:
            fitting = [len(bins)]
            bins.append(max_length)
        tightest = min(fitting, key=lambda i: bins[i])
        bins[tightest] -= length

That loop visits every record and every bin. Ours gives the same bins but only looks at the histogram: all records of a
length are equal, so are all bins with the same room, and one step moves a whole group of bins. The work in Python
depends on `max_length`; the ten million records are only counted, sorted by length and copied once, by numpy.

>>> packs = pack([5, 3, 8, 2, 6], max_length=8)
>>> packs.to_list(), packs.fill
([[2], [4, 3], [0, 1]], 1.0)
>>> pack([5, 3, 9], max_length=8, strategy="concat").to_list()
[[(0, 0, 5), (1, 0, 3)], [(2, 0, 8)], [(2, 8, 9)]]
>>> position_ids([3, 2]).tolist(), cu_seqlens([3, 2]).tolist()
([0, 1, 2, 0, 1], [0, 3, 5])

Lesson: notebook 04.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minituner.errors import DataError, UsageError, nearest

STRATEGIES = ("best_fit", "concat", "none")
RADIX_BITS = 16  # numpy's stable sort is a linear radix sort for 16-bit keys, a slower merge sort for wider ones


@dataclass(frozen=True, eq=False)
class _Rows:
    """Packs of different sizes in two flat arrays: pack p is `values[offsets[p]:offsets[p + 1]]`."""

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    """Tokens in each pack, (packs,)."""
    max_length: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        at = operator.index(index)
        if not -len(self) <= at < len(self):
            raise IndexError(f"pack {at} of {len(self)}")
        at %= len(self)
        return self.values[self.offsets[at] : self.offsets[at + 1]]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self[at] for at in range(len(self)))

    @property
    def fill(self) -> float:
        """The share of `len(packs) * max_length` places that hold a token, 0 to 1; 0 when there is no pack."""
        return float(self.lengths.sum() / (len(self) * self.max_length)) if len(self) else 0.0


class Packs(_Rows):
    """Packs of whole records: each is an array of record numbers, (records in the pack,)."""

    @property
    def order(self) -> NDArray[np.int64]:
        """All record numbers, pack after pack: every record once, (records,)."""
        return self.values

    def to_list(self) -> list[list[int]]:
        """The packs as plain lists of record numbers."""
        return [pack.tolist() for pack in self]


class Pieces(_Rows):
    """Packs of pieces of records: each is an array of rows (record, start, end), (pieces in the pack, 3)."""

    @property
    def pieces(self) -> NDArray[np.int64]:
        """All pieces, pack after pack, (pieces, 3)."""
        return self.values

    def to_list(self) -> list[list[tuple[int, int, int]]]:
        """The packs as plain lists of `(record, start, end)`."""
        return [[(record, start, end) for record, start, end in pack.tolist()] for pack in self]


def pack(lengths: ArrayLike, max_length: int = 4096, strategy: str = "best_fit") -> Packs | Pieces:
    """Plan which records share a pack of at most `max_length` tokens; the same input always gives the same plan.

    `lengths` are tokens per record, (records,), whole numbers from 0 up. "best_fit" and "none" return `Packs`, "concat"
    returns `Pieces`. Every record is in the plan exactly once, empty ones too (they cost nothing). The packs of
    "best_fit" begin with the longest records: train in a shuffled order (`order.epoch_order(len(packs), seed)`).
    Source: Johnson 1974; for language models Ding et al. 2024 (arXiv 2404.10830).

    Raises:
        DataError: lengths that are not whole numbers, are negative, or (unless "concat") exceed `max_length`.
        UsageError: an unknown strategy or an impossible `max_length`.
    """
    if strategy not in STRATEGIES:
        hint = nearest(str(strategy), STRATEGIES)
        raise UsageError(
            f"unknown packing strategy {strategy!r}", why=hint, fix=f"use one of {', '.join(map(repr, STRATEGIES))}"
        )
    tokens, max_length = _checked_lengths(lengths), _checked_max_length(max_length)
    if strategy == "concat":
        return _concat(tokens, max_length)
    if len(tokens) and (longest := int(tokens.max())) > max_length:
        raise DataError(
            f"{np.count_nonzero(tokens > max_length)} of {len(tokens)} records are longer than max_length={max_length};"
            f" the longest (record {int(tokens.argmax())}) has {longest} tokens",
            why=f"packing {strategy!r} never cuts a record",
            fix=f"truncate, split or drop long records before packing, raise max_length to {longest}, or use 'concat'",
        )
    if strategy == "none":
        everything = np.arange(len(tokens) + 1, dtype=np.int64)
        return Packs(everything[:-1], everything, tokens, max_length)
    return _best_fit(tokens, max_length)


def seq_lens(pack: NDArray[np.int64], lengths: ArrayLike | None = None) -> NDArray[np.int64]:
    """Tokens of each document (or piece of one) in a pack, (documents,).

    A pack of pieces knows its own lengths; a pack of record numbers needs the `lengths` given to `pack`.

    Raises:
        UsageError: a pack of record numbers without `lengths`.
    """
    if pack.ndim == 2:
        return pack[:, 2] - pack[:, 1]
    if lengths is None:
        raise UsageError(
            "seq_lens of whole records needs their lengths", fix="call seq_lens(pack, lengths) with pack()'s lengths"
        )
    return np.asarray(lengths, dtype=np.int64)[pack]


def position_ids(seq_lens: ArrayLike) -> NDArray[np.int64]:
    """Positions of the packed tokens, counted from 0 again in every document, (T,)."""
    lens = _checked_lengths(seq_lens)
    starts = np.cumsum(lens) - lens
    return np.arange(lens.sum(), dtype=np.int64) - np.repeat(starts, lens)


def cu_seqlens(seq_lens: ArrayLike) -> NDArray[np.int32]:
    """Where documents begin and end, (documents + 1,), int32 as variable-length attention kernels want it.

    Raises:
        DataError: more tokens than int32 counts.
    """
    borders = np.concatenate(([0], np.cumsum(_checked_lengths(seq_lens))))
    if borders[-1] > np.iinfo(np.int32).max:
        raise DataError(
            f"a pack of {borders[-1]} tokens is too long for int32 cu_seqlens", fix="use a smaller max_length"
        )
    return borders.astype(np.int32)


def _checked_lengths(lengths: ArrayLike) -> NDArray[np.int64]:
    """The lengths as int64, (records,), or the reason why they are not lengths."""
    try:
        array = np.asarray(lengths)
    except ValueError as error:
        raise DataError(f"lengths must be one flat list of whole numbers: {error}") from error
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"lengths must be one flat list of whole numbers, not {array.dtype} of shape {array.shape}",
            fix="pass [len(sample['input_ids']) for sample in samples]",
        )
    array = array.astype(np.int64, copy=False)
    if (shortest := int(array.min())) < 0:
        raise DataError(
            f"{np.count_nonzero(array < 0)} lengths are negative; record {int(array.argmin())} has {shortest}",
            why="a signed length marks the modality for length-grouped orders; it is no number of tokens",
            fix="pass abs(length)",
        )
    return array


def _checked_max_length(max_length: int) -> int:
    """`max_length` as a positive int."""
    try:
        value = operator.index(max_length)
    except TypeError as error:
        raise UsageError(f"max_length must be a whole number, not {max_length!r}") from error
    if value < 1:
        raise UsageError(f"max_length={value} leaves no room for a token", fix="use at least 1, e.g. 4096")
    return value


def _concat(tokens: NDArray[np.int64], max_length: int) -> Pieces:
    """Cut one line of all records every `max_length` tokens; the shorter last pack stays."""
    ends = np.cumsum(tokens)
    begins = ends - tokens
    total = int(ends[-1]) if len(tokens) else 0
    num_packs = max(-(-total // max_length), min(len(tokens), 1))
    pieces_of = np.maximum(ends - 1, begins) // max_length - begins // max_length + 1  # an empty record is one piece
    record = np.repeat(np.arange(len(tokens), dtype=np.int64), pieces_of)
    nth_piece = np.arange(len(record)) - np.repeat(np.cumsum(pieces_of) - pieces_of, pieces_of)
    # An empty record exactly at the end of the line belongs to the last pack, not to a pack of its own.
    in_pack = np.minimum(begins[record] // max_length, max(num_packs - 1, 0)) + nth_piece
    pieces = np.empty((len(record), 3), dtype=np.int64)
    pieces[:, 0] = record
    pieces[:, 1] = np.maximum(begins[record], in_pack * max_length) - begins[record]
    pieces[:, 2] = np.minimum(ends[record], (in_pack + 1) * max_length) - begins[record]
    offsets = np.searchsorted(in_pack, np.arange(num_packs + 1)).astype(np.int64)
    pack_lengths = np.diff(np.minimum(np.arange(num_packs + 1, dtype=np.int64) * max_length, total))
    return Pieces(pieces, offsets, pack_lengths, max_length)


def _best_fit(tokens: NDArray[np.int64], max_length: int) -> Packs:
    """Best-fit decreasing: plan with the histogram, then copy record numbers to their places."""
    counts = np.bincount(tokens) if len(tokens) else np.zeros(1, dtype=np.int64)
    by_length = _stable_order(tokens)
    steps, num_packs = _best_fit_steps(counts, max_length)
    size, first, bins, each = np.array(steps, dtype=np.int64).reshape(-1, 4).T

    # A step adds `each` records to the packs first .. first + bins - 1: write both ends, sum up.
    change, token_change = np.zeros(num_packs + 1, dtype=np.int64), np.zeros(num_packs + 1, dtype=np.int64)
    for array, amount in ((change, each), (token_change, each * size)):
        np.add.at(array, first, amount)
        np.add.at(array, first + bins, -amount)
    pack_lengths = np.cumsum(token_change)[:-1]
    offsets = np.concatenate(([0], np.cumsum(np.cumsum(change)[:-1])))

    order = np.empty(len(tokens), dtype=np.int64)
    free, taken = offsets[:-1].copy(), np.cumsum(counts) - counts
    for length, begin, count, per_bin in steps:
        source = by_length[taken[length] : taken[length] + count * per_bin]
        taken[length] += count * per_bin
        places = free[begin : begin + count]
        for nth in range(per_bin):
            order[places + nth] = source[nth::per_bin]
        places += per_bin

    if empty := int(counts[0]):  # empty records ride along in the last pack
        offsets[-1] += empty
        order[len(order) - empty :] = by_length[:empty]
        if num_packs == 0:
            offsets, pack_lengths = np.array([0, empty]), np.zeros(1, dtype=np.int64)
    return Packs(order, offsets, pack_lengths, max_length)


def _best_fit_steps(counts: NDArray[np.int64], max_length: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """The steps `(length, first bin, bins, records a bin)` of best-fit decreasing, and how many bins it opens.

    `counts[length]` is the number of records of that length. Every step either uses up a length or makes a group of
    bins too full for it, and a group becomes of use again only when the lengths have come down to its room: so the
    groups visited are a small multiple of `max_length`, however many records there are.
    """
    steps: list[tuple[int, int, int, int]] = []
    groups: dict[int, list[tuple[int, int]]] = {}  # room left -> ranges (first bin, bins)
    usable: list[int] = []  # rooms >= length, the tightest on top
    too_full: list[int] = []  # rooms < length, negated: a heap with the largest first
    num_bins = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        if length == 0:
            break
        while too_full and -too_full[0] >= length:  # all tighter than what is usable already: the stack stays sorted
            usable.append(-heappop(too_full))
        while left:
            if not usable:
                opened = -(-left // (max_length // length))
                groups[max_length] = [(num_bins, opened)]
                usable.append(max_length)
                num_bins += opened
            room = usable[-1]
            first, available = groups[room].pop()
            each = min(room // length, left)
            bins = min(available, left // each)
            steps.append((length, first, bins, each))
            left -= bins * each
            if bins < available:
                groups[room].append((first + bins, available - bins))
            if not groups[room]:
                del groups[usable.pop()]
            if rest := room - each * length:
                if rest not in groups:
                    groups[rest] = []
                    if rest >= length:
                        usable.append(rest)
                    else:
                        heappush(too_full, -rest)
                groups[rest].append((first, bins))
    return steps, num_bins


def _stable_order(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Record numbers by rising length, equal lengths in their own order: a radix sort, linear in records."""
    order = np.argsort(tokens.astype(np.uint16), kind="stable")  # the low 16 bits
    longest = int(tokens.max()) if len(tokens) else 0
    for shift in range(RADIX_BITS, longest.bit_length(), RADIX_BITS):
        high = (tokens >> shift).astype(np.uint16)
        order = order[np.argsort(high[order], kind="stable")]
    return order
