"""The ledger: every token has exactly one place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minituner.data.encoding import KINDS, Encoded
from minituner.data.ledger import FIRST, MASKED, Ledger


@st.composite
def documents(draw: st.DrawFn) -> Encoded:
    """Any document: lengths from 0, any kinds, any tokens trained."""
    n = draw(st.integers(0, 12))
    trained = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=bool)
    kinds = np.array(draw(st.lists(st.integers(0, len(KINDS) - 1), min_size=n, max_size=n)), dtype=np.uint8)
    return Encoded(np.arange(n, dtype=np.int32), trained, kinds)


@given(
    st.lists(documents(), max_size=5), st.lists(st.integers(0, 9), max_size=3), st.lists(st.integers(0, 9), max_size=3)
)
def test_it_adds_up_whatever_is_entered(kept: list[Encoded], cut: list[int], dropped: list[int]) -> None:
    ledger = Ledger()
    for document in kept:
        ledger.keep(document)
    for tokens in cut:
        ledger.cut(tokens)
    for tokens in dropped:
        ledger.drop("why", tokens)
    ledger.check()
    assert ledger.raw == sum(map(len, kept)) + sum(cut) + sum(dropped)
    assert ledger.trained == sum(int(d.trained[1:].sum()) for d in kept)  # the first token is never predicted
    assert ledger.masked[FIRST] == sum(bool(len(d) and d.trained[0]) for d in kept)
    assert ledger.dropped_records["why"] == len(dropped)
    assert Ledger.from_dict(ledger.to_dict()) == ledger


@given(st.lists(documents(), max_size=6), st.integers(0, 6))
def test_ledgers_of_parts_add_up_to_that_of_the_whole(kept: list[Encoded], at: int) -> None:
    whole, first, second = Ledger(), Ledger(), Ledger()
    for number, document in enumerate(kept):
        whole.keep(document)
        (first if number < at else second).keep(document)
    first.add(second)
    assert first == whole


def test_a_missing_token_is_refused() -> None:
    ledger = Ledger(raw=10, trained=4)
    ledger.masked[MASKED["prompt"]] = 5
    with pytest.raises(AssertionError, match="off by 1 tokens"):
        ledger.check()
    ledger.truncated = 1
    ledger.check()


def test_the_table_names_every_reason() -> None:
    ledger = Ledger(records=3, padding=7)
    kinds = np.array([4, 0, 1, 1], dtype=np.uint8)
    ledger.keep(Encoded(np.arange(4, dtype=np.int32), np.array([0, 0, 1, 1], dtype=bool), kinds))
    ledger.cut(2)
    ledger.drop("太长", 4)
    ledger.drop("cannot be used")
    text = "\n".join(ledger.lines())
    assert text.startswith("3 records, 1 document to train on, 2 records dropped")
    for said in ("10 tokens", "20.0%  trained", "BOS", "prompt (system", "truncated", "dropped: 太长", "padding"):
        assert said in text
    assert "1 record dropped: cannot be used" in text
