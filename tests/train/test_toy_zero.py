"""The toy of the ZeRO lesson: every stage is plain AdamW, holds what the formula says, and sends what it says."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from os import getpid, kill
from typing import Any

import numpy as np
import pytest
import torch

from minituner.errors import MinitunerError, UsageError
from minituner.train.ranks import Ranks
from minituner.train.spawn import on_ranks
from minituner.train.toy_lesson import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    Row,
    chat_row,
    one_step_short,
    supervised,
    toy_loss,
    toy_model,
    train_every_stage,
    train_toy,
)
from minituner.train.toy_zero import Layer, Ring, ToyZero
from minituner.train.zero_bytes import bytes_held, bytes_sent
from tests.tiny import tiny_model
from tests.train.processes import forked_ranks

ROWS = [
    chat_row("Who made you? ", "Ada did."),
    chat_row("你是谁？", "我是小海，由小明训练的助手。"),
    chat_row("hi ", "Hello! How can I help you today? Ask me anything at all."),
    chat_row("1 + 1 = ", "2"),
    chat_row("再见", "再见！"),
]
STEPS = 4
PARAMETERS = sum(p.numel() for p in toy_model().parameters())


def plain_adamw(shares: Sequence[Sequence[Row]]) -> tuple[list[float], np.ndarray]:
    """torch.optim.AdamW in one process, the gradients of the shares added up; losses and all weights in one row."""
    model = toy_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    total, losses = sum(supervised(share) for share in shares), []
    for _ in range(STEPS):
        own = 0.0
        for share in shares:
            loss = toy_loss(model, share)
            (loss / total).backward()
            own += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(own / total)
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


@pytest.fixture(scope="module")
def two() -> list[list[dict[str, Any]]]:
    """By rank, by stage."""
    with forked_ranks():
        return on_ranks(2, train_every_stage, ROWS, STEPS, quiet=True)


@pytest.fixture(scope="module")
def three_accumulating() -> list[list[dict[str, Any]]]:
    """Three ranks, of which the last has one row less than micro-batches: an empty one."""
    with forked_ranks():
        return on_ranks(3, train_every_stage, ROWS, STEPS, 2, quiet=True)


def row_of(result: dict[str, Any]) -> np.ndarray:
    return np.concatenate(list(result["weights"].values()))


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_are_plain_adamw_bit_for_bit(two: Any, stage: int) -> None:
    losses, weights = plain_adamw([ROWS[::2], ROWS[1::2]])
    for rank in range(2):
        assert two[rank][stage]["losses"] == losses
        assert np.array_equal(row_of(two[rank][stage]), weights)
    assert losses[-1] < losses[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_three_ranks_with_accumulation_and_an_empty_micro_batch(three_accumulating: Any, stage: int) -> None:
    losses, weights = plain_adamw([ROWS])
    for rank in range(3):
        assert three_accumulating[rank][stage]["losses"] == pytest.approx(losses, abs=2e-6)
        # Where a gradient is all rounding noise AdamW still makes a step of its size: compare with what it moved.
        assert np.abs(row_of(three_accumulating[rank][stage]) - weights).mean() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_bytes_held_are_those_of_the_formula(two: Any, three_accumulating: Any, stage: int) -> None:
    for results, world_size in ((two, 2), (three_accumulating, 3)):
        for rank in range(world_size):
            held, formula = results[rank][stage]["held"], bytes_held(PARAMETERS, world_size, stage)
            layers = len(results[rank][stage]["weights"])
            filling = 0 if world_size == 2 else 4 * layers * world_size  # zeros that make the parts equal
            for part in ("weights", "gradients", "optimizer"):
                assert 0 <= held[part] - formula[part] <= 2 * filling, part


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_bytes_sent_are_those_of_the_formula(two: Any, three_accumulating: Any, stage: int) -> None:
    for results, world_size, micro_batches in ((two, 2, 1), (three_accumulating, 3, 2)):
        for rank in range(world_size):
            sent = results[rank][stage]["sent"]
            for collective, count in bytes_sent(PARAMETERS, world_size, stage, micro_batches).items():
                assert sent[collective] == pytest.approx(count, rel=2e-4)


@pytest.mark.slow
def test_at_its_fullest_a_stage_holds_one_whole_layer_more(two: Any) -> None:
    biggest = 4 * max(len(row) for row in two[0][0]["weights"].values())
    for stage, layers in ((0, 0), (1, 0), (2, 1), (3, 2)):  # stage 3: one layer's weights and its gradient
        more = sum(two[0][stage]["peak"].values()) - sum(bytes_held(PARAMETERS, 2, stage).values())
        assert more <= layers * biggest
        assert (more > 0) == (layers > 0)


def rings(ranks: Ranks) -> None:
    draw = torch.Generator().manual_seed(0)
    ring, me, world_size = Ring(ranks), ranks.rank, ranks.world.world_size
    for part in (1, 2, 7, 100):
        rows = torch.randint(-99, 99, (world_size, part * world_size), generator=draw).float()
        own = slice(me * part, (me + 1) * part)
        assert torch.equal(ring.reduce_scatter(rows[me].clone()), rows.sum(0)[own])
        gathered = torch.full_like(rows[0], torch.nan)
        gathered[own] = rows[0][own]
        ring.all_gather(gathered)
        assert torch.equal(gathered, rows[0])
        ring.all_reduce(summed := rows[me].clone())
        assert torch.equal(summed, rows.sum(0))
    once = 4 * (1 + 2 + 7 + 100) * (world_size - 1)
    assert ring.sent == {"reduce-scatter": 2 * once, "all-gather": 2 * once}


def llama(ranks: Ranks) -> None:
    """A real architecture: a Llama under stage 3, one layer a decoder block, against torch's AdamW."""
    plain, model = tiny_model(tie=False), tiny_model(tie=False)
    ids = torch.arange(24).view(2, 12)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    optimizer = ToyZero(model, ranks, 3, 1e-3, weight_decay=0.01)
    names = [layer.name for layer in optimizer.layers]
    assert names == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    for _ in range(3):
        for row in ids:
            (plain(row[None], labels=row[None]).loss / 2).backward()
        reference.step()
        reference.zero_grad()
        (model(ids[ranks.rank][None], labels=ids[ranks.rank][None]).loss / 2).backward()
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        optimizer.step()
    whole = torch.cat(list(optimizer.full_weights().values()))
    assert torch.allclose(whole, torch.cat([p.detach().flatten() for p in plain.parameters()]), atol=1e-6)


