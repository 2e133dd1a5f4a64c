"""The plain engine: clip, update, clear; nothing that is not finite reaches a weight; its state comes back exactly."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from minituner.recipe import MethodSection, TrainSection
from minituner.train.engines import TorchEngine
from tests.tiny import tiny_model


def engine_over(model: torch.nn.Module, **settings: object) -> TorchEngine:
    engine = TorchEngine(TrainSection(**settings), "cpu")
    engine.prepare(model)
    return engine


def loss_of(model: torch.nn.Module, scale: float = 1.0) -> torch.Tensor:
    return model(input_ids=torch.arange(12)[None]).logits.float().logsumexp(-1).sum() * scale


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_change_nothing_and_are_forgotten(bad: float) -> None:
    model = tiny_model()
    engine = engine_over(model)
    before = weights(model)
    engine.backward(loss_of(model, bad))
    assert not math.isfinite(engine.step(1e-2))
    assert same(weights(model), before)
    assert not engine.state(), "AdamW's averages are untouched too"
    assert all(p.grad is None for p in model.parameters())
    engine.backward(loss_of(model))
    assert math.isfinite(engine.step(1e-2))
    assert not same(weights(model), before)


def test_one_parameter_with_a_nan_gradient_is_enough() -> None:
    model = tiny_model()
    engine = engine_over(model, max_grad_norm=None)
    before = weights(model)
    engine.backward(loss_of(model))
    model.model.norm.weight.grad[3] = math.nan
    assert math.isnan(engine.step(1e-2))
    assert same(weights(model), before)


def test_clipping_limits_the_norm_and_null_turns_it_off() -> None:
    norms = {}
    for limit in (1e-3, None):
        model = tiny_model()
        engine = engine_over(model, max_grad_norm=limit)
        engine.backward(loss_of(model))
        seen: list[float] = []
        engine.optimizer.register_step_pre_hook(
            lambda *_, m=model, s=seen: s.append(
                float(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]).norm())
            )
        )
        norms[limit] = (engine.step(1e-3), seen[0])
    assert norms[1e-3][0] == pytest.approx(norms[None][0]), "the norm reported is the one before clipping"
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-3)
    assert norms[None][1] == pytest.approx(norms[None][0], rel=1e-5)


def test_weight_decay_is_for_matrices_only() -> None:
    model = tiny_model()
    engine = engine_over(model, weight_decay=0.5)
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    engine.step(0.1)
    for name, now in weights(model).items():
        factor = 1 - 0.1 * 0.5 if now.ndim >= 2 else 1.0
        assert torch.allclose(now, before[name] * factor), name


def test_only_trainable_parameters_are_touched() -> None:
    from minituner.model.adapters import apply_method

    model = apply_method(tiny_model(), MethodSection(lora_rank=2))
    engine = engine_over(model)
    before = weights(model)
    engine.backward(loss_of(model))
    engine.step(1e-2)
    moved = {name for name, now in weights(model).items() if not torch.equal(now, before[name])}
    assert moved
    assert all("lora_B" in name for name in moved), "A moves from the second step on, the base never"


def test_the_state_comes_back_bit_for_bit_through_a_file(tmp_path) -> None:
    straight, resumed = tiny_model(), tiny_model()
    first = engine_over(straight)
    for _ in range(3):
        first.backward(loss_of(straight))
        first.step(1e-2)
    save_file({k: v.contiguous() for k, v in first.state().items()}, tmp_path / "optimizer.safetensors")
    resumed.load_state_dict(straight.state_dict())
    second = engine_over(resumed)
    second.load_state(first.weights(), load_file(tmp_path / "optimizer.safetensors"))
    for engine, model in ((first, straight), (second, resumed)):
        engine.backward(loss_of(model))
        engine.step(1e-2)
    assert same(weights(straight), weights(resumed))
    assert same(first.state(), second.state())


def test_a_single_process_sums_to_itself() -> None:
    engine = TorchEngine(TrainSection(), "cpu")
    assert (engine.rank, engine.world_size, engine.all_sum(3.5)) == (0, 1, 3.5)
