"""Packing: every token in exactly one place, no pack too long, and XTuner's chunks where XTuner keeps its tokens."""

from __future__ import annotations

import doctest
import json
from collections.abc import Iterable
from hashlib import sha256
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.data import packing
from minituner.data.packing import Packs, Pieces, cu_seqlens, pack, position_ids, seq_lens
from minituner.errors import DataError, UsageError
from tests.shared_data import golden_lines, needs_shared

PACKER = golden_lines("packer.jsonl")
SAMPLES = {line["dataset"]: line for line in golden_lines("packer_samples.jsonl")}
PROCESS = {line["id"]: line for line in golden_lines("process_hf_dataset.jsonl")}

Sample = tuple[list[int], list[int]]  # input_ids, labels
Chunk = list[Sample]

small = settings(max_examples=150, deadline=None)


@st.composite
def records_and_capacity(draw, fits=True):
    max_length = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(0, max_length if fits else 100), max_size=60))
    return lengths, max_length


def taught_best_fit(lengths: list[int], max_length: int) -> list[int]:
    """The loop of the module docstring: the tokens in each bin, bins in the order they were opened."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if not fitting:
            fitting = [len(rooms)]
            rooms.append(max_length)
        rooms[min(fitting, key=lambda i: rooms[i])] -= length
    return [max_length - room for room in rooms]


# best_fit and none


@small
@given(records_and_capacity(), st.sampled_from(["best_fit", "none"]))
def test_every_record_is_in_exactly_one_pack_that_holds_it(case, strategy):
    lengths, max_length = case
    packs = pack(lengths, max_length, strategy)
    assert isinstance(packs, Packs)
    assert sorted(record for records in packs.to_list() for record in records) == list(range(len(lengths)))
    held = [sum(lengths[record] for record in records) for records in packs.to_list()]
    assert packs.lengths.tolist() == held
    assert max(held, default=0) <= max_length
    assert all(len(records) for records in packs)
    assert packs.fill == pytest.approx(sum(held) / (len(packs) * max_length) if len(packs) else 0.0)
    assert packs.order.dtype == packs.offsets.dtype == packs.lengths.dtype == np.int64


@small
@given(records_and_capacity())
def test_the_histogram_gives_the_bins_of_the_taught_loop(case):
    lengths, max_length = case
    lengths = [length for length in lengths if length]
    assert sorted(pack(lengths, max_length).lengths.tolist()) == sorted(taught_best_fit(lengths, max_length))


@small
@given(records_and_capacity())
def test_equal_lengths_are_used_in_record_order(case):
    lengths, max_length = case
    lengths = [min(length, 3) for length in lengths]  # few lengths, many ties
    packs = pack(lengths, max(max_length, 3))
    for records in packs.to_list():
        assert records == sorted(records, key=lambda record: (-lengths[record], record))
    assert packs.to_list() == pack(np.array(lengths, dtype=np.uint16), max(max_length, 3)).to_list()


def test_first_packs_hold_the_first_of_equal_records():
    assert pack([4, 4, 4, 4, 4], 8).to_list() == [[0, 1], [2, 3], [4]]


def test_none_is_one_record_a_pack_in_order():
    assert pack([3, 0, 5], 8, "none").to_list() == [[0], [1], [2]]


def test_empty_records_ride_along_and_cost_nothing():
    assert pack([0, 8, 0], 8).to_list() == [[1, 0, 2]]
    packs = pack([0, 0], 8)
    assert (packs.to_list(), packs.lengths.tolist(), packs.fill) == ([[0, 1]], [0], 0.0)
    assert pack([0, 0], 8, "concat").to_list() == [[(0, 0, 0), (1, 0, 0)]]
    assert pack([8, 0], 8, "concat").to_list() == [[(0, 0, 8), (1, 0, 0)]]
    assert pack([8, 0, 1], 8, "concat").to_list() == [[(0, 0, 8)], [(1, 0, 0), (2, 0, 1)]]


@pytest.mark.parametrize("strategy", packing.STRATEGIES)
def test_no_records_no_packs(strategy):
    packs = pack([], 8, strategy)
    assert (len(packs), list(packs), packs.to_list(), packs.fill) == (0, [], [], 0.0)


def test_packs_are_a_sequence():
    packs = pack([5, 3, 8], 8)
    assert [packs[0].tolist(), packs[-1].tolist()] == [[2], [0, 1]]
    for outside in (2, -3):
        with pytest.raises(IndexError, match="of 2"):
            packs[outside]


def test_a_hundred_thousand_records_fill_their_packs():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(100), 0.9, 100_000).astype(np.int64), 4, 4096)
    packs = pack(lengths, 4096)
    assert packs.fill > 0.995
    assert packs.lengths.max() <= 4096
    assert packs.lengths.sum() == lengths.sum()
    assert np.array_equal(np.sort(packs.order), np.arange(len(lengths)))
    assert np.array_equal(np.add.reduceat(lengths[packs.order], packs.offsets[:-1]), packs.lengths)
    pieces = pack(lengths, 4096, "concat")
    assert (pieces.lengths[:-1] == 4096).all()
    assert (pieces.pieces[:, 2] - pieces.pieces[:, 1]).sum() == lengths.sum()


def test_lengths_beyond_sixteen_bits_stay_sorted_and_stable():
    lengths = np.random.default_rng(1).choice([70_000, 4_464, 131_072, 65_536, 1, 65_535], 500)
    packs = pack(lengths, 131_072)
    assert sorted(packs.lengths.tolist()) == sorted(taught_best_fit(lengths.tolist(), 131_072))
    for length in np.unique(lengths):
        alone = pack(np.where(lengths == length, lengths, 0), 131_072)
        assert [record for record in alone.order if lengths[record] == length] == np.flatnonzero(
            lengths == length
        ).tolist()


# concat


@small
@given(records_and_capacity(fits=False))
def test_concat_covers_every_token_once_and_in_order(case):
    lengths, max_length = case
    packs = pack(lengths, max_length, "concat")
    assert isinstance(packs, Pieces)
    tokens = [(record, at) for pieces in packs.to_list() for record, start, end in pieces for at in range(start, end)]
    assert tokens == [(record, at) for record, length in enumerate(lengths) for at in range(length)]
    seen = [record for pieces in packs.to_list() for record, _, _ in pieces]
    assert sorted(set(seen)) == list(range(len(lengths)))
    assert seen == sorted(seen)
    assert packs.lengths.tolist() == [int(seq_lens(pieces).sum()) for pieces in packs]
    assert all(length == max_length for length in packs.lengths[:-1])
    assert all(len(pieces) for pieces in packs)


def test_concat_keeps_the_tail():
    packs = pack([1300], 512, "concat")
    assert packs.to_list() == [[(0, 0, 512)], [(0, 512, 1024)], [(0, 1024, 1300)]]
    assert packs.fill == pytest.approx(1300 / 1536)


# helpers


@small
@given(st.lists(st.integers(0, 20), max_size=12))
def test_positions_restart_and_borders_add_up(lens):
    assert position_ids(lens).tolist() == [at for length in lens for at in range(length)]
    borders = cu_seqlens(lens)
    assert borders.tolist() == [sum(lens[:i]) for i in range(len(lens) + 1)]
    assert (borders.dtype, position_ids(lens).dtype) == (np.int32, np.int64)


def test_seq_lens_of_records_and_of_pieces():
    lengths = [5, 3, 8]
    assert [seq_lens(records, lengths).tolist() for records in pack(lengths, 8)] == [[8], [5, 3]]
    assert [seq_lens(pieces).tolist() for pieces in pack(lengths, 6, "concat")] == [[5, 1], [2, 4], [4]]
    with pytest.raises(UsageError, match=r"seq_lens\(pack, lengths\)"):
        seq_lens(pack(lengths, 8)[0])


def test_borders_that_int32_cannot_count_are_refused():
    with pytest.raises(DataError, match="int32"):
        cu_seqlens([2**30, 2**30])


def test_the_docstring_is_true():
    result = doctest.testmod(packing)
    assert result.attempted
    assert not result.failed


# refusals


@pytest.mark.parametrize("strategy", ["best_fit", "none"])
def test_long_records_are_counted_and_the_longest_named(strategy):
    with pytest.raises(DataError, match=r"2 of 4 records .* max_length=8; the longest \(record 3\) has 12 tokens"):
        pack([3, 9, 8, 12], 8, strategy)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([3, -2, -7], "2 lengths are negative; record 2 has -7"),
        ([1.5, 2.0], "whole numbers, not float64"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([[1], [1, 2]], "one flat list"),
        (["甲", "乙"], "whole numbers"),
        ([True, False], "not bool"),
        (7, r"shape \(\)"),
    ],
)
def test_what_is_no_length_is_refused(lengths, words):
    for strategy in packing.STRATEGIES:
        with pytest.raises(DataError, match=words):
            pack(lengths, 8, strategy)


def test_wrong_settings_are_refused():
    with pytest.raises(UsageError, match="did you mean 'best_fit'"):
        pack([1], 8, "bestfit")
    for max_length in (0, -4, 2.5, None):
        with pytest.raises(UsageError, match="max_length"):
            pack([1], max_length)


# parity with XTuner


class XTunerPacker:
    """XTuner's stateful Packer, built from our `concat`; its own behaviour is only what happens between the calls."""

    def __init__(self, max_length: int, drop_last: bool) -> None:
        self.max_length, self.drop_last, self.left = max_length, drop_last, []

    def __call__(self, batch: list[Sample]) -> list[Chunk]:
        pool = self.left + batch
        chunks = pieces_of(pool, self.max_length)
        self.left = []
        if sum(len(ids) for ids, _ in pool) < self.max_length:  # trap: a small batch comes out as a short chunk,
            return [] if self.drop_last else chunks  # or, with drop_last, not at all
        if sum(len(ids) for ids, _ in chunks[-1]) < self.max_length:  # trap: these wait for a call that may never come
            self.left = chunks.pop()
        while not chunks[-1][-1][0]:  # trap: an empty record after a full chunk is forgotten
            chunks[-1].pop()
        return chunks


