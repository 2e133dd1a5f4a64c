"""LoRA at step 0 == the base model, bit for bit, for every initialisation that promises it."""

from __future__ import annotations

import pytest
import torch

from minituner.model.adapters import apply_method, count_parameters
from minituner.recipe import MethodSection
from tests.tiny import tiny_model

IDS = torch.arange(40)[None] % 256


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_step_zero_equals_base(options: dict) -> None:
    base = tiny_model().eval()
    with torch.no_grad():
        expected = base(IDS, use_cache=False).logits
        model = apply_method(base, MethodSection(name="lora", **options)).eval()
        assert torch.equal(model(IDS, use_cache=False).logits, expected)
    trained, total = count_parameters(model)
    assert 0 < trained < total


def test_dora_starts_at_the_base_within_rounding() -> None:
    """DoRA divides by a norm and multiplies it back, so it is equal to rounding only."""
    base = tiny_model().eval()
    with torch.no_grad():
        expected = base(IDS, use_cache=False).logits
        model = apply_method(base, MethodSection(name="lora", use_dora=True)).eval()
        assert torch.allclose(model(IDS, use_cache=False).logits, expected, atol=1e-5)


def test_a_trained_adapter_differs() -> None:
    base = tiny_model().eval()
    with torch.no_grad():
        expected = base(IDS, use_cache=False).logits
        model = apply_method(base, MethodSection(name="lora")).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
        assert not torch.equal(model(IDS, use_cache=False).logits, expected)
