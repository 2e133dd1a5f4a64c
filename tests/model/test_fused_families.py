"""Families whose layers look like Llama's and are not: some layers turn nothing, are called otherwise, or clamp."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minituner.data.collate import collate
from minituner.model import attention, matmul
from minituner.model.adapters import apply_method
from minituner.model.attention import PER_DOCUMENT_SDPA
from minituner.model.fused import KINDS, fuse, replace_classes, same
from minituner.model.fused_swiglu import fused_swiglu, is_swiglu
from minituner.model.loading import load_model
from minituner.model.loss import loss_sum
from minituner.model.sources import fetch
from minituner.recipe import MethodSection, ModelSection
from minituner.train.evaluation import untouched
from tests.model.test_fused import assert_same, loss_and_gradients, with_adapter
from tests.model.test_fused_rotary import family
from tests.promises.common import documents

ALL = list(KINDS)
HYBRID = {
    "layer_types": ["attention"],
    "shared_intermediate_size": 48,
    "num_local_experts": 0,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
}


def unlike_at_first(model: Any) -> Any:
    """The model with adapters that change something."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_each_layer_has_its_own_proof() -> None:
    """SmolLM3's fourth layer rotates nothing, and the last one does: one of a class does not stand for the others."""
    plain = unlike_at_first(family("SmolLM3", num_hidden_layers=5, bos_token_id=1, eos_token_id=2))
    layers = plain.get_base_model().model.layers
    assert [bool(layer.self_attn.use_rope) for layer in layers] == [True, True, True, False, True]
    fused = copy.deepcopy(plain)
    said = fuse(fused, ALL)
    assert "4 rotary, 4 layer" in said
    assert "left alone: rotary (1 of 5 SmolLM3Attention computes something else)" in said
    assert_same(fused, plain)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Ministral3", {"sliding_window": None}),  # its attention asks for position_ids
        ("Olmo", {"clip_qkv": 0.05}),  # clamps in place what q, k and v give
        ("GraniteMoeHybrid", HYBRID),  # its attention has another order of arguments
    ],
)
@pytest.mark.parametrize("kinds", [ALL, ["lora"], ["rotary"]], ids="+".join)
def test_families_that_are_called_otherwise_or_change_in_place_train_as_they_are(
    name: str, changes: dict[str, Any], kinds: list[str]
) -> None:
    plain = unlike_at_first(family(name, **changes))
    fused = copy.deepcopy(plain)
    assert fuse(fused, kinds).startswith("fused: ")
    assert_same(fused, plain)
    with torch.no_grad():  # as proofs, answers and evaluation call it
        row = collate([documents((9, 1, 14), seed=1)])
        assert torch.equal(*(loss_sum(model, row, PER_DOCUMENT_SDPA) for model in (fused, plain)))


class Clamped(torch.nn.Module):
    """Children and activation of an ordinary block, and a limit for what is large."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(32, 48, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = torch.nn.Linear(48, 32, bias=False), torch.nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10)) * self.up_proj(x).clamp(-10, 10))


def test_a_limit_that_small_states_do_not_reach_is_seen() -> None:
    torch.manual_seed(0)
    block = Clamped()
    assert is_swiglu(block)
    assert not same(block, fused_swiglu)
    x = torch.randn(1, 9, 32)
    was = block(x)
    replace_classes([block], fused_swiglu)
    assert torch.allclose(block(x), was, atol=1e-6), "so a proof with ordinary states would have passed"


def scale(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
    return out * 1.5


@pytest.mark.parametrize(
    "place",
    ["self_attn.q_proj.base_layer", "self_attn.o_proj.lora_A.default", "mlp.down_proj.lora_B.default", "mlp.act_fn"],
)
@pytest.mark.parametrize("kinds", [["lora"], ["lora", "swiglu"], ALL], ids="+".join)
def test_who_listens_inside_an_adapter_or_to_the_activation_is_heard(place: str, kinds: list[str]) -> None:
    plain = with_adapter()
    untouched_loss, _ = loss_and_gradients(plain)
    fused = copy.deepcopy(plain)
    fuse(fused, kinds)
    for model in (plain, fused):
        model.get_submodule(f"base_model.model.model.layers.1.{place}").register_forward_hook(scale)
    assert_same(fused, plain)
    assert loss_and_gradients(plain)[0] != untouched_loss


def test_hooks_on_all_modules_hear_every_adapter() -> None:
    model = with_adapter()
    fuse(model, ALL)
    heard: list[str] = []
    listen: Callable[..., None] = lambda module, given, out: heard.append(type(module).__name__)  # noqa: E731
    handle = torch.nn.modules.module.register_module_forward_hook(listen)
    try:
        loss_and_gradients(model)
    finally:
        handle.remove()
    assert heard.count("Linear") >= 2 * 7, "seven adapted layers in each of two"


def test_evaluation_keeps_no_graph() -> None:
    model = with_adapter()
    with untouched(model):
        assert not torch.is_grad_enabled()
        assert not model.training
    assert torch.is_grad_enabled()
    assert model.training


@pytest.mark.slow
@pytest.mark.parametrize("products", ["blas", "onednn"])
def test_every_layer_of_the_embedded_model_passes_its_proof(products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained weights round more than drawn ones: one of these thirty layers is off by 1e-5."""
    monkeypatch.setattr(matmul, "_chosen", products)
    attention.register()
    section = ModelSection(name_or_path="smollm2-135m-instruct", dtype="float32")
    model, _, _ = load_model(fetch(section.name_or_path), section, MethodSection(), device="cpu")
    model.set_attn_implementation(PER_DOCUMENT_SDPA)
    said = fuse(apply_method(model, MethodSection()), ALL)
    assert said == "fused: 210 lora, 30 swiglu, 61 norm, 30 rotary, 30 layer"
