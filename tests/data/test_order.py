"""Orders: every record exactly once, the same after a restart, and XTuner's orders number for number."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.data.order import (
    batches,
    epoch_order,
    intern_repo_order,
    length_grouped_order,
    rank_slice,
    sequence_parallel_order,
)
from minituner.errors import DataError, UsageError
from tests.shared_data import golden_lines, needs_shared

SAMPLERS = golden_lines("samplers.jsonl")
COVERED = ("LengthGroupedSampler", "InternRepoSampler", "SequenceParallelSampler")

small = settings(max_examples=100, deadline=None)
layouts = st.tuples(st.integers(0, 80), st.integers(1, 5), st.integers(1, 5))  # n, batch_size, world_size
seeds = st.integers(0, 2**64 - 1)


# our order


@small
@given(st.integers(0, 300), seeds, st.integers(0, 50))
def test_an_epoch_is_a_permutation_and_depends_on_nothing_else(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert order.dtype == np.int64
    np.random.seed(epoch)  # must not matter
    assert np.array_equal(order, epoch_order(n, seed, epoch))


def test_the_order_is_fixed_for_good():
    """Written down, so that a checkpoint resumed under another NumPy or on another machine continues the same epoch."""
    assert epoch_order(10, seed=42, epoch=0).tolist() == [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]
    assert epoch_order(10, seed=42, epoch=1).tolist() == [4, 9, 5, 3, 0, 2, 7, 1, 6, 8]


def test_seeds_and_epochs_give_different_orders():
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(10) for epoch in range(10)]
    assert len(set(orders)) == 100  # seed + epoch would make (0, 1) and (1, 0) the same epoch
    assert epoch_order(5, seed=3, shuffle=False).tolist() == [0, 1, 2, 3, 4]


@small
@given(layouts, seeds, st.booleans())
def test_ranks_share_every_record_exactly_once_in_equally_many_batches(layout, seed, shuffle):
    n, batch_size, world_size = layout
    ranks = [
        batches(n, seed=seed, epoch=3, shuffle=shuffle, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(mine) for mine in ranks} == {math.ceil(n / (batch_size * world_size))}
    seen = [record for mine in ranks for batch in mine for record in batch.tolist()]
    assert sorted(seen) == list(range(n))
    for mine in ranks:
        assert all(len(batch) == batch_size for batch in mine[:-1])
        assert all(len(batch) <= batch_size for batch in mine)
    order = epoch_order(n, seed, 3, shuffle)
    for step, together in enumerate(zip(*ranks, strict=True)):  # a step sees the same records however many ranks
        begin = step * batch_size * world_size
        assert sorted(np.concatenate(together)) == sorted(order[begin : begin + batch_size * world_size])


def test_the_last_batch_is_dealt_evenly_and_may_be_empty():
    ranks = [
        [batch.tolist() for batch in batches(5, seed=0, shuffle=False, batch_size=1, rank=rank, world_size=4)]
        for rank in range(4)
    ]
    assert ranks == [[[0], [4]], [[1], []], [[2], []], [[3], []]]
    assert [rank_slice(np.arange(6), rank, 2, 2)[-1].tolist() for rank in range(2)] == [[4], [5]]


def test_resuming_is_skipping():
    settings = {"seed": 7, "epoch": 2, "batch_size": 3, "rank": 1, "world_size": 2}
    whole, again = batches(50, **settings), batches(50, **settings)[4:]
    assert [batch.tolist() for batch in whole[4:]] == [batch.tolist() for batch in again]


def test_our_order_does_not_load_torch():
    code = "import sys; from minituner.data.order import batches; batches(9, seed=1); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# XTuner's orders


def test_every_golden_sampler_is_covered():
    assert {case["sampler"] for case in SAMPLERS} <= set(COVERED)


@needs_shared
@pytest.mark.parametrize("case", SAMPLERS, ids=lambda case: case["id"])
def test_xtuners_sampler(case):
    if case["sampler"] == "LengthGroupedSampler":
        arguments = {key: case.get(key) for key in ("world_size", "seed", "epoch", "mega_batch_mult")}
        size, rank, world = case["per_device_batch_size"], case["rank"], case["world_size"]
        if "error" in case:
            with pytest.raises(DataError, match="1 of 3 records are empty, the first is record 1"):
                length_grouped_order(case["lengths"], size, **arguments)
            return
        order = length_grouped_order(case["lengths"], size, **arguments, round_up=case["round_up"])
        assert len(order) == case["output"]["total_size"]
        got = np.concatenate(rank_slice(order, rank, world, size))
    elif case["sampler"] == "InternRepoSampler":
        got = intern_repo_order(case["n"], case["dp_world_size"], case["dp_rank"], case["epoch"], case["shuffle"])
    else:
        ranks = {"world_size": case["dp_world_size"], "rank": case["dp_rank"]}
        options = {key: case[key] for key in ("seed", "epoch", "shuffle", "round_up") if key in case}
        got = sequence_parallel_order(case["n"], **ranks, **options)
    assert got.tolist() == case["output"]["indices"]
    assert len(got) == case["output"]["len"]


signed = st.lists(st.integers(-50, 50).filter(bool), max_size=80)


@small
@given(signed, st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_length_grouping_keeps_every_record_once_unless_rounded_up(lengths, batch_size, world_size, seed):
    order = length_grouped_order(lengths, batch_size, world_size, seed=seed, epoch=1)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    if lengths:
        assert abs(lengths[order[0]]) == max(map(abs, lengths))
    rounded = length_grouped_order(lengths, batch_size, world_size, seed=seed, epoch=1, round_up=True)
    assert len(rounded) == math.ceil(len(lengths) / (batch_size * world_size)) * batch_size * world_size
    assert rounded.tolist() == [order[i % len(order)] for i in range(len(rounded))]  # trap: records count twice


def test_length_groups_hold_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)
    order = length_grouped_order(lengths, 4, 2, seed=0)

    def padding(one):
        return (lengths[one].reshape(-1, 8).max(axis=1, keepdims=True) - lengths[one].reshape(-1, 8)).mean()

    assert padding(order) < padding(epoch_order(4000, 0)) / 10


@small
@given(st.integers(0, 60), st.integers(1, 5), st.integers(0, 9), st.booleans())
def test_strided_xtuner_orders(n, world_size, epoch, shuffle):
    repo = [intern_repo_order(n, world_size, rank, epoch, shuffle).tolist() for rank in range(world_size)]
    kept = sorted(chain.from_iterable(repo))
    assert {len(mine) for mine in repo} == {n // world_size}  # trap: the rest is dropped
    assert len(set(kept)) == len(kept) == n // world_size * world_size

    def of(rank, round_up):
        return sequence_parallel_order(
            n, world_size, rank, seed=5, epoch=epoch, shuffle=shuffle, round_up=round_up
        ).tolist()

    assert sorted(chain.from_iterable(of(rank, False) for rank in range(world_size))) == list(range(n))
    rounded = [of(rank, True) for rank in range(world_size)]
    assert {len(mine) for mine in rounded} == {math.ceil(n / world_size)}  # trap: the first are repeated
    assert set(chain.from_iterable(rounded)) == set(range(n))


def test_sequence_parallel_order_is_torchs_permutation():
    import torch

    expected = torch.randperm(11, generator=torch.Generator().manual_seed(8 + 3)).tolist()
    got = [sequence_parallel_order(11, 2, rank, seed=8, epoch=3).tolist() for rank in range(2)]
    assert got == [(expected + expected[:1])[rank::2] for rank in range(2)]


# refusals


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: epoch_order(-1, 0), "n=-1"),
        (lambda: epoch_order(3, -1), "seed=-1"),
        (lambda: epoch_order(3, 2**64), "seed="),
        (lambda: epoch_order(3, 0.5), "seed must be a whole number"),
        (lambda: batches(3, seed=0, rank=2, world_size=2), "rank=2 does not exist with world_size=2"),
        (lambda: batches(3, seed=0, batch_size=0), "batch_size=0"),
        (lambda: intern_repo_order(3, 0), "world_size=0"),
        (lambda: sequence_parallel_order(3, 2, -1, seed=0), "rank=-1"),
        (lambda: length_grouped_order([1], 1, seed=0, mega_batch_mult=0), "mega_batch_mult=0"),
    ],
)
def test_numbers_out_of_range_are_refused(call, words):
    with pytest.raises(UsageError, match=words):
        call()


@pytest.mark.parametrize("lengths", [[1.5], [[1, 2]], ["一"]])
def test_lengths_must_be_whole_numbers(lengths):
    with pytest.raises(DataError, match="whole numbers"):
        length_grouped_order(lengths, 1, seed=0)
