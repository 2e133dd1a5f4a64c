"""Collate: one row without padding, positions and labels per document; and XTuner's padded layout for comparison."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minituner.data.collate import collate, pad_batch
from minituner.data.encoding import IGNORE
from tests.shared_data import golden_lines, needs_shared


def document(ids: list[int], labels: list[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A document whose labels are its ids, unless given."""
    return np.array(ids), np.array(ids if labels is None else labels)


def test_the_drawing_of_the_docstring() -> None:
    batch = collate([[document([1, 2, 3]), document([4, 5])]])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.shift_labels.tolist() == [[2, 3, IGNORE, 5, IGNORE]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert str(batch.cu_seqlens.dtype) == "torch.int32"
    assert batch.supervised_tokens == 3


def test_without_isolation_a_pack_is_one_sequence_but_labels_still_stay_inside() -> None:
    batch = collate([[document([1, 2, 3]), document([4, 5])], [document([6, 7])]], isolate=False)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch.seq_lens == [5, 2]
    assert batch.shift_labels.tolist() == [[2, 3, IGNORE, 5, IGNORE, 7, IGNORE]]


@given(st.lists(st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=4), max_size=4), st.booleans())
def test_every_token_is_there_once_and_predicts_its_neighbour(packs: list[list[list[int]]], isolate: bool) -> None:
    labelled = [[document(ids, [i if i % 3 else IGNORE for i in ids]) for ids in pack] for pack in packs]
    batch = collate(labelled, isolate=isolate)
    flat = [ids for pack in packs for ids in pack]
    assert batch.input_ids[0].tolist() == [i for ids in flat for i in ids]
    want = [label if label % 3 else IGNORE for ids in flat if ids for label in [*ids[1:], 0]]
    assert batch.shift_labels[0].tolist() == want
    assert batch.supervised_tokens == sum(label != IGNORE for label in want)
    lengths = [len(ids) for ids in flat if ids] if isolate else [n for pack in packs if (n := sum(map(len, pack)))]
    assert batch.seq_lens == lengths
    assert batch.position_ids[0].tolist() == [position for n in lengths for position in range(n)]
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()


def test_to_keeps_everything() -> None:
    batch = collate([[document([1, 2])]])
    moved = batch.to("cpu")
    assert (moved.seq_lens, moved.supervised_tokens) == (batch.seq_lens, batch.supervised_tokens)
    assert moved.input_ids.tolist() == batch.input_ids.tolist()


def cases(varlen: bool) -> list[Any]:
    """XTuner's collate cases on one rank that returned a batch."""
    found = []
    for case in golden_lines("collate.jsonl"):
        is_ours = case["fn"] == "default_collate_fn" and case["sequence_parallel_world_size"] == 1
        texts = all(set(item) <= {"input_ids", "labels", "cumulative_len", "position_ids"} for item in case["batch"])
        if is_ours and texts and "output" in case and bool(case["kwargs"].get("use_varlen_attn")) == varlen:
            found.append(pytest.param(case, id=case["id"]))
    return found


def xtuners(case: dict[str, Any]) -> dict[str, Any]:
    """The tensors XTuner returned, as lists."""
    output = case["output"]
    tensors = {key: item[0] if isinstance(item, list) else item for key, item in output.get("data", output).items()}
    return {key: item["value"] if isinstance(item, dict) else item for key, item in tensors.items()}


@needs_shared
@pytest.mark.parametrize("case", cases(varlen=False))
def test_padding_is_xtuners(case: dict[str, Any]) -> None:
    documents = [document(item["input_ids"], item["labels"]) for item in case["batch"]]
    batch, want = pad_batch(documents, case["kwargs"].get("pad_index", 0)), xtuners(case)
    assert batch["input_ids"].tolist() == want["input_ids"]
    assert batch["labels"].tolist() == want["labels"]
    if "attention_mask" in want:  # by length: a real token with the pad's id stays visible
        assert batch["attention_mask"].bool().tolist() == want["attention_mask"]


@needs_shared
@pytest.mark.parametrize("case", cases(varlen=True))
def test_positions_and_borders_are_xtuners(case: dict[str, Any]) -> None:
    """XTuner's cumulative_len and position_ids, from documents instead of from a pack that carries them."""
    item, want = case["batch"][0], xtuners(case)
    borders = item["cumulative_len"]
    pieces = [slice(*ends) for ends in pairwise(borders)]
    batch = collate([[document(item["input_ids"][part], item["labels"][part]) for part in pieces]])
    assert batch.input_ids.tolist() == want["input_ids"]
    assert batch.position_ids.tolist() == want["position_ids"]
    assert batch.cu_seqlens.tolist() == np.ravel(want["cumulative_len"]).tolist()
    assert max(batch.seq_lens) == want["max_seqlen"]


def test_there_are_cases_to_compare() -> None:
    if golden_lines("collate.jsonl"):
        assert len(cases(varlen=False)) >= 4
        assert cases(varlen=True)


def test_padding_that_equals_the_end_token_is_masked_by_length_only() -> None:
    """The classic trap: pad == eos. XTuner's evaluation collate masks by id and hides a real token."""
    batch = pad_batch([document([5, 2]), document([7, 8, 9, 2])], pad_id=2)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[5, 2, IGNORE, IGNORE], [7, 8, 9, 2]]
