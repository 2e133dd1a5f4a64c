"""Fused layers == the libraries' own, forward and backward; what they cannot do is left to the libraries."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.data.collate import collate
from minituner.model import attention, fused_swiglu
from minituner.model.adapters import apply_method
from minituner.model.fused import KINDS, fuse
from minituner.model.fused_lora import LoraProduct, Part, a_and_b, parts_of
from minituner.model.fused_norm import RmsNorm
from minituner.model.fused_swiglu import LoraSwiglu, SiluProduct
from minituner.model.loss import loss_sum
from minituner.recipe import MethodSection, TrainSection
from minituner.train.loop import train
from tests.promises.common import TOLERANCE, documents, gradients, largest_difference
from tests.tiny import tiny_model, tiny_recipe

ALL = list(KINDS)
PARTS = [kind for kind in ALL if kind != "layer"]  # which is made of the others (test_fused_layer.py)


def with_adapter(**options: Any) -> Any:
    """The tiny model with an adapter whose B is not zero, so that A has a gradient."""
    attention.register()
    torch.manual_seed(0)
    model = tiny_model()
    model.set_attn_implementation(attention.PER_DOCUMENT_SDPA)
    model = apply_method(model, MethodSection(lora_rank=4, **options)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def loss_and_gradients(model: Any, seed: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """Of a row with three documents."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = loss_sum(model, collate([documents((9, 1, 14), seed=1)]), attention.PER_DOCUMENT_SDPA)
    loss.backward()
    return float(loss.detach()), gradients(model)


def assert_same(one: Any, other: Any) -> None:
    (loss, grads), (expected, expected_grads) = loss_and_gradients(one), loss_and_gradients(other)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert largest_difference(grads, expected_grads) <= TOLERANCE


@pytest.mark.parametrize("kinds", [[kind] for kind in PARTS] + [PARTS, ALL])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["v_proj", "down_proj"]}])
def test_a_fused_model_has_the_same_loss_and_gradients(kinds: list[str], options: dict[str, Any]) -> None:
    plain = with_adapter(**options)
    fused = copy.deepcopy(plain)
    names = list(fused.state_dict())
    assert "left alone" not in fuse(fused, kinds)
    changed = [type(m).__mro__[1] for m in fused.modules() if type(m).__module__.startswith("minituner.model.fused")]
    assert changed, "nothing was fused"
    assert list(fused.state_dict()) == names
    assert_same(fused, plain)


def test_a_norm_that_is_trained_is_left_alone() -> None:
    attention.register()
    plain = tiny_model()
    plain.set_attn_implementation(attention.PER_DOCUMENT_SDPA)
    plain = apply_method(plain, MethodSection(name="full")).train()
    fused = copy.deepcopy(plain)
    assert fuse(fused, ALL) == "fused: 2 swiglu, 2 rotary"
    assert_same(fused, plain)
    assert "model.norm.weight" in gradients(fused)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"use_dora": True}], ids=["dropout", "DoRA"])
def test_what_is_more_than_a_product_goes_through_peft(options: dict[str, Any]) -> None:
    plain = with_adapter(**options)
    fused = copy.deepcopy(plain)
    fuse(fused, ALL)
    layer = fused.get_base_model().model.layers[0].mlp.up_proj
    assert parts_of([layer], torch.zeros(1, 2, 32)) is None
    assert_same(fused, plain)


