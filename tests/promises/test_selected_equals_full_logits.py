"""Logits at supervised positions only == full logits: loss 1e-6, gradients 1e-5."""

from __future__ import annotations

import pytest
from torch.nn import functional as F

from minituner.data.collate import collate
from minituner.model import attention
from minituner.model.loss import accepts_logits_to_keep, loss_sum
from tests.promises.common import TOLERANCE, documents, gradients, largest_difference
from tests.tiny import tiny_model


@pytest.mark.parametrize("tie", [True, False])
def test_selected_logits_give_the_full_loss_and_gradients(tie: bool) -> None:
    attention.register()
    batch = collate([documents((11, 30, 2, 19))])
    selected, full = tiny_model(tie=tie).train(), tiny_model(tie=tie).train()
    for model in (selected, full):
        model.set_attn_implementation(attention.PER_DOCUMENT_SDPA)
    assert accepts_logits_to_keep(selected)
    loss = loss_sum(selected, batch, attention.PER_DOCUMENT_SDPA)
    loss.backward()
    kwargs = attention.packed_kwargs(batch, attention.PER_DOCUMENT_SDPA)
    logits = full(batch.input_ids, position_ids=batch.position_ids, use_cache=False, **kwargs).logits[0]
    everything = F.cross_entropy(logits, batch.shift_labels[0], ignore_index=-100, reduction="sum")
    everything.backward()
    assert float(loss) == pytest.approx(float(everything), rel=1e-6)
    assert largest_difference(gradients(selected), gradients(full)) <= TOLERANCE


def test_a_model_without_logits_to_keep_gives_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.register()
    batch = collate([documents((11, 30))])
    model = tiny_model()
    model.set_attn_implementation(attention.PER_DOCUMENT_SDPA)
    selected = float(loss_sum(model, batch, attention.PER_DOCUMENT_SDPA))
    monkeypatch.setattr("minituner.model.loss.accepts_logits_to_keep", lambda model: False)
    assert float(loss_sum(model, batch, attention.PER_DOCUMENT_SDPA)) == pytest.approx(selected, rel=1e-6)
