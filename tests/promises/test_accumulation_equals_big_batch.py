"""Accumulation == one big batch, for any split into micro-batches and an incomplete last window."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.data.collate import Batch, collate
from minituner.model import attention
from minituner.model.loss import loss_sum
from minituner.recipe import TrainSection
from minituner.train.engines import TorchEngine
from tests.promises.common import TOLERANCE, documents
from tests.tiny import tiny_model

LENGTHS = (5, 40, 12, 33, 7, 21, 9)


def after_one_step(window: list[Batch]) -> tuple[dict[str, torch.Tensor], float]:
    """The weights after one optimizer step over the window; SGD, because AdamW's first step hides gradient sizes."""
    attention.register()
    model = tiny_model().train()
    model.set_attn_implementation(attention.PER_DOCUMENT_SDPA)
    engine = TorchEngine(TrainSection(learning_rate=1e-3, max_grad_norm=None), "cpu")
    engine.prepare(model)
    engine.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    supervised = sum(batch.supervised_tokens for batch in window)
    for batch in window:
        engine.backward(loss_sum(model, batch, attention.PER_DOCUMENT_SDPA) / supervised)
    norm = engine.step(1.0)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, norm


@settings(max_examples=12, deadline=None)
@given(st.sets(st.integers(1, len(LENGTHS) - 1)))
def test_any_split_gives_the_same_weights(cuts: set[int]) -> None:
    pack = documents(LENGTHS)
    borders = [0, *sorted(cuts), len(pack)]
    split = [collate([pack[a:b]]) for a, b in itertools.pairwise(borders)]
    whole, whole_norm = after_one_step([collate([pack])])
    parts, parts_norm = after_one_step(split)
    assert parts_norm == pytest.approx(whole_norm, rel=TOLERANCE)
    for name in whole:
        assert torch.allclose(whole[name], parts[name], atol=TOLERANCE), name


def test_a_mean_of_means_would_be_noticed() -> None:
    """The common fault, each micro-batch divided by its own tokens, gives another gradient norm."""
    pack = documents(LENGTHS)
    attention.register()
    model = tiny_model().train()
    model.set_attn_implementation(attention.PER_DOCUMENT_SDPA)
    for document in pack:
        batch = collate([[document]])
        (loss_sum(model, batch, attention.PER_DOCUMENT_SDPA) / batch.supervised_tokens / len(pack)).backward()
    wrong = float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
    _, right = after_one_step([collate([pack])])
    assert abs(wrong - right) / right > 0.01


def test_packs_in_one_micro_batch_equal_packs_in_two() -> None:
    packs = [documents((8, 9)), documents((20,), 1)]
    together, _ = after_one_step([collate(packs)])
    apart, _ = after_one_step([collate([packs[0]]), collate([packs[1]])])
    assert all(torch.allclose(together[name], apart[name], atol=TOLERANCE) for name in together)


def test_a_micro_batch_without_supervised_tokens_changes_nothing() -> None:
    pack = documents((12, 20))
    silent = [(ids, labels * 0 - 100) for ids, labels in documents((30,), 3)]
    with_silent, _ = after_one_step([collate([pack]), collate([silent])])
    without, _ = after_one_step([collate([pack])])
    assert all(torch.equal(with_silent[name], without[name]) for name in without)
