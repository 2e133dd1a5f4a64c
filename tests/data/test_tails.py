"""Of each document what stands up to its last predicting token is kept, in its place; the targets are all there."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from minituner.data.collate import collate
from minituner.data.encoding import IGNORE
from minituner.data.tails import cut_tails, needed

# Of each document: which of its tokens are targets.
ROWS = st.lists(st.lists(st.booleans(), min_size=1, max_size=8), min_size=0, max_size=7)


def documents_of(trained: list[list[bool]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Documents with an id for each place, so that none can be taken for another."""
    ids = [np.arange(len(flags)) + 100 * number for number, flags in enumerate(trained)]
    return [(own, np.where(flags, own, IGNORE)) for own, flags in zip(ids, trained, strict=True)]


@given(ROWS)
def test_each_document_ends_with_the_token_that_predicts_its_last_target(trained: list[list[bool]]) -> None:
    documents = documents_of(trained)
    # A document's first token is never a target: nothing predicts it.
    lengths = [max((place for place, wanted in enumerate(flags) if wanted), default=0) for flags in trained]
    expected = collate([[(ids[:n], labels[:n]) for (ids, labels), n in zip(documents, lengths, strict=True)]])
    row = collate([documents])
    cut = cut_tails(row)
    assert torch.equal(cut.input_ids, expected.input_ids)
    assert torch.equal(cut.position_ids, expected.position_ids)
    assert torch.equal(cut.cu_seqlens, expected.cu_seqlens)
    assert cut.cu_seqlens.dtype == row.cu_seqlens.dtype
    assert cut.seq_lens == expected.seq_lens == [n for n in lengths if n]
    assert (cut.tokens, cut.supervised_tokens) == (row.tokens, row.supervised_tokens)
    assert cut.computed_tokens == sum(lengths)


@given(ROWS)
def test_every_target_keeps_its_context(trained: list[list[bool]]) -> None:
    """Each target with all that stands before it in its document, before and after."""

    def predicted(batch: object) -> list[tuple[list[int], int]]:
        ends = batch.cu_seqlens.tolist()  # type: ignore[attr-defined]
        ids, targets = batch.input_ids[0].tolist(), batch.shift_labels[0].tolist()  # type: ignore[attr-defined]
        places = ((start, place) for start, end in pairwise(ends) for place in range(start, end))
        return [(ids[start : place + 1], targets[place]) for start, place in places if targets[place] != IGNORE]

    row = collate([documents_of(trained)])
    assert predicted(cut_tails(row)) == predicted(row)


@given(ROWS)
def test_cut_twice_is_cut_once(trained: list[list[bool]]) -> None:
    cut = cut_tails(collate([documents_of(trained)]))
    assert needed(cut).all()
    assert torch.equal(cut_tails(cut).input_ids, cut.input_ids)


def test_the_drawing_in_the_module() -> None:
    ids = np.arange(8)
    row = collate([[(ids, np.where((ids >= 4) & (ids <= 6), ids, IGNORE))]])
    assert cut_tails(row).input_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert cut_tails(row).shift_labels.tolist() == [[-100, -100, -100, 4, 5, 6]]


def test_documents_that_see_each_other_keep_what_a_later_one_needs() -> None:
    """A row that is one segment ends behind its last target; what stands between targets stays."""
    first, second = documents_of([[False, True, False], [False, True, False]])
    cut = cut_tails(collate([[first, second]], isolate=False))
    assert cut.input_ids.tolist() == [[0, 1, 2, 100]]
    assert cut.seq_lens == [4]
