"""Each distinct beginning of a row is computed once: every token finds it, nothing else is shared, nothing is lost."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from minituner.data.collate import collate
from minituner.data.prefixes import LEAST, owners, share_prefixes

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=7)


def beginnings(documents: list[list[int]]) -> list[tuple[int, ...]]:
    """Of each token of the row: its document up to and with itself."""
    return [tuple(ids[: n + 1]) for ids in documents for n in range(len(ids))]


@given(ROWS)
def test_tokens_are_shared_exactly_where_their_beginnings_are_equal(documents: list[list[int]]) -> None:
    whole = beginnings(documents)
    owner = owners([np.array(ids) for ids in documents])
    assert [whole[token] for token in owner] == whole
    assert len(set(owner.tolist())) == len(set(whole))
    assert owner.tolist() == [whole.index(beginning) for beginning in whole], "the first in the row"


@given(ROWS)
def test_the_row_can_be_laid_out_whole_again(documents: list[list[int]]) -> None:
    row = collate([[(np.array(ids), np.array(ids)) for ids in documents]])
    shared = share_prefixes(row)
    repeated = row.tokens - len(set(beginnings(documents)))
    assert (shared is row) == (repeated <= LEAST * row.tokens)
    assert shared.computed_tokens == (row.tokens if shared is row else row.tokens - repeated)
    for name in ("shift_labels", "cu_seqlens"):
        assert torch.equal(getattr(shared, name), getattr(row, name))
    assert (shared.seq_lens, shared.tokens, shared.supervised_tokens) == (
        row.seq_lens,
        row.tokens,
        row.supervised_tokens,
    )
    if shared.prefixes is not None:
        rows, own = shared.prefixes.rows, shared.prefixes.own
        assert torch.equal(shared.input_ids[:, rows], row.input_ids)
        assert torch.equal(shared.position_ids[:, rows], row.position_ids)
        assert torch.equal(rows[own], torch.arange(len(own)))
        assert sorted(set(own.tolist())) == own.tolist() == sorted(set(own[rows].tolist()))


def test_the_drawing_in_the_module() -> None:
    documents = [[9, 9, 9, 1, 2], [9, 9, 9, 3], [9, 9, 9, 4]]
    shared = share_prefixes(collate([[(np.array(ids), np.array(ids)) for ids in documents]]))
    assert shared.input_ids.tolist() == [[9, 9, 9, 1, 2, 3, 4]]
    assert shared.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 3]]
    assert shared.prefixes is not None
    assert shared.prefixes.rows.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 0, 1, 2, 6]


def test_large_ids_are_sorted_as_numbers() -> None:
    """By their lowest byte, 256 would come before 1 and tear equal beginnings apart."""
    documents = [np.array(ids) for ids in ([256, 1, 5], [1, 256, 7], [256, 1, 6], [1, 256, 8], [70_000, 1])]
    assert len(set(owners(documents).tolist())) == 3 + 3 + 1 + 1 + 2


def test_where_documents_see_each_other_nothing_is_shared() -> None:
    """A row that is one document begins once, whatever it repeats."""
    document = (np.array([1, 2, 3]), np.array([1, 2, 3]))
    row = collate([[document, document]], isolate=False)
    assert share_prefixes(row) is row


def test_an_empty_row_is_left_alone() -> None:
    row = collate([[]])
    assert share_prefixes(row) is row
