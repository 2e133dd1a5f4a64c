"""The order in which records are seen: the same on every machine, for every epoch, after every restart.

An order is a pure function of (n, seed, epoch); nothing is remembered between calls. So resuming needs no saved
generator state: rebuild the list and skip the batches that were already seen, `batches(...)[batches_seen:]`.

    epoch_order   6 2 0 4 1 5 3                     every record exactly once
    global batch [6 2 0 4][1 5 3]                   world_size * batch_size records, the last one may be short
    rank 0       [6   0  ][1   3]                   dealt like cards: all ranks get the same number of batches,
    rank 1       [  2   4][  5  ]                   and a rank for which no card is left gets an empty batch

Most samplers repeat or drop records until every rank has equally many; then a record counts twice or never, and two
ranks no longer equal one. Here a short or empty last batch takes part with the weight it has (none), which is what
makes `1 rank == 2 ranks` exact.

The XTuner orders (`length_grouped_order`, `intern_repo_order`, `sequence_parallel_order`) are reproduced number for
number so that an imported run sees its data in the same order; they repeat or drop records as XTuner does, and say so.

Lesson: notebook 04 (and 07 for resuming).
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minituner.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

INTERN_REPO_SEED = 1024  # fixed in InternEvo and in XTuner: its sampler warns about any other seed and ignores it
MAX_MEGA_BATCHES = 50  # XTuner's largest group is 50 global batches; small data sets get at least 4 groups


def epoch_order(n: int, seed: int, epoch: int = 0, shuffle: bool = True) -> NDArray[np.int64]:
    """The record numbers 0 .. n-1 in the order of one epoch, (n,).

    Shuffling sorts raw 64-bit numbers of the Philox generator keyed by (seed, epoch). NumPy promises that these raw
    numbers never change between its versions; it does not promise that for `permutation` or `shuffle`.

    Raises:
        UsageError: n, seed or epoch below 0, or no whole number.
    """
    n, seed, epoch = (_whole(name, value, 0) for name, value in (("n", n), ("seed", seed), ("epoch", epoch)))
    if not shuffle:
        return np.arange(n, dtype=np.int64)
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def rank_slice(
    order: NDArray[np.int64], rank: int = 0, world_size: int = 1, batch_size: int = 1
) -> list[NDArray[np.int64]]:
    """One rank's micro-batches of an order: as many on every rank, together every entry of the order exactly once.

    Each global batch of `world_size * batch_size` entries is dealt in turn, so rank r sees `order[r::world_size]`. Only
    the last batch can be shorter than `batch_size`, or empty on some ranks.

    Raises:
        UsageError: a rank outside 0 .. world_size-1, or a size below 1.
    """
    world_size, batch_size = _whole("world_size", world_size, 1), _whole("batch_size", batch_size, 1)
    mine = order[_rank(rank, world_size) :: world_size]
    num_batches = -(-len(order) // (world_size * batch_size))
    return [mine[step * batch_size : (step + 1) * batch_size] for step in range(num_batches)]


def batches(
    n: int,
    *,
    seed: int,
    epoch: int = 0,
    shuffle: bool = True,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> list[NDArray[np.int64]]:
    """One rank's micro-batches of one epoch over n records (or packs); see `epoch_order` and `rank_slice`.

    Raises:
        UsageError: a number that is out of range.
    """
    return rank_slice(epoch_order(n, seed, epoch, shuffle), rank, world_size, batch_size)


def length_grouped_order(
    lengths: ArrayLike,
    batch_size: int,
    world_size: int = 1,
    *,
    seed: int,
    epoch: int = 0,
    mega_batch_mult: int | None = None,
    round_up: bool = False,
) -> NDArray[np.int64]:
    """XTuner's LengthGroupedSampler over all ranks: neighbours have similar lengths, the longest record comes first.

    A shuffled order is cut into groups of `mega_batch_mult` global batches and each group is sorted, longest first, so
    that little is padded; starting with the longest record shows an out-of-memory at once. Signed `lengths`, (n,), are
    XTuner's modality lengths (positive with image, negative text only): the two are grouped apart. Give the
    result to `rank_slice`. With `round_up` it is as long as XTuner's: records from the start of the order are repeated
    until every batch is full; without, every record is in it once.

    Raises:
        DataError: lengths that are not whole numbers, or a length of 0.
        UsageError: a number that is out of range.
    """
    sizes = np.asarray(lengths)
    batch_size, world_size = _whole("batch_size", batch_size, 1), _whole("world_size", world_size, 1)
    if sizes.size == 0:
        return np.zeros(0, dtype=np.int64)
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu":
        raise DataError(f"lengths must be one flat list of whole numbers, not {sizes.dtype} of shape {sizes.shape}")
    sizes = sizes.astype(np.int64, copy=False)
    if not sizes.all():
        empty = np.flatnonzero(sizes == 0)
        raise DataError(
            f"{len(empty)} of {len(sizes)} records are empty, the first is record {empty[0]}",
            why="the sign of a length is its modality, and 0 has none",
            fix="drop empty records before grouping by length",
        )
    global_batch = batch_size * world_size
    if mega_batch_mult is None:
        mega_batch_mult = min(len(sizes) // (4 * global_batch), MAX_MEGA_BATCHES) or 1
    group_size = _whole("mega_batch_mult", mega_batch_mult, 1) * global_batch
    generator = _torch_generator(seed, epoch)

    with_image, text_only = np.flatnonzero(sizes > 0), np.flatnonzero(sizes < 0)
    sizes = np.abs(sizes)
    if len(with_image) and len(text_only):
        groups, leftovers = [], []
        for kind in (with_image, text_only):
            *full, last = _sorted_groups(kind, sizes, group_size, generator)
            groups += full
            leftovers.append(last)
        groups = [groups[i] for i in _randperm(len(groups), generator)]
        mixed = np.concatenate(leftovers)
        groups.append(mixed[np.argsort(-sizes[mixed], kind="stable")])
    else:
        groups = _sorted_groups(np.arange(len(sizes)), sizes, group_size, generator)
    longest = int(np.argmax([sizes[group[0]] for group in groups]))
    groups[0][0], groups[longest][0] = groups[longest][0], groups[0][0]
    order = np.concatenate(groups)
    return np.resize(order, -(-len(order) // global_batch) * global_batch) if round_up else order


def intern_repo_order(
    n: int, world_size: int = 1, rank: int = 0, epoch: int = 0, shuffle: bool = True
) -> NDArray[np.int64]:
    """XTuner's InternRepoSampler (InternEvo's order), (n // world_size,): up to world_size - 1 records are dropped.

    Raises:
        UsageError: a number that is out of range.
    """
    n, world_size, epoch = _whole("n", n, 0), _whole("world_size", world_size, 1), _whole("epoch", epoch, 0)
    order = np.arange(n, dtype=np.int64)
    if shuffle:
        np.random.RandomState(INTERN_REPO_SEED + epoch).shuffle(order)
    return order[_rank(rank, world_size) : n - n % world_size : world_size]


def sequence_parallel_order(
    n: int,
    world_size: int = 1,
    rank: int = 0,
    *,
    seed: int,
    epoch: int = 0,
    shuffle: bool = True,
    round_up: bool = True,
) -> NDArray[np.int64]:
    """XTuner's SequenceParallelSampler: all ranks of one sequence group share a data-parallel rank, thus their records.

    `world_size` and `rank` are the data-parallel ones (world size / sequence-parallel size). With `round_up` records
    from the start of the order are repeated until every rank has ceil(n / world_size).

    Raises:
        UsageError: a number that is out of range.
    """
    n, world_size = _whole("n", n, 0), _whole("world_size", world_size, 1)
    generator = _torch_generator(seed, epoch)
    order = _randperm(n, generator) if shuffle else np.arange(n, dtype=np.int64)
    if round_up and n:
        order = np.resize(order, -(-n // world_size) * world_size)
    return order[_rank(rank, world_size) :: world_size]


def _sorted_groups(
    records: NDArray[np.int64], sizes: NDArray[np.int64], group_size: int, generator: torch.Generator
) -> list[NDArray[np.int64]]:
    """The records shuffled, cut into groups, and each group sorted from long to short (equal ones stay as shuffled)."""
    shuffled = records[_randperm(len(records), generator)]
    group = np.arange(len(shuffled)) // group_size
    ordered = shuffled[np.lexsort((-sizes[shuffled], group))]
    return [ordered[begin : begin + group_size] for begin in range(0, len(ordered), group_size)]


def _torch_generator(seed: int, epoch: int) -> torch.Generator:
    """A torch generator seeded as XTuner and mmengine do: seed + epoch."""
    import torch  # only these orders need it, and it takes seconds to load

    return torch.Generator().manual_seed(_whole("seed", seed, 0) + _whole("epoch", epoch, 0))


def _randperm(n: int, generator: torch.Generator) -> NDArray[np.int64]:
    """`torch.randperm(n, generator)` as an array, (n,)."""
    import torch

    return torch.randperm(n, generator=generator).numpy()


def _whole(name: str, value: int, at_least: int) -> int:
    """The value as an int that is large enough, or a UsageError naming it."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise UsageError(f"{name} must be a whole number, not {value!r}") from error
    if not at_least <= number < 2**64:
        raise UsageError(f"{name}={number} is out of range", fix=f"use at least {at_least}")
    return number


def _rank(rank: int, world_size: int) -> int:
    """The rank, checked against the world size."""
    if (number := _whole("rank", rank, 0)) >= world_size:
        raise UsageError(
            f"rank={number} does not exist with world_size={world_size}", fix=f"ranks count from 0 to {world_size - 1}"
        )
    return number