def all_of_it(ranks: Ranks) -> None:
    rings(ranks)
    if ranks.world.world_size == 2:
        llama(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ring_and_a_llama(world_size: int) -> None:
    with forked_ranks():
        on_ranks(world_size, all_of_it)


def test_alone_nothing_is_sent() -> None:
    result = train_toy(Ranks(), ROWS, 2, 2)
    assert result["sent"] == {}
    assert result["held"] == bytes_held(PARAMETERS, 1, 2)


def test_what_the_toy_cannot_do_is_said() -> None:
    with pytest.raises(UsageError, match="share a parameter"):
        ToyZero(tiny_model(), Ranks(), 1, 1e-3)
    for stage in (1, 2):
        model = toy_model()
        optimizer = ToyZero(model, Ranks(), stage, 1e-3)
        model[1](torch.zeros(2, 32)).sum().backward()
        with pytest.raises(UsageError, match=r"0: backward.. did not reach all"):
            optimizer.step()
    with pytest.raises(UsageError, match=r"half.*float32, mixed"):
        bytes_held(1, 1, 0, "half")


def test_weights_that_are_not_there_show_as_empty() -> None:
    layer = Layer("x", torch.nn.Linear(3, 2), Ring(Ranks()), 3)
    assert [p.numel() for p in layer.parameters] == [0, 0]
    assert layer.row.untyped_storage().nbytes() == 0
    layer.gather()
    assert [tuple(p.shape) for p in layer.parameters] == [(2, 3), (2,)]


@pytest.mark.parametrize(
    ("stage", "each"), [(0, 4 + 4 + 8), (1, 4 + 4 + 2), (2, 4 + 1 + 2), (3, 1 + 1 + 2)]
)  # by hand, for W = 4
def test_the_formula_of_bytes_held(stage: int, each: float) -> None:
    assert sum(bytes_held(1000, 4, stage).values()) == 1000 * each
    assert bytes_held(1000, 4, 0, "mixed") == {"weights": 2000, "gradients": 2000, "optimizer": 12000}


def back(ranks: Ranks, value: int) -> int:
    return ranks.rank + value


def fails_on_one(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ValueError("not today")
    ranks.gather(0.0)


def dies_on_one(ranks: Ranks) -> None:
    if ranks.rank == 1:
        kill(getpid(), signal.SIGKILL)
    ranks.gather(0.0)


@pytest.mark.slow
def test_on_ranks_gives_results_by_rank() -> None:
    """In processes as a lesson starts them: new ones, which import everything themselves."""
    assert on_ranks(2, back, 5) == [5, 6]


@pytest.mark.slow
def test_a_rank_that_fails_is_heard_and_one_that_dies_is_named() -> None:
    with forked_ranks(), pytest.raises(MinitunerError, match="rank 1 failed: ValueError: not today"):
        on_ranks(2, fails_on_one, quiet=True)
    with forked_ranks(), pytest.raises(MinitunerError, match="rank 1 was killed by SIGKILL"):
        on_ranks(2, dies_on_one, quiet=True)


@pytest.mark.slow
def test_a_function_of_the_notebook_cannot_be_sent() -> None:
    def work(ranks: Ranks) -> None: ...

    work.__module__ = "__main__"
    with pytest.raises(UsageError, match="defined in the notebook"):
        on_ranks(2, work)


@pytest.mark.slow
def test_a_rank_that_stops_early_is_noticed_by_the_others() -> None:
    with forked_ranks(), pytest.raises(MinitunerError, match="rank 0 of 2 lost contact with another rank"):
        on_ranks(2, one_step_short, ROWS, quiet=True)
