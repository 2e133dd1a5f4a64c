"""The recipe's optimizer: what it decays, what it keeps, and that what it keeps comes back bit for bit from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minituner.errors import UsageError
from minituner.recipe import TrainSection
from minituner.train.optimizers import build_optimizer, load_optimizer_state, optimizer_state

NAMES = ("adamw", "adamw_8bit")
Parameters = dict[str, torch.nn.Parameter]


def parameters(seed: int = 0) -> Parameters:
    """A matrix that 8 bits are used for (4096 numbers and more), a small one and a vector."""
    torch.manual_seed(seed)
    shapes = {"big": (128, 64), "small": (5, 7), "norm": (33,)}
    return {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def step(optimizer: torch.optim.Optimizer, own: Parameters, number: int, rate: float = 1e-2) -> None:
    draw = torch.Generator().manual_seed(number)
    for parameter in own.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def same(a: Parameters, b: Parameters) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_is_for_matrices_only(name: str) -> None:
    own, before = parameters(), parameters()
    optimizer = build_optimizer(own, TrainSection(optimizer=name, weight_decay=0.5))
    for parameter in own.values():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for key, parameter in own.items():
        factor = 1 - 0.1 * 0.5 if parameter.ndim >= 2 else 1.0
        assert torch.allclose(parameter, before[key] * factor, atol=1e-6), key


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.floats(0, 0.3), st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.5)]))
def test_adamw_is_the_formula_of_the_paper(steps: int, decay: float, betas: tuple[float, float]) -> None:
    """Fused or not: Loshchilov and Hutter's algorithm 2, written out in float64."""
    own = parameters()
    train = TrainSection(weight_decay=decay, adam_betas=betas)
    optimizer = build_optimizer(own, train)
    assert optimizer.defaults["fused"], "torch has the fused kernel for CPU and GPU"
    for name, parameter in own.items():
        weight = parameter.detach().double().clone()
        m = v = torch.zeros_like(weight)
        for number in range(steps):
            draw = torch.Generator().manual_seed(number)
            gradient = [torch.randn(p.shape, generator=draw) for p in own.values()][list(own).index(name)].double()
            m, v = betas[0] * m + (1 - betas[0]) * gradient, betas[1] * v + (1 - betas[1]) * gradient**2
            mean, square = m / (1 - betas[0] ** (number + 1)), v / (1 - betas[1] ** (number + 1))
            weight = weight * (1 - 1e-2 * (decay if weight.ndim >= 2 else 0)) - 1e-2 * mean / (square.sqrt() + 1e-8)
        own[name].expected = weight
    for number in range(steps):
        step(optimizer, own, number)
    for name, parameter in own.items():
        assert torch.allclose(parameter.double(), parameter.expected, atol=1e-5), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_the_state_comes_back_bit_for_bit_through_a_file(name: str, after: int, tmp_path: Path) -> None:
    train = TrainSection(optimizer=name, weight_decay=0.1)
    straight = parameters()
    first = build_optimizer(straight, train)
    for number in range(after):
        step(first, straight, number)
    save_file(
        {k: v.contiguous().clone() for k, v in optimizer_state(first, straight).items()}, tmp_path / "o.safetensors"
    )
    resumed = parameters(seed=1)
    for key, parameter in resumed.items():
        parameter.data.copy_(straight[key])
    second = build_optimizer(resumed, train)
    load_optimizer_state(second, resumed, load_file(tmp_path / "o.safetensors"))
    for number in range(after, after + 3):
        step(first, straight, number, rate=1e-3)
        step(second, resumed, number, rate=1e-3)
    assert same(straight, resumed)
    one, other = optimizer_state(first, straight), optimizer_state(second, resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_without_its_state_it_would_not_be_the_same() -> None:
    """The test above can fail: averages that start anew take another way."""
    for name in NAMES:
        train = TrainSection(optimizer=name)
        straight = parameters()
        first = build_optimizer(straight, train)
        step(first, straight, 0)
        resumed = {key: torch.nn.Parameter(p.detach().clone()) for key, p in straight.items()}
        second = build_optimizer(resumed, train)
        step(first, straight, 1)
        step(second, resumed, 1)
        assert not same(straight, resumed)


def test_8_bits_take_a_quarter_of_the_memory_and_nearly_the_same_way() -> None:
    bytes_of, ends = {}, {}
    for name in NAMES:
        own = parameters()
        optimizer = build_optimizer(own, TrainSection(optimizer=name))
        for number in range(10):
            step(optimizer, own, number)
        state = optimizer_state(optimizer, {"big": own["big"]})
        bytes_of[name] = sum(t.numel() * t.element_size() for t in state.values() if t.numel() != 256)
        ends[name] = own["big"].detach()
    assert bytes_of["adamw_8bit"] < 0.3 * bytes_of["adamw"]
    moved = float((ends["adamw"] - parameters()["big"]).norm())
    assert 0 < float((ends["adamw"] - ends["adamw_8bit"]).norm()) < 0.1 * moved


def test_another_optimizer_s_state_is_refused() -> None:
    for name, other in (NAMES, NAMES[::-1]):
        own = parameters()
        optimizer = build_optimizer(own, TrainSection(optimizer=name))
        step(optimizer, own, 0)
        with pytest.raises(UsageError, match="optimizer is not this one"):
            load_optimizer_state(
                build_optimizer(own, TrainSection(optimizer=other)), own, optimizer_state(optimizer, own)
            )


def test_without_bitsandbytes_8_bits_are_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package bitsandbytes") as caught:
        build_optimizer(parameters(), TrainSection(optimizer="adamw_8bit"))
    assert caught.value.next_command == "pip install 'minituner[quantization]'"
