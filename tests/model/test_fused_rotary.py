"""Rotation in two passes == transformers' own; what else attention is told stays; other layers are left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minituner.model import attention, fused_rotary
from minituner.model.adapters import apply_method
from minituner.model.fused import fuse
from minituner.model.fused_lora import LoraProduct
from minituner.model.fused_rotary import Rotation
from minituner.recipe import MethodSection
from tests.model.test_fused import assert_same, loss_and_gradients, with_adapter
from tests.tiny import tiny_model


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 2), tokens=st.integers(1, 9), heads=st.integers(1, 4), half=st.integers(1, 5))
def test_rotation_equals_transformers(rows: int, tokens: int, heads: int, half: int) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(rows, tokens, n, 2 * half, generator=draw, dtype=torch.float64, requires_grad=True)
        for n in (2 * heads, heads)
    )
    angles = torch.randn(rows, tokens, half, generator=draw, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    found = Rotation.apply(cos, sin, q, k)
    upstream = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in (q, k)]
    gradients = [torch.autograd.grad(ys, (q, k), upstream) for ys in (found, expected)]
    back = Rotation.apply(cos, -sin, *found)
    for ours, theirs in ((found, expected), gradients, (back, (q, k))):
        assert all(torch.allclose(one, other) for one, other in zip(ours, theirs, strict=True))


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What `rotates_here` says of each call of a fused layer, in a list that fills while the model runs."""
    said: list[bool] = []
    original = fused_rotary.rotates_here

    def rotates_here(*arguments: Any) -> bool:
        said.append(original(*arguments))
        return said[-1]

    monkeypatch.setattr(fused_rotary, "rotates_here", rotates_here)
    return said


@pytest.mark.parametrize(
    ("options", "together"),
    [({}, True), ({"lora_dropout": 0.1}, False), ({"target_modules": ["o_proj"]}, False)],
)
def test_a_model_is_the_same_and_takes_that_way(
    options: dict[str, Any], together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = with_adapter(**options)
    fused = copy.deepcopy(plain)
    assert fuse(fused, ["lora", "rotary"]).endswith("2 rotary")
    said = calls_of(monkeypatch)
    assert_same(fused, plain)
    assert said == [True, True]
    counts: list[int] = []
    original = LoraProduct.forward

    def forward(ctx: Any, parts: Any, *tensors: Any) -> Any:
        counts.append(len(parts))
        return original(ctx, parts, *tensors)

    monkeypatch.setattr(LoraProduct, "forward", staticmethod(forward))
    loss_and_gradients(fused)
    assert (3 in counts) == together, "query, key and value are one function where each is nothing but fused LoRA"


def test_answers_and_other_attention_take_the_models_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = with_adapter()
    fused = copy.deepcopy(plain)
    fuse(fused, ["rotary"])
    said = calls_of(monkeypatch)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = plain(input_ids=ids, seq_lens=[5, 7], use_cache=False).logits
        assert torch.equal(fused(input_ids=ids, seq_lens=[5, 7], use_cache=False).logits, expected)
    with attention.for_generation(plain), attention.for_generation(fused):
        expected = plain(input_ids=ids, use_cache=True).logits
        assert torch.equal(fused(input_ids=ids, use_cache=True).logits, expected)
    assert not any(said)


def family(name: str, **changes: Any) -> Any:
    """A tiny model of another family with an adapter on it."""
    import transformers

    shape = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{name}Config")(**{**shape, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    attention.register()
    model.set_attn_implementation(attention.PER_DOCUMENT_SDPA)
    return apply_method(model, MethodSection(lora_rank=4)).train()


@pytest.mark.parametrize(
    ("name", "changes"), [("Llama", {}), ("Llama", {"attention_dropout": 0.3}), ("Qwen2", {}), ("Mistral", {})]
)
def test_families_that_compute_this_are_fused(
    name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = family(name, **({"sliding_window": None} if name == "Mistral" else {}), **changes)
    fused = copy.deepcopy(plain)
    assert fuse(fused, ["rotary"]) == "fused: 1 rotary"
    said = calls_of(monkeypatch)
    assert_same(fused, plain)
    assert said == [True]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("Qwen3", {}, "fused: nothing"),  # norms on q and k
        ("Mistral", {"sliding_window": 4}, "fused: nothing"),
        ("Helium", {}, "fused: nothing; left alone: rotary (HeliumAttention computes something else)"),
    ],
)
def test_families_that_compute_something_else_are_left_alone(name: str, changes: dict[str, Any], said: str) -> None:
    plain = family(name, **changes)
    fused = copy.deepcopy(plain)
    assert fuse(fused, ["rotary"]) == said
    assert_same(fused, plain)


def test_attention_that_is_told_nothing_of_rotary_positions_is_not_even_asked() -> None:
    """It has the same layers, but whoever called it with positions would be told so by a TypeError."""

    class Attention(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config, self.head_dim, self.scaling, self.attention_dropout = config, 8, 1.0, 0.0
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(self, name, torch.nn.Linear(32, 32, bias=False))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.o_proj(self.v_proj(hidden_states))

    model = tiny_model()
    model.model.layers[0].self_attn = Attention(model.config)
    model.set_attn_implementation("sdpa")
    assert fuse(model, ["rotary"]) == "fused: 1 rotary"
    assert type(model.model.layers[0].self_attn) is Attention


def test_a_full_model_is_fused_too() -> None:
    attention.register()
    model = tiny_model()
    model.set_attn_implementation(attention.PER_DOCUMENT_SDPA)
    plain = apply_method(model, MethodSection(name="full")).train()
    fused = copy.deepcopy(plain)
    assert fuse(fused, ["rotary"]) == "fused: 2 rotary"
    assert_same(fused, plain)
