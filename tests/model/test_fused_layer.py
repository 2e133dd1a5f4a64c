"""A layer as one function == the library's own; every way out of it is taken where it has to be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.data.collate import collate
from minituner.model import attention, fused_swiglu
from minituner.model.fused import KINDS, fuse
from minituner.model.fused_layer import LoraLayer
from minituner.model.loss import loss_sum
from tests.model.test_fused import PARTS, assert_same, loss_and_gradients, with_adapter
from tests.model.test_fused_rotary import family
from tests.promises.common import TOLERANCE, documents, gradients, largest_difference

ALL = list(KINDS)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each call of `LoraLayer`, in a list that fills while a model runs."""
    tokens: list[int] = []
    original = LoraLayer.forward

    def forward(ctx: Any, told: Any, x: torch.Tensor, *adapters: torch.Tensor) -> torch.Tensor:
        tokens.append(x.shape[1])
        return original(ctx, told, x, *adapters)

    monkeypatch.setattr(LoraLayer, "forward", staticmethod(forward))
    return tokens


@pytest.mark.parametrize(
    ("name", "changes"), [("Llama", {}), ("Qwen2", {}), ("Mistral", {"sliding_window": None}), ("Granite", {})]
)
def test_families_of_this_shape_are_one_function(name: str, changes: dict[str, Any], taken: list[int]) -> None:
    plain = family(name, **changes)
    for parameter_name, parameter in plain.named_parameters():
        if "lora_B" in parameter_name or parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.05)
    fused = copy.deepcopy(plain)
    assert fuse(fused, ALL).endswith("1 rotary, 1 layer")
    taken.clear()
    assert_same(fused, plain)
    assert taken == [24]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("Granite", {"residual_multiplier": 0.5}, "; left alone: layer (GraniteDecoderLayer computes something else)"),
        ("Qwen3", {}, " norm"),  # norms on q and k: its attention is not fused, so no layer is
        ("Mistral", {"sliding_window": 4}, " norm"),
    ],
)
def test_families_that_compute_something_else_are_left_alone(
    name: str, changes: dict[str, Any], said: str, taken: list[int]
) -> None:
    plain = family(name, **changes)
    fused = copy.deepcopy(plain)
    assert fuse(fused, ALL).endswith(said)
    taken.clear()
    assert_same(fused, plain)
    assert not taken


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(4, 20), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_any_documents_give_what_the_parts_give(lengths: list[int], seed: int) -> None:
    one, other = with_adapter(), with_adapter()
    fuse(one, ALL)
    fuse(other, PARTS)
    found = []
    for model in (one, other):
        loss = loss_sum(model, collate([documents(tuple(lengths), seed=seed)]), attention.PER_DOCUMENT_SDPA)
        loss.backward()
        found.append((float(loss.detach()), gradients(model)))
    (loss, grads), (expected, expected_grads) = found
    assert loss == pytest.approx(expected, rel=1e-6)
    assert largest_difference(grads, expected_grads) <= TOLERANCE


def test_a_long_row_goes_through_the_block_in_pieces(monkeypatch: pytest.MonkeyPatch, taken: list[int]) -> None:
    plain = with_adapter()
    fused = copy.deepcopy(plain)
    fuse(fused, ALL)
    taken.clear()
    monkeypatch.setattr(fused_swiglu, "PIECE", 11 * 4 * 64)  # eleven tokens of 64 float32
    assert_same(fused, plain)
    assert taken == [24, 24]


def hooked(module: Any) -> None:
    module.register_forward_hook(
        lambda _module, _inputs, out: out * 1.5 if isinstance(out, torch.Tensor) else (out[0] * 1.5, *out[1:])
    )


def replaced(module: Any) -> None:
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.5


def compiled(module: Any) -> None:
    module.compile(backend="eager")


