"""Tails: loss and gradients are the same without what stands behind a document's last target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minituner import train
from minituner.data.collate import Batch, collate
from minituner.data.encoding import IGNORE
from minituner.data.prefixes import share_prefixes
from minituner.data.tails import cut_tails
from minituner.model import attention
from minituner.model.adapters import apply_method
from minituner.model.fewer_tokens import tails_proved
from minituner.model.fused import KINDS, fuse
from minituner.model.head import find_head, probe
from minituner.model.loss import loss_sum, states
from minituner.recipe import MethodSection
from tests.model.test_attention import ISOLATED, build, chosen
from tests.model.test_shared_prefixes import same_runs
from tests.promises.common import TOLERANCE, gradients, largest_difference
from tests.tiny import tiny_model, tiny_recipe


def row_with_tails() -> Batch:
    """Documents that begin alike: tails of many tokens, of one, a document without targets, and one of a single one."""
    draw = np.random.default_rng(0)
    beginning = draw.integers(0, 256, 4)
    documents = []
    for length, first, last in ((20, 6, 12), (9, 3, 9), (7, 7, 7), (1, 0, 1), (15, 8, 14)):
        ids = np.concatenate([beginning, draw.integers(0, 256, length)])[:length]
        places = np.arange(length)
        documents.append((ids, np.where((places >= first) & (places < last), ids, IGNORE)))
    return collate([documents])


def all_ways(model: Any, implementation: str, head: Any = None) -> None:
    """The whole row, without tails, and with shared beginnings besides: one loss and one set of gradients."""
    row = row_with_tails()
    cut = cut_tails(row)
    assert cut.computed_tokens == 11 + 8 + 13
    both = share_prefixes(cut)
    assert both.prefixes is not None
    seen = []
    for batch in (row, cut, both):
        model.zero_grad()
        loss = loss_sum(model, batch, implementation, head)
        loss.backward()
        seen.append((loss.item(), gradients(model)))
    for loss, found in seen[1:]:
        assert loss == pytest.approx(seen[0][0], rel=TOLERANCE)
        assert largest_difference(seen[0][1], found) < TOLERANCE


@pytest.mark.parametrize("name", ISOLATED)
def test_loss_and_gradients_are_those_of_the_whole_row(name: str) -> None:
    model = build(name)
    all_ways(model, chosen(model))


@pytest.mark.parametrize("fused", [[], list(KINDS)])
def test_with_adapters_fused_layers_and_the_head_in_pieces(fused: list[str]) -> None:
    attention.register()
    model = tiny_model()
    model.set_attn_implementation("per_document_sdpa")
    model = apply_method(model, MethodSection(name="lora", lora_rank=4, target_modules="all-linear")).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # else A has no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    fuse(model, fused)
    head, _ = find_head(model, "per_document_sdpa", probe())
    assert head is not None
    all_ways(model, "per_document_sdpa", head)


def test_a_row_without_targets_changes_nothing() -> None:
    attention.register()
    model = tiny_model()
    model.set_attn_implementation("per_document_sdpa")
    silent = cut_tails(collate([[(np.arange(5), np.full(5, IGNORE))]]))
    assert silent.input_ids.shape == (1, 0)
    loss = loss_sum(model, silent, "per_document_sdpa")
    loss.backward()
    assert loss.item() == 0.0
    assert all(not g.any() for g in gradients(model).values())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_proof_passes_only_where_nothing_looks_ahead(causal: bool, packed: bool) -> None:
    attention.register()
    model = tiny_model().train()
    implementation = "per_document_sdpa" if packed else "sdpa"
    model.set_attn_implementation(implementation)
    if not causal:
        mlp = model.model.layers[0].mlp
        mlp.register_forward_hook(lambda layer, given, out: out + 0.1 * out.roll(-1, dims=1))
    found = tails_proved(model, lambda row: states(model, row, implementation, None), "cpu", packed=packed)
    assert found == causal
    assert model.training


def test_dropout_does_not_fail_it() -> None:
    attention.register()
    model = tiny_model()
    model.set_attn_implementation("per_document_sdpa")
    model = apply_method(model, MethodSection(name="lora", lora_rank=4, lora_dropout=0.5)).train()
    before = torch.get_rng_state()
    assert tails_proved(model, lambda row: states(model, row, "per_document_sdpa", None), "cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_a_run_learns_the_same(packing: str, model_folder: Path, own_home: Path, tmp_path: Path) -> None:
    """Every loss, gradient and held-out loss of a run, with it and without; and what it computed."""
    on, off = same_runs("cut_tails", "proved to change nothing", tmp_path, model_folder, packing=packing)
    assert all(line["computed_tokens"] < line["tokens"] for line in on.metrics)
    assert on.summary["model_flops"] < off.summary["model_flops"]


@pytest.mark.parametrize(("limit", "cut"), [(127, False), (128, True)])
def test_positions_that_go_by_a_documents_length_keep_the_tails(
    limit: int, cut: bool, model_folder: Path, chats: Path, own_home: Path, tmp_path: Path
) -> None:
    """Dynamic scaling turns all tokens of a row otherwise once one document is longer than the limit."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(
        json.dumps({**config, "rope_parameters": rope, "max_position_embeddings": limit})
    )
    said: list[str] = []
    recipe = tiny_recipe(folder, chats, train={"max_steps": 1})
    train(recipe, tmp_path / "w", progress=False, say=said.append)
    (line,) = (line for line in said if line.startswith("tails: "))
    expected = "proved to change nothing" if cut else f"goes by a document's length beyond {limit} tokens"
    assert expected in line
