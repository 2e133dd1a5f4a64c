"""LoRA at step 0 == the base model: bit for bit where B is zero, to rounding where the base gives a part away.

qlora and int8_lora are compared with their own quantised base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minituner.model.adapters import apply_method, count_parameters
from minituner.model.loading import load_model
from minituner.recipe import MethodSection, ModelSection
from tests.promises.common import TOLERANCE
from tests.tiny import tiny_model

IDS = torch.arange(40)[None] % 256

EXACT: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "qlora": {"name": "qlora"},
    "qlora, rslora": {"name": "qlora", "use_rslora": True},
    "int8_lora": {"name": "int8_lora"},
    "embedding in full": {"modules_to_save": ["embed_tokens"]},
}
# DoRA divides by a norm and multiplies it back.
DORA: dict[str, dict[str, Any]] = {"dora": {"use_dora": True}, "qlora, dora": {"name": "qlora", "use_dora": True}}
# These compute (W - s B A) + s B A.
MOVED: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa, dora": {"init_lora_weights": "pissa", "use_dora": True},
}


def base_and_adapted(settings: dict[str, Any], folder: Path) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Logits of the (quantised) base, logits with a fresh adapter on it, and the model."""
    method = MethodSection(lora_rank=4, **settings)
    section = ModelSection(name_or_path=str(folder), dtype="float32", attention="sdpa")
    base, _, _ = load_model(folder, section, method, one_document_rows=True, device="cpu")
    base.eval()
    with torch.no_grad():
        expected = base(input_ids=IDS, use_cache=False).logits
        model = apply_method(base, method).eval()
        return expected, model(input_ids=IDS, use_cache=False).logits, model


@pytest.mark.parametrize("settings", EXACT.values(), ids=EXACT.keys())
def test_step_zero_equals_base(settings: dict[str, Any], model_folder: Path) -> None:
    expected, logits, model = base_and_adapted(settings, model_folder)
    assert torch.equal(logits, expected)
    trained, total = count_parameters(model)
    assert 0 < trained < total


@pytest.mark.parametrize("settings", [*DORA.values(), *MOVED.values()], ids=[*DORA, *MOVED])
def test_step_zero_equals_base_to_rounding(settings: dict[str, Any], model_folder: Path) -> None:
    expected, logits, _ = base_and_adapted(settings, model_folder)
    limit = TOLERANCE if settings in MOVED.values() else 1e-6
    assert float((logits - expected).abs().max() / expected.abs().max()) <= limit


def test_a_trained_adapter_differs() -> None:
    base = tiny_model().eval()
    with torch.no_grad():
        expected = base(IDS, use_cache=False).logits
        model = apply_method(base, MethodSection(name="lora")).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
        assert not torch.allclose(model(IDS, use_cache=False).logits, expected, atol=1e-3)