@pytest.mark.parametrize(
    ("child", "change"),
    [
        ("input_layernorm", hooked),
        ("input_layernorm", replaced),
        ("self_attn", hooked),
        ("post_attention_layernorm", hooked),
        ("mlp", hooked),
        ("mlp", replaced),
        ("mlp", compiled),
    ],
)
def test_who_listens_inside_a_layer_is_heard(child: str, change: Callable[[Any], None], taken: list[int]) -> None:
    plain = with_adapter()
    fused = copy.deepcopy(plain)
    fuse(fused, ALL)
    taken.clear()
    for model in (plain, fused):
        change(getattr(model.get_base_model().model.layers[0], child))
    assert_same(fused, plain)
    assert taken == [24], "only the layer that nobody touched is one function"


@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.3}, {"use_dora": True}, {"target_modules": ["q_proj", "down_proj"]}],
    ids=["dropout", "DoRA", "some layers"],
)
def test_layers_that_are_more_or_less_than_adapters_take_their_parts_way(
    options: dict[str, Any], taken: list[int]
) -> None:
    plain = with_adapter(**options)
    fused = copy.deepcopy(plain)
    fuse(fused, ALL)
    assert_same(fused, plain)
    assert not taken


def test_answers_other_types_and_switched_off_adapters_take_the_models_own_way(taken: list[int]) -> None:
    plain = with_adapter()
    fused = copy.deepcopy(plain)
    fuse(fused, ALL)
    taken.clear()
    ids = torch.arange(12)[None]
    told = {"input_ids": ids, "seq_lens": [5, 7], "use_cache": False}
    with torch.no_grad():
        assert torch.equal(fused(**told).logits, plain(**told).logits)
    with attention.for_generation(plain), attention.for_generation(fused):
        expected = plain(input_ids=ids, use_cache=True).logits
        assert torch.allclose(fused(input_ids=ids, use_cache=True).logits, expected, rtol=0, atol=1e-5)
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.allclose(fused(**told).logits, plain(**told).logits, rtol=0, atol=1e-5)
    fused.to(torch.bfloat16)(**told)
    assert not taken


def test_what_a_layer_keeps_is_what_its_parts_keep() -> None:
    """But for the angles, which all layers share: no activation more."""
    kept = {}
    for kinds in (PARTS, ALL):
        model = with_adapter()
        fuse(model, kinds)
        known = {p.data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, known: Any = known, sizes: Any = sizes) -> torch.Tensor:
            if tensor.data_ptr() not in known:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_sum(model, collate([documents((9, 1, 14), seed=1)]), attention.PER_DOCUMENT_SDPA)
        kept[len(kinds)] = sum(sizes.values())
    assert kept[len(ALL)] <= kept[len(PARTS)]


def test_an_adapter_that_changes_before_the_backward_pass_is_refused() -> None:
    model = with_adapter()
    fuse(model, ALL)
    loss = loss_sum(model, collate([documents((9, 5), seed=1)]), attention.PER_DOCUMENT_SDPA)
    with torch.no_grad():
        model.get_base_model().model.layers[0].self_attn.v_proj.lora_B["default"].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_is_computed_for_what_stands_before_the_first_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding is frozen: the first layer's backward pass ends at its adapters."""
    model = with_adapter()
    fuse(model, ALL)
    asked: list[bool] = []
    original = LoraLayer.backward

    def backward(ctx: Any, dz: torch.Tensor) -> Any:
        asked.append(ctx.needs_input_grad[1])
        found = original(ctx, dz)
        assert (found[1] is not None) == asked[-1]
        return found

    monkeypatch.setattr(LoraLayer, "backward", staticmethod(backward))
    loss_and_gradients(model)
    assert asked == [True, False]


def test_all_kinds_or_no_layer_whatever_their_order() -> None:
    for left in PARTS:
        assert "layer" not in fuse(with_adapter(), [kind for kind in ALL if kind != left])
    assert fuse(with_adapter(), ALL[::-1]) == fuse(with_adapter(), ALL)
