"""The learning rate is never zero and never stuck at its warm-up, however few steps there are."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from minituner.recipe import TrainSection
from minituner.train.schedule import learning_rate

KINDS = ("cosine", "linear", "constant")
PEAK = 2e-4


def curve(total: int, kind: str, warmup_ratio: float) -> list[float]:
    train = TrainSection(learning_rate=PEAK, lr_schedule=kind, warmup_ratio=warmup_ratio)
    return [learning_rate(step, total, train) for step in range(total)]


@settings(deadline=None)  # the first call imports transformers
@given(st.integers(1, 400), st.sampled_from(KINDS), st.floats(0, 0.999))
@example(1, "cosine", 0.999)
@example(2, "cosine", 0.5)
@example(33, "cosine", 0.03)  # a warm-up of 0 steps
@example(34, "cosine", 0.03)  # and of 1
def test_it_rises_to_the_peak_then_falls_and_is_always_above_zero(total: int, kind: str, warmup_ratio: float) -> None:
    rates = curve(total, kind, warmup_ratio)
    top = rates.index(max(rates))
    assert all(0 < rate <= PEAK for rate in rates)
    assert rates[top] == pytest.approx(PEAK), "the peak is reached"
    assert top == min(int(warmup_ratio * total), total - 1), "right after the warm-up"
    assert all(a < b for a, b in pairwise(rates[: top + 1])), "the warm-up is not stuck"
    after = rates[top:]
    steady = kind == "constant"
    assert all(a == b if steady else a > b for a, b in pairwise(after))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_step_learns_at_the_peak(kind: str) -> None:
    for warmup_ratio in (0.0, 0.03, 0.999):
        assert curve(1, kind, warmup_ratio) == [PEAK]


def test_a_warm_up_of_one_step_is_over_after_it() -> None:
    assert curve(10, "constant", 0.1) == [PEAK / 2, *[PEAK] * 9]


@pytest.mark.parametrize("kind", KINDS)
def test_no_warm_up_starts_at_the_peak(kind: str) -> None:
    assert curve(10, kind, 0.0)[0] == PEAK


def test_a_very_long_run_still_ends_above_zero() -> None:
    train = TrainSection(learning_rate=PEAK, warmup_ratio=0.03)
    assert learning_rate(9_999_999, 10_000_000, train) > 0


def test_cosine_is_halfway_down_in_the_middle() -> None:
    assert curve(100, "cosine", 0.0)[50] == pytest.approx(PEAK / 2)
    assert curve(100, "linear", 0.0)[75] == pytest.approx(PEAK / 4)


def test_steps_after_the_planned_end_do_not_turn_negative() -> None:
    for kind in KINDS:
        assert learning_rate(120, 100, TrainSection(lr_schedule=kind)) >= 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("total", "ratio"), [(1, 0.0), (50, 0.0), (50, 0.2), (400, 0.03)])
def test_it_is_the_curve_of_transformers_but_for_the_first_rate_of_zero(kind: str, total: int, ratio: float) -> None:
    """Walked along as transformers' own Trainer does, against the values we read off."""
    warmup = int(ratio * total)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    theirs = []
    for _ in range(total):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = curve(total, kind, ratio)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)
    assert ours[:warmup] == pytest.approx([PEAK * (step + 1) / (warmup + 1) for step in range(warmup)], rel=1e-12)
    if warmup:
        assert theirs[0] == 0 < ours[0], "the difference: their first step changes nothing"
        assert all(abs(a - b) <= PEAK / (warmup + 1) * (1 + 1e-9) for a, b in zip(ours, theirs, strict=True))