def pieces_of(samples: list[Sample], max_length: int) -> list[Chunk]:
    """The samples packed by our `concat`: for each pack, the (input_ids, labels) of its pieces."""
    packs = pack([len(ids) for ids, _ in samples], max_length, "concat").to_list()
    return [[(samples[i][0][start:end], samples[i][1][start:end]) for i, start, end in pieces] for pieces in packs]


def flat(lists: Iterable[list]) -> list:
    return list(chain.from_iterable(lists))


def as_golden(chunks: list[Chunk], varlen: bool) -> dict[str, list]:
    result = {
        "input_ids": [flat(ids for ids, _ in chunk) for chunk in chunks],
        "labels": [flat(labels for _, labels in chunk) for chunk in chunks],
    }
    if varlen:
        lens = [[len(ids) for ids, _ in chunk] for chunk in chunks]
        result["cumulative_len"] = [cu_seqlens(one).tolist() for one in lens]
        result["position_ids"] = [position_ids(one).tolist() for one in lens]
    return result


def samples_of(case: dict) -> list[Sample]:
    return [(one["input_ids"], one["labels"]) for one in SAMPLES[case["id"].split("/")[0]]["samples"]]


@needs_shared
@pytest.mark.parametrize("case", PACKER, ids=lambda case: case["id"])
def test_xtuners_packer_call_by_call(case):
    samples, size = samples_of(case), case["batch_size"]
    packer = XTunerPacker(case["max_length"], case["drop_last"])
    calls = [packer(samples[at : at + size]) for at in range(0, len(samples), size)]
    assert [as_golden(chunks, case["use_varlen_attn"]) for chunks in calls] == case["calls"]
    assert sum(len(ids) for ids, _ in packer.left) == case["residual_len_left_behind"]


