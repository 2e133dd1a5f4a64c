"""Changing document A changes document B's logits by exactly 0; a model that leaks is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minituner.data.collate import collate
from minituner.errors import MinitunerError
from minituner.model import attention
from tests.promises.common import documents
from tests.tiny import tiny_model


@pytest.fixture
def model() -> torch.nn.Module:
    attention.register()
    model = tiny_model().eval()
    model.set_attn_implementation(attention.PER_DOCUMENT_SDPA)
    return model


def logits(model: torch.nn.Module, *lengths_and_seed: tuple[int, int]) -> torch.Tensor:
    pack = [documents((length,), seed)[0] for length, seed in lengths_and_seed]
    batch = collate([pack])
    kwargs = attention.packed_kwargs(batch, attention.PER_DOCUMENT_SDPA)
    with torch.no_grad():
        return model(batch.input_ids, position_ids=batch.position_ids, use_cache=False, **kwargs).logits[0]


def test_changing_a_neighbour_changes_nothing(model: torch.nn.Module) -> None:
    first = logits(model, (9, 1), (17, 2), (5, 3))
    other = logits(model, (9, 7), (17, 2), (5, 8))
    assert float((first[9:26] - other[9:26]).abs().max()) == 0.0
    assert float((first[:9] - other[:9]).abs().max()) > 0.0


def test_a_document_is_the_same_in_every_place(model: torch.nn.Module) -> None:
    alone = logits(model, (17, 2))
    later = logits(model, (9, 1), (23, 5), (17, 2))[-17:]
    assert torch.allclose(alone, later, atol=1e-5)


def test_assert_isolated_passes_ours_and_refuses_a_leak(model: torch.nn.Module) -> None:
    assert attention.assert_isolated(model, attention.PER_DOCUMENT_SDPA, 259) == 0.0

    def leaking(module: torch.nn.Module, *args: object, seq_lens: list[int], **kwargs: object) -> object:
        return attention.per_document_sdpa(module, *args, seq_lens=[sum(seq_lens)], **kwargs)  # type: ignore[arg-type]

    from transformers import AttentionInterface

    AttentionInterface.register(attention.PER_DOCUMENT_SDPA, leaking)
    try:
        with pytest.raises(MinitunerError, match="see each other"):
            attention.assert_isolated(model, attention.PER_DOCUMENT_SDPA, 259)
    finally:
        attention.register()


def test_without_borders_it_refuses_to_run(model: torch.nn.Module) -> None:
    ids = torch.tensor(documents((8,))[0][0])[None]
    with pytest.raises(MinitunerError, match="without document borders"):
        model(ids, use_cache=False)


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sliding_window_and_softcap_equal_the_formula(window: int, softcap: float | None) -> None:
    """Against attention written out with one big mask over two documents."""
    torch.manual_seed(0)
    lens, heads, kv, dim = [6, 9], 4, 2, 8
    q, k, v = torch.randn(1, heads, 15, dim), torch.randn(1, kv, 15, dim), torch.randn(1, kv, 15, dim)
    got, _ = attention.per_document_sdpa(
        torch.nn.Module(), q, k, v, seq_lens=lens, scaling=0.3, sliding_window=window, softcap=softcap
    )
    back = np.subtract.outer(np.arange(15), np.arange(15))
    document = np.repeat([0, 1], lens)
    allowed = torch.tensor((back >= 0) & (back < window) & np.equal.outer(document, document))
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    assert torch.allclose(got.transpose(1, 2), weights @ v.repeat_interleave(2, 1), atol=1e-5)
