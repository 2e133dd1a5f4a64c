"""What the ranks of the sequence parallel tests run: `meet()`, then ask one model for shared and for whole rows.

run_ranks(compare, 2, False, world_size=2, cwd=tmp_path)      in the test
compare(2, False)                                             in each rank
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from minituner.data.collate import Batch, collate, slice_of_row
from minituner.data.encoding import IGNORE
from minituner.errors import MinitunerError, UsageError
from minituner.model import attention
from minituner.model.generate import generate
from minituner.model.loss import loss_sum
from minituner.train import sequence_parallel
from minituner.train.launch import world_of
from minituner.train.ranks import Ranks
from minituner.train.whole_rows import whole_rows
from tests.promises.common import TOLERANCE, documents, gradients, largest_difference
from tests.tiny import tiny_model, tiny_recipe
from tests.train.processes import Process, finish_all, rank_environments

CORE = attention.PER_DOCUMENT_SDPA


def run_ranks(work: Callable[..., None], *arguments: Any, world_size: int, cwd: Path) -> None:
    """Run a function on several ranks; an assertion that fails on any of them fails here, with its words."""
    ranks = [Process(work, *arguments, cwd=cwd, environment=place) for place in rank_environments(world_size)]
    statuses, output = finish_all(ranks)
    assert statuses == [0] * world_size, output


def meet() -> Ranks:
    """Join the other ranks."""
    attention.register()
    return Ranks(world_of()).join()


def shared_model(ranks: Ranks, size: int, model: Any = None) -> tuple[Any, Any]:
    """A model that shares its rows among `size` ranks, and what answers for its whole rows."""
    model = model or tiny_model()
    model.set_attn_implementation(CORE)
    recipe = tiny_recipe("model", "data", distributed={"sequence_parallel_size": size})  # type: ignore[arg-type]
    return model, sequence_parallel.set_up(model, CORE, recipe, ranks, lambda line: None)


def summed(ranks: Ranks, model: Any, row: Batch, of: Callable[[Batch], Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one micro-batch, summed over the ranks that share it."""
    model.zero_grad(set_to_none=True)
    loss = loss_sum(model, of(row), CORE)
    loss.backward()
    found = gradients(model)
    for gradient in found.values():
        ranks.sum_tensor(gradient)
    model.zero_grad(set_to_none=True)
    return ranks.all_sums([loss.item()])[0], found