@needs_shared
@pytest.mark.parametrize("case", PACKER, ids=lambda case: case["id"])
def test_our_pieces_are_xtuners_chunks_plus_what_it_loses(case):
    samples, max_length, varlen = samples_of(case), case["max_length"], case["use_varlen_attn"]
    ours = pieces_of(samples, max_length)
    calls, keys = case["calls"], as_golden(ours, varlen)
    theirs = {key: flat(call[key] for call in calls) for key in keys}
    line = flat(as_golden(ours, varlen)["input_ids"])
    kept, lost = flat(theirs["input_ids"]), case["residual_len_left_behind"]
    assert line == flat(ids for ids, _ in samples)
    if len(kept) + lost < len(line):  # trap: drop_last drops every small batch, not only the last chunk
        assert case["drop_last"]
        assert set(kept) < set(line)
    elif any(len(ids) < max_length for ids in theirs["input_ids"][:-1]):  # trap: short chunks in mid-stream
        assert case["batch_size"] < len(samples)
        assert kept == line[: len(line) - lost]
        assert len(theirs["input_ids"]) + bool(lost) > len(ours)
    else:
        if lost:  # trap: the residual after the last batch is never flushed; our last, shorter pack holds it
            assert sum(len(ids) for ids, _ in ours.pop()) == lost
        assert as_golden(ours, varlen) == theirs


