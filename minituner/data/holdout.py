"""Holding out: some records are never trained on, so that a loss on them says what the model learned beyond them.

    records          0  1  2  3  4  5  6  7  8  9      data.holdout: 0.2
    trained          0  1     3  4  5     7  8  9
    held out               2           6               every `evaluate.every_steps`: eval_loss over these

A record is drawn by a number made from its own tokens and the seed, before anything is packed. So a record that is in
the data twice is held out both times or not at all (a copy in training would flatter the loss), all parts of a split
document stay on one side, ranks agree without a word, and adding records leaves nearly all earlier choices as they
were. Nothing is tokenised again: both sides are rows of the same prepared file. Lesson: notebook 07.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from minituner.data.encoding import IGNORE, Encoded
from minituner.data.ledger import Ledger
from minituner.errors import UsageError

if TYPE_CHECKING:
    import datasets

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def held_out(dataset: datasets.Dataset, documents_per_source: Sequence[int], share: float, seed: int) -> NDArray:
    """Which documents are held out, (documents,) bool: a share of the different records, at least one.

    Raises:
        UsageError: too few different records to train on some and hold out others.
    """
    record = record_numbers(dataset, documents_per_source)
    keys = _record_keys(dataset, record)
    different = np.unique(keys)
    if len(different) < 2:
        raise UsageError(
            f"data.holdout={share}: the data has {len(different)} different record(s)",
            why="equal records are held out together, and some must be left to train on",
            fix="add data, or set data.holdout=0",
        )
    count = min(max(round(share * len(different)), 1), len(different) - 1)
    drawn = different[np.argsort(_mix(different ^ _mix(np.uint64([seed]))), kind="stable")[:count]]
    return np.isin(keys, drawn)[record]


def record_numbers(dataset: datasets.Dataset, documents_per_source: Sequence[int]) -> NDArray[np.int64]:
    """The number of the record that each document was made from, (documents,): parts of one lie side by side."""
    import pyarrow.compute as pc

    where = dataset.data.column("where").combine_chunks() if len(dataset) else None
    first = np.ones(len(dataset), dtype=bool)
    if where is not None and len(dataset) > 1:
        first[1:] = pc.not_equal(where.slice(1), where.slice(0, len(where) - 1)).to_numpy(zero_copy_only=False)
    starts = np.cumsum([0, *documents_per_source])[:-1]
    first[starts[starts < len(dataset)]] = True
    return np.cumsum(first) - 1


def subtract(ledger: Ledger, dataset: datasets.Dataset, held: NDArray) -> None:
    """Move the held-out documents' tokens from trained and masked to `held_out`, to the token."""
    part = Ledger()
    for number, (ids, labels, kinds) in enumerate(_documents(dataset)):
        if held[number]:
            part.keep(Encoded(ids, labels != IGNORE, kinds))
    ledger.hold_out(part)


def _record_keys(dataset: datasets.Dataset, record: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A number for each record, (records,) uint64, made from its tokens and labels: equal records, equal numbers."""
    keys = np.zeros(int(record[-1]) + 1 if len(record) else 0, dtype=np.uint64)
    done = 0
    for ids, labels, _, offsets in _chunks(dataset):
        documents = len(offsets) - 1
        lengths = np.diff(offsets)
        position = (np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)).astype(np.uint64)
        tokens = ids.astype(np.uint64) * np.uint64(2) + (labels != IGNORE).astype(np.uint64)
        mixed = np.concatenate([_mix(tokens + GOLDEN * position), np.zeros(1, dtype=np.uint64)])
        sums = np.where(lengths > 0, np.add.reduceat(mixed, offsets[:-1]), np.uint64(0))
        inside = record[done : done + documents]
        # The parts of one record count in their order; a record may also begin in one chunk and end in the next.
        part = np.arange(done, done + documents) - np.searchsorted(record, inside)
        np.add.at(keys, inside, _mix(sums + GOLDEN * (part.astype(np.uint64) + np.uint64(1))))
        done += documents
    return keys


def _chunks(dataset: datasets.Dataset) -> Iterator[tuple[NDArray, NDArray, NDArray, NDArray[np.int64]]]:
    """(input_ids, labels, kinds, offsets) of one Arrow chunk at a time: all tokens together may not fit in memory."""
    table = dataset.data
    for ids, labels, kinds in zip(*(table.column(c).chunks for c in ("input_ids", "labels", "kinds")), strict=True):
        offsets = ids.offsets.to_numpy().astype(np.int64)
        yield (*(part.flatten().to_numpy() for part in (ids, labels, kinds)), offsets - offsets[0])


def _documents(dataset: datasets.Dataset) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
    for ids, labels, kinds, offsets in _chunks(dataset):
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            yield ids[start:end], labels[start:end], kinds[start:end]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit numbers, one to one (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
