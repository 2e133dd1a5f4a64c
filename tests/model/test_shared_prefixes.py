"""Shared prefixes: loss and gradients of a row are the same whether equal beginnings are computed once or each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minituner.data.collate import Batch, collate
from minituner.data.prefixes import share_prefixes
from minituner.model import attention
from minituner.model.adapters import apply_method
from minituner.model.fewer_tokens import prefixes_proved
from minituner.model.fused import KINDS, fuse
from minituner.model.head import find_head, probe
from minituner.model.loss import loss_sum, states
from minituner.model.shared_prefixes import over_whole_row
from minituner.recipe import MethodSection
from minituner.train.loop import train
from tests.model import stand_ins
from tests.model.test_attention import ISOLATED, build, chosen
from tests.promises.common import TOLERANCE, gradients, largest_difference
from tests.tiny import tiny_model, tiny_recipe, write_chats

SYSTEM = "You are a patient assistant. 你是一个耐心的助手。"


def row_of(lengths: tuple[int, ...] = (30, 9, 17, 9), beginning: int = 8) -> Batch:
    """Random documents that begin alike, the second and the last wholly so; their first third has no target."""
    draw = np.random.default_rng(0)
    longest = draw.integers(0, 256, max(lengths))
    documents = []
    for length in lengths:
        ids = longest[:length].copy()
        if length > beginning + 1:
            ids[beginning:] = draw.integers(0, 256, length - beginning)
        labels = ids.copy()
        labels[: length // 3] = -100
        documents.append((ids, labels))
    return collate([documents])


def both(model: Any, implementation: str, row: Batch, head: Any = None) -> tuple[list[float], list[dict[str, Any]]]:
    """Loss and gradients of the row, and of the same with shared beginnings."""
    shared = share_prefixes(row)
    assert shared.prefixes is not None
    assert shared.computed_tokens < 0.8 * row.tokens
    losses, all_gradients = [], []
    for batch in (row, shared):
        model.zero_grad()
        loss = loss_sum(model, batch, implementation, head)
        loss.backward()
        losses.append(loss.item())
        all_gradients.append(gradients(model))
    return losses, all_gradients


@pytest.mark.parametrize("name", ISOLATED)
def test_loss_and_gradients_are_those_of_the_whole_row(name: str) -> None:
    """Windows, soft-capping, sinks, latent attention and experts, trained in full."""
    model = build(name)
    implementation = chosen(model)
    (whole, once), (of_whole, of_shared) = both(model, implementation, row_of())
    assert once == pytest.approx(whole, rel=TOLERANCE)
    assert largest_difference(of_whole, of_shared) < TOLERANCE


@pytest.mark.parametrize("fused", [[], list(KINDS)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_adapters_fused_layers_and_the_head_in_pieces(fused: list[str], checkpointing: bool) -> None:
    attention.register()
    model = tiny_model()
    model.set_attn_implementation("per_document_sdpa")
    method = MethodSection(name="lora", lora_rank=4, target_modules="all-linear")
    model = apply_method(model, method, activation_checkpointing=checkpointing).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # else A has no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    fuse(model, fused)
    head, _ = find_head(model, "per_document_sdpa", probe())
    assert head is not None
    (whole, once), (of_whole, of_shared) = both(model, "per_document_sdpa", row_of(), head)
    assert once == pytest.approx(whole, rel=TOLERANCE)
    assert largest_difference(of_whole, of_shared) < TOLERANCE


def test_by_the_kernel_for_gpus() -> None:
    attention.register()
    model = tiny_model()
    model.set_attn_implementation("varlen")
    with stand_ins.in_place(float32=True):
        (whole, once), (of_whole, of_shared) = both(model, "varlen", row_of())
    assert once == pytest.approx(whole, rel=TOLERANCE)
    assert largest_difference(of_whole, of_shared) < TOLERANCE


def test_gradients_of_laying_out_and_picking_out() -> None:
    prefixes = share_prefixes(row_of((5, 4, 3), 2)).prefixes
    assert prefixes is not None
    place = torch.arange(1.0, 1.0 + len(prefixes.rows))[:, None, None]

    def attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> Any:
        """Other at every place of the whole row, so that a state's copies have other gradients."""
        return ((q * k).transpose(1, 2) * place + v.transpose(1, 2)), None

    qkv = [torch.randn(1, 2, len(prefixes.own), 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: over_whole_row(attend)(torch.nn.Module(), *x, prefixes=prefixes)[0], qkv)


def states_of(model: Any) -> Any:
    return lambda row: states(model, row, "per_document_sdpa", None)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_fails_the_proof_and_draws_nothing_from_the_run(dropout: float) -> None:
    attention.register()
    model = tiny_model()
    model.set_attn_implementation("per_document_sdpa")
    method = MethodSection(name="lora", lora_rank=4, lora_dropout=dropout)
    model = apply_method(model, method).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = torch.get_rng_state()
    assert prefixes_proved(model, states_of(model), "cpu") == (dropout == 0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_before_the_first_step_fails_it_too() -> None:
    """B is 0 then, and the adapters' dropout cannot be seen in what the model says."""
    attention.register()
    model = tiny_model()
    model.set_attn_implementation("per_document_sdpa")
    model = apply_method(model, MethodSection(name="lora", lora_rank=4, lora_dropout=0.5)).train()
    assert not prefixes_proved(model, states_of(model), "cpu")


def test_layers_that_look_at_their_neighbours_fail_it() -> None:
    """A convolution over computed states would look at another document's."""
    attention.register()
    model = tiny_model().train()
    model.set_attn_implementation("per_document_sdpa")
    model.model.layers[0].mlp.register_forward_hook(lambda layer, given, out: out + 0.1 * out.roll(1, dims=1))
    assert not prefixes_proved(model, states_of(model), "cpu")


def test_an_attention_function_that_is_told_nothing_is_as_it_was() -> None:
    def attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **_: Any) -> Any:
        return q.transpose(1, 2), None

    q = torch.randn(1, 2, 5, 3)
    assert torch.equal(over_whole_row(attend)(torch.nn.Module(), q, q, q)[0], q.transpose(1, 2))


def same_runs(setting: str, proof: str, folder: Path, model_folder: Path, **data: Any) -> tuple[Any, Any]:
    """A run with `train.<setting>` and one without, alone of those that save tokens: each step learned the same."""
    chats = write_chats(folder / "chats.jsonl", 40)
    runs = []
    for wanted in (True, False):
        said: list[str] = []
        recipe = tiny_recipe(
            model_folder,
            chats,
            data={"max_length": 512, "system": SYSTEM, "holdout": 0.2, **data},
            train={"max_steps": 4, "share_prefixes": False, "cut_tails": False, "learning_rate": 1e-3}
            | {setting: wanted},
            evaluate={"every_steps": 2},
        )
        runs.append(train(recipe, folder / str(wanted), progress=False, say=said.append))
        assert any(proof in line for line in said) == wanted
        assert any(f"train.{setting}=false" in line for line in said) != wanted
    on, off = runs
    for ours, theirs in zip(on.metrics, off.metrics, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["supervised_tokens"] == theirs["supervised_tokens"]
        assert ours["tokens"] == theirs["tokens"] == theirs["computed_tokens"]
    assert on.eval_losses == pytest.approx(off.eval_losses, rel=1e-4)
    return on, off


def test_a_run_learns_the_same(model_folder: Path, own_home: Path, tmp_path: Path) -> None:
    """Every loss, gradient and held-out loss of a run, with it and without; and what it computed."""
    proof = "computed once, proved equal on this model"
    on, off = same_runs("share_prefixes", proof, tmp_path, model_folder)
    assert all(line["computed_tokens"] < 0.8 * line["tokens"] for line in on.metrics)
    assert on.summary["model_flops"] < 0.9 * off.summary["model_flops"]


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"train": {"share_prefixes": False}}, "train.share_prefixes=false"),
        ({"method": {"lora_dropout": 0.5}}, "the two differ"),
        ({"data": {"packing": "none"}, "model": {"attention": "sdpa"}}, "cannot lay them out"),
    ],
)
def test_it_says_why_not(
    sections: dict[str, Any], why: str, model_folder: Path, chats: Path, own_home: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    recipe = tiny_recipe(model_folder, chats, **sections)
    recipe.train.max_steps, recipe.train.cut_tails = 1, False
    result = train(recipe, tmp_path / "w", progress=False, say=said.append)
    assert any(line.startswith("prefixes: each document computes its own") and why in line for line in said)
    assert result.metrics[0]["computed_tokens"] == result.metrics[0]["tokens"]