def alone(model: Any, row: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """The same without sharing: this rank has the whole row."""
    model.zero_grad(set_to_none=True)
    with whole_rows(model):
        loss = loss_sum(model, row, CORE)
        loss.backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def rows(size: int, draws: int = 9) -> list[Batch]:
    """Every length from none to 4 * size as one document, then drawn packs: borders fall anywhere."""
    draw = np.random.default_rng(size)
    result = [collate([documents((n,), seed=n)] if n else []) for n in range(4 * size + 1)]
    for number in range(draws):
        packs = [documents(tuple(draw.integers(1, 40, draw.integers(1, 6))), seed=100 + number) for _ in range(2)]
        result.append(collate(packs[: 1 + number % 2], isolate=number % 3 > 0))
    only_first = documents((3 * size, 5 * size))  # the last slice has no supervised token
    for ids, labels in only_first:
        labels[len(ids) // 4 :] = IGNORE
    only_first[1][1][:] = IGNORE
    return [*result, collate([only_first])]


def compare(size: int, checkpointing: bool) -> None:
    """Shared and whole rows give the same loss and gradients, for every row; run by `size` ranks."""
    ranks = meet()
    model, _ = shared_model(ranks, size)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    silent = 0
    every = rows(size)
    for row in every:
        mine = slice_of_row(row, ranks.rank, size)
        silent += not mine.supervised_tokens
        loss, found = summed(ranks, model, row, lambda row: slice_of_row(row, ranks.rank, size))
        wanted_loss, wanted = alone(model, row)
        assert abs(loss - wanted_loss) <= TOLERANCE * max(1.0, wanted_loss), (row.seq_lens, loss, wanted_loss)
        if row.supervised_tokens:
            assert largest_difference(found, wanted) <= TOLERANCE, row.seq_lens
        else:
            assert loss == 0
            assert not any(gradient.any() for gradient in found.values())
    assert silent, "no rank ever had a slice without supervised tokens"
    assert ranks.all_sums([silent])[0] < len(every) * size
    ranks.leave()


def neighbour_is_still(size: int) -> None:
    """Another document A moves B's logits by exactly 0, wherever B and the slices begin; and A's own do move."""
    ranks = meet()
    _, whole = shared_model(ranks, size)
    whole.eval()
    for first in range(1, 3 * size + 2):
        for second in (1, size, 2 * size + 1):
            logits = []
            for change in (0, 1):
                (ids, labels), neighbour = documents((first, second), seed=first)
                row = collate([[((ids + change) % 256, labels), neighbour]])
                logits.append(whole(input_ids=row.input_ids, position_ids=row.position_ids).logits[0])
            assert torch.equal(logits[0][first:], logits[1][first:])
            assert not torch.equal(logits[0][:first], logits[1][:first])
    ranks.leave()


def groups_are_independent(size: int) -> None:
    """Two groups, each with a row of its own: the sum over all ranks is the sum over both rows."""
    ranks = meet()
    model, _ = shared_model(ranks, size)
    own, other = (collate([documents(lengths, seed=3)]) for lengths in ((7, 12, 2), (15, 4)))
    first = ranks.rank // size == 0
    loss, found = summed(ranks, model, own if first else other, lambda row: slice_of_row(row, ranks.rank % size, size))
    both = [alone(model, row) for row in (own, other)]
    assert abs(loss - sum(one for one, _ in both)) <= TOLERANCE * loss
    assert largest_difference(found, {name: both[0][1][name] + both[1][1][name] for name in found}) <= TOLERANCE
    ranks.leave()


class TokenShift(torch.nn.Module):
    """A layer that looks one token back by itself, as the convolutions of hybrid models do."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.5 * torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)


def what_is_wrong_is_found(size: int) -> None:
    """Both proofs can fail: on a layer that looks across the border of a slice, and on a core without isolation."""
    ranks = meet()
    shifting = tiny_model()
    norm = shifting.model.layers[0].input_layernorm
    shifting.model.layers[0].input_layernorm = torch.nn.Sequential(TokenShift(), norm)
    with pytest.raises(MinitunerError, match="computes something else on this model"):
        shared_model(ranks, size, shifting)

    deaf = tiny_model()  # a model from remote code, say, which transformers only warns about
    deaf.set_attn_implementation = lambda name: None
    with pytest.raises(UsageError, match="does not take its attention from"):
        shared_model(ranks, size, deaf)

    def leaking(module: Any, *qkv: Any, seq_lens: list[int], **kwargs: Any) -> Any:
        return attention.per_document_sdpa(module, *qkv, seq_lens=[sum(seq_lens)], **kwargs)

    AttentionInterface.register(CORE, leaking)
    _, whole = shared_model(ranks, size)
    with pytest.raises(MinitunerError, match="see each other"):
        attention.assert_isolated(whole, CORE, 259)
    ranks.leave()


def deepspeeds_own_way_is_wrong(size: int) -> None:
    """Why `register_with_transformers` is not used: with SDPA as its core, packed documents see each other."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    from minituner.train.zero import join_deepspeed

    ranks = meet()
    join_deepspeed()
    row = collate([documents((6, 10))])
    losses = {}
    model = tiny_model()
    model.set_attn_implementation(CORE)
    losses["right"] = loss_sum(model, row, CORE).item()
    model.set_attn_implementation("sdpa")
    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", size, micro_batch_size=1)
    mine = slice_of_row(row, ranks.rank, size)
    losses["stock"] = ranks.all_sums([loss_sum(model, mine, "sdpa").item()])[0]
    assert abs(losses["stock"] - losses["right"]) > 1e-3 * losses["right"], losses
    ranks.leave()


def answers_are_its_own(size: int) -> None:
    """While it answers, a model shares nothing: rank 0 can do it alone, and says what it says without sharing."""
    ranks = meet()
    plain = tiny_model()
    model, _ = shared_model(ranks, size)
    if ranks.is_main:
        prompts = [[257, 1, 2], [257, 5]]
        said, wanted = (generate(m, None, prompts, stop=([258], []), max_new_tokens=6) for m in (model, plain))
        assert said == wanted
    assert model.config._attn_implementation == attention.ULYSSES
    ranks.all_sums([0.0])
    ranks.leave()