@needs_shared
def test_the_data_set_walk_with_one_worker():
    """process_hf_dataset of 12 byte-tokenised records: the same chunks, then the tail that XTuner loses."""
    plain, chunks = PROCESS["no_pack"]["output"]["data"], PROCESS["pack_varlen"]["output"]["data"]
    samples = list(zip(plain["input_ids"], plain["labels"], strict=True))
    ours = pieces_of(samples, 64)
    assert 0 < sum(len(ids) for ids, _ in ours.pop()) < 64
    assert as_golden(ours, varlen=True) == {key: chunks[key] for key in as_golden(ours, varlen=True)}
    without = PROCESS["pack"]["output"]["data"]
    assert as_golden(ours, varlen=False) == {key: without[key] for key in ("input_ids", "labels")}


@needs_shared
def test_more_workers_change_xtuners_packs_but_not_ours():
    """Trap: each of XTuner's workers packs alone, down to one record a pack; ours packs once, in one process."""
    plain = PROCESS["no_pack"]["output"]["data"]["input_ids"]
    rows = {
        workers: PROCESS[name]["output"]["rows"]
        for workers, name in (
            (1, "pack_varlen"),
            (4, "pack_varlen_num_proc_4"),
            (32, "pack_default_num_proc_32_on_12_rows"),
        )
    }
    assert rows == {1: 5, 4: 4, 32: 12}
    assert len(pack([len(ids) for ids in plain], 64, "concat")) == 6
    assert len(pack([len(ids) for ids in plain], 64)) == 6


@needs_shared
def test_the_data_set_walk_over_several_map_batches():
    """2,300 rows are three map batches of 1,000: XTuner's residual carries over, so the chunks equal one pass."""
    expected = PROCESS["pack_2300_rows"]["output"]
    bos_and_text = [[1] + [ord("x") + 3] * (1 + (i * 7) % 23) for i in range(2300)]
    packs = pack([len(ids) for ids in bos_and_text], 64, "concat")
    assert packs.lengths.tolist()[:-1] == expected["lengths"]
    assert [cu_seqlens(seq_lens(pieces)).tolist() for pieces in packs][:-1] == expected["cumulative_len"]
    ours = as_golden(pieces_of([(ids, ids) for ids in bos_and_text], 64)[:-1], varlen=False)["input_ids"]
    assert sha256(json.dumps(ours).encode()).hexdigest() == expected["input_ids_sha256"]
