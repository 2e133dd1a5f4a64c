"""Packed loss == separate loss, gradients too; plain transformers on one document at a time is the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.data.collate import collate
from minituner.model import attention
from minituner.model.loss import loss_sum
from tests.promises.common import TOLERANCE, documents, gradients, largest_difference
from tests.tiny import tiny_model


def reference(lengths: tuple[int, ...]) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers' own loss, summed over documents fed alone with its own attention."""
    model = tiny_model().train()
    total = 0.0
    for ids, labels in documents(lengths):
        targets = int((labels[1:] != -100).sum())
        if not targets:
            continue
        loss = model(input_ids=torch.tensor(ids)[None], labels=torch.tensor(labels)[None], use_cache=False).loss
        (loss * targets).backward()
        total += float(loss) * targets
    return total, gradients(model)


def packed(lengths: tuple[int, ...]) -> tuple[float, dict[str, torch.Tensor]]:
    attention.register()
    model = tiny_model().train()
    model.set_attn_implementation(attention.PER_DOCUMENT_SDPA)
    loss = loss_sum(model, collate([documents(lengths)]), attention.PER_DOCUMENT_SDPA)
    loss.backward()
    return float(loss), gradients(model)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=6))
def test_packed_loss_and_gradients_equal_separate(lengths: list[int]) -> None:
    separate, separate_gradients = reference((*lengths, 30))
    together, together_gradients = packed((*lengths, 30))
    assert together == pytest.approx(separate, rel=TOLERANCE)
    assert largest_difference(together_gradients, separate_gradients) <= TOLERANCE


def test_the_reference_would_notice_a_leak() -> None:
    """The same documents seen as one (no isolation) give another loss: the test above can fail."""
    attention.register()
    model = tiny_model()
    model.set_attn_implementation(attention.PER_DOCUMENT_SDPA)
    leaking = loss_sum(model, collate([documents((20, 30))], isolate=False), attention.PER_DOCUMENT_SDPA)
    separate, _ = reference((20, 30))
    assert abs(float(leaking) - separate) > 1e-2