def test_switching_off_merging_and_other_types_work_as_before() -> None:
    plain = with_adapter()
    fused = copy.deepcopy(plain)
    fuse(fused, ALL)
    ids = torch.arange(12)[None]

    def logits(model: Any) -> torch.Tensor:
        return model(input_ids=ids, seq_lens=[12], use_cache=False).logits

    for prepare in (lambda model: None, lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter()):
        prepare(plain)
        prepare(fused)
        assert torch.allclose(logits(fused), logits(plain), rtol=0, atol=1e-5)
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.allclose(logits(fused), logits(plain), rtol=0, atol=1e-5)
    layer = fused.get_base_model().model.layers[0].mlp.up_proj
    assert parts_of([layer], torch.zeros(1, 2, 32, dtype=torch.bfloat16)) is None
    (part,) = parts_of([layer], torch.zeros(1, 2, 32))
    assert (part.a, part.b) == (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    with torch.no_grad():
        assert parts_of([layer], torch.zeros(1, 2, 32)) is None


def test_a_layer_that_computes_something_else_is_left_alone() -> None:
    class OddRMSNorm(torch.nn.Module):
        """Multiplies by 1 + weight, as Gemma's does."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((32,), 0.5))
            self.variance_epsilon = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, (32,), 1 + self.weight, self.variance_epsilon)

    model = with_adapter()
    odd = OddRMSNorm().requires_grad_(False)
    model.get_base_model().model.norm = odd
    before = copy.deepcopy(model)
    said = fuse(model, ALL)
    assert "left alone: norm (OddRMSNorm computes something else)" in said
    assert type(odd) is OddRMSNorm
    assert_same(model, before)


def test_parameters_in_pieces_are_left_to_those_who_gather_them() -> None:
    model = with_adapter()
    next(model.parameters()).ds_id = 0  # what ZeRO-3 puts on a parameter
    assert fuse(model, ALL).startswith("fused: nothing")
    assert not [m for m in model.modules() if type(m).__module__.startswith("minituner.model.fused")]


def test_the_proof_draws_no_random_numbers_and_leaves_no_gradient() -> None:
    model = with_adapter()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fuse(model, ALL)
    assert torch.equal(torch.rand(4), expected)
    assert not gradients(model)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5)),
    bias=st.booleans(),
    flows=st.booleans(),
    scale=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_lora_product_equals_autograd(
    shape: tuple[int, int], sizes: tuple[int, int, int], bias: bool, flows: bool, scale: float
) -> None:
    wide, narrow, rank = sizes
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, wide, generator=draw, dtype=torch.float64, requires_grad=flows)
    w = torch.randn(narrow, wide, generator=draw, dtype=torch.float64)
    a = torch.randn(rank, wide, generator=draw, dtype=torch.float64, requires_grad=True)
    b = torch.randn(narrow, rank, generator=draw, dtype=torch.float64, requires_grad=True)
    c = torch.randn(narrow, generator=draw, dtype=torch.float64) if bias else None
    wanted = [a, b, x] if flows else [a, b]
    expected = torch.nn.functional.linear(x, w, c) + scale * (x @ a.T @ b.T)
    parts = [Part(w, c, a, b, scale)]
    (found,) = LoraProduct.apply(parts, x, *a_and_b(parts))
    upstream = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    assert torch.allclose(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        assert torch.allclose(ours, theirs)


@settings(max_examples=15, deadline=None)
@given(widths=st.lists(st.integers(1, 9), min_size=2, max_size=3), ranks=st.integers(1, 4), flows=st.booleans())
def test_layers_that_share_x_equal_layers_one_by_one(widths: list[int], ranks: int, flows: bool) -> None:
    draw = torch.Generator().manual_seed(0)

    def matrix(*shape: int, trained: bool = True) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64, requires_grad=trained)

    x = matrix(4, 6, trained=flows)
    parts = [
        Part(matrix(out, 6, trained=False), None, matrix(ranks + i, 6), matrix(out, ranks + i), 0.5 + i)
        for i, out in enumerate(widths)
    ]
    wanted = [*a_and_b(parts), *([x] if flows else [])]
    together = LoraProduct.apply(parts, x, *a_and_b(parts))
    apart = [LoraProduct.apply([part], x, *a_and_b([part]))[0] for part in parts]
    upstream = [matrix(4, out, trained=False) for out in widths]
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one, other)
    gradients_of_both = (torch.autograd.grad(ys, wanted, upstream) for ys in (together, apart))
    assert all(torch.allclose(one, other) for one, other in zip(*gradients_of_both, strict=True))


@pytest.mark.parametrize(
    ("options", "whole"),
    [({}, True), ({"target_modules": ["up_proj", "down_proj"]}, False), ({"lora_dropout": 0.2}, False)],
)
def test_a_block_is_one_function_where_all_three_layers_are_fused(
    options: dict[str, Any], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapter(**options)
    fuse(model, PARTS)
    taken: list[str] = []
    for kind in (LoraSwiglu, SiluProduct):
        original = kind.forward

        def forward(*arguments: Any, original: Any = original, name: str = kind.__name__) -> torch.Tensor:
            taken.append(name)
            return original(*arguments)

        monkeypatch.setattr(kind, "forward", staticmethod(forward))
    loss_and_gradients(model)
    assert taken == ["LoraSwiglu" if whole else "SiluProduct"] * 2


@pytest.mark.parametrize("kinds", [PARTS, ALL], ids=["parts", "layer"])
@pytest.mark.parametrize("place", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_who_listens_to_a_layer_that_shares_a_function_is_heard(place: str, kinds: list[str]) -> None:
    plain = with_adapter()
    fused = copy.deepcopy(plain)
    fuse(fused, kinds)
    for model in (plain, fused):
        layer = model.get_submodule(f"base_model.model.model.layers.1.{place}")
        layer.register_forward_hook(lambda layer, given, out: out * 1.5)
    assert_same(fused, plain)


def test_a_long_row_goes_through_a_block_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = with_adapter()
    fused = copy.deepcopy(plain)
    fuse(fused, PARTS)
    rows: list[int] = []
    original = LoraSwiglu.forward

    def forward(ctx: Any, parts: Any, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return original(ctx, parts, x, *rest)

    monkeypatch.setattr(LoraSwiglu, "forward", staticmethod(forward))
    monkeypatch.setattr(fused_swiglu, "PIECE", 11 * 4 * 64)  # eleven tokens of 64 float32
    assert_same(fused, plain)
    assert rows == [11, 11, 2] * 2


def test_what_a_fused_block_keeps() -> None:
    """x, gate, up and the thin products; the activation and its product with up are made again."""
    model = with_adapter()
    fuse(model, ["lora", "swiglu"])
    block = model.get_base_model().model.layers[0].mlp
    sizes: list[int] = []
    weights = {p.data_ptr() for p in block.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(torch.randn(1, 7, 32, requires_grad=True))
    assert sorted(sizes) == sorted([7 * 32, 7 * 64, 7 * 64, 7 * 2 * 4, 7 * 4])


def test_swiglu_and_norm_equal_autograd_by_finite_differences() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 5, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.rand(5, generator=draw, dtype=torch.float64)
    assert torch.autograd.gradcheck(SiluProduct.apply, (x, y))
    assert torch.autograd.gradcheck(lambda x: RmsNorm.apply(x, w, 1e-6), (x,))
    assert torch.allclose(RmsNorm.apply(x, w, 1e-6), torch.nn.functional.rms_norm(x, (5,), w, 1e-6))


def test_four_bit_layers_are_fused_and_equal(tmp_path: Path, model_folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from minituner.model.loading import load_model
    from minituner.recipe import ModelSection

    method, section = MethodSection(name="qlora", lora_rank=4), ModelSection(name_or_path="x", dtype="float32")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = apply_method(load_model(model_folder, section, method, device="cpu")[0], method).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        models.append(model)
    plain, fused = models
    assert fuse(fused, ALL) == "fused: 14 lora, 2 swiglu, 5 norm, 2 rotary, 2 layer"
    assert_same(fused, plain)


@pytest.mark.usefixtures("own_home")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_is_the_same_with_and_without(model_folder: Path, chats: Path, tmp_path: Path, recompute: bool) -> None:
    losses = {}
    for fused in (ALL, []):
        options = {"fused": fused, "max_steps": 4, "activation_checkpointing": recompute}
        recipe = tiny_recipe(model_folder, chats, train=options)
        said: list[str] = []
        result = train(recipe, tmp_path / f"{len(fused)}", say=said.append, progress=False)
        losses[len(fused)] = [line["loss"] for line in result.metrics]
        assert [
            line
            for line in said
            if line.startswith("fused: 14 lora, 2 swiglu, 5 norm, 2 rotary, 2 layer" if fused else "fused: no")
        ]
    assert losses[len(ALL)] == pytest.approx(losses[0], rel=TOLERANCE)


def test_the_recipe_knows_every_kind_and_turns_all_on() -> None:
    assert TrainSection().fused == ALL
