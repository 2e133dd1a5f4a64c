"""1 rank == 2 ranks == ZeRO 1 == 2 == 3: losses, gradient norms, weights, AdamW's averages, and what is exported.

Two ranks whose windows are never alike: uneven supervised tokens, a shorter last window, and a micro-batch for which
rank 1 has no pack. Stage 3 runs twice, the second time cutting even the smallest parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.promises.common import TOLERANCE
from tests.promises.test_one_rank_equals_two import uneven_chats
from tests.tiny import tiny_folder, tiny_recipe
from tests.train.zero_ranks import exported, finely_cut, largest_gap, metrics, run_all, saved

pytest.importorskip("deepspeed")

SHAPES: dict[str, dict[str, Any]] = {
    "lora": {"data": {"max_length": 160}},
    "full, tied embeddings, decay, clipped": {
        "method": {"name": "full"},
        "data": {"packing": "none"},
        "train": {"weight_decay": 0.1, "learning_rate": 1e-3, "max_grad_norm": 0.5, "max_steps": 5},
    },
    "full, untied, activation checkpointing": {
        "tie": False,
        "method": {"name": "full"},
        "data": {"packing": "concat", "max_length": 64},
        "train": {
            "per_device_batch_size": 2,
            "activation_checkpointing": True,
            "learning_rate": 1e-3,
            "max_grad_norm": None,
        },
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_stage_trains_what_one_rank_trains(shape: dict[str, Any], tmp_path: Path) -> None:
    sections = {name: values for name, values in shape.items() if name != "tie"}
    model = tiny_folder(tmp_path / "model", tie=shape.get("tie", True))
    data = uneven_chats(tmp_path / "uneven.jsonl")

    def recipe(zero: str | None, accumulate: int = 2) -> Any:
        train = {**sections.get("train", {}), "gradient_accumulation_steps": accumulate}
        return tiny_recipe(model, data, **{**sections, "train": train, "distributed": {"zero": zero}})

    stages = {"zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "finely": finely_cut(tmp_path)}
    runs = {"none": recipe(None), **{name: recipe(zero) for name, zero in stages.items()}}
    statuses, output = run_all(runs, tmp_path)
    assert statuses == [0, 0], output
    statuses, output = run_all({"one": recipe(None, accumulate=4)}, tmp_path, world_size=1)
    assert statuses == [0], output

    one, plain = metrics(tmp_path / "one"), saved(tmp_path / "none")
    assert len({line["supervised_tokens"] for line in one}) > 1
    for name in ("none", *stages):
        lines = metrics(tmp_path / name)
        assert len(lines) == len(one) >= 2
        for a, b in zip(one, lines, strict=True):
            assert (a["supervised_tokens"], a["tokens"]) == (b["supervised_tokens"], b["tokens"])
            assert b["loss"] == pytest.approx(a["loss"], rel=TOLERANCE), name
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=TOLERANCE * 10), name
        checkpoint = saved(tmp_path / name)
        assert largest_gap(checkpoint.weights, plain.weights) <= TOLERANCE, name
        assert largest_gap(checkpoint.optimizer, plain.optimizer) <= TOLERANCE, name
        assert largest_gap(checkpoint.weights, saved(tmp_path / "one").weights) <= TOLERANCE, name
        assert largest_gap(exported(tmp_path / name), exported(tmp_path / "none")) <= TOLERANCE, name
        assert all(tensor.numel() for tensor in exported(tmp_path / name).values()), name


@pytest.mark.slow
def test_one_rank_under_zero_is_one_rank_and_leaves_a_plain_model(tmp_path: Path, own_home: Path) -> None:
    """In this process, one after the other, as in a notebook."""
    from minituner.train.loop import train

    model, data = tiny_folder(tmp_path / "model"), uneven_chats(tmp_path / "uneven.jsonl")
    results = {}
    for zero in (None, "zero2", finely_cut(tmp_path), "zero1"):
        recipe = tiny_recipe(model, data, distributed={"zero": zero}, train={"max_steps": 3})
        work_dir = tmp_path / Path(zero or "none").stem
        results[zero] = train(recipe, work_dir, progress=False, say=lambda line: None)
        assert not torch.distributed.is_initialized()
    plain = {name: p.detach() for name, p in results[None].model.named_parameters()}
    for zero, result in results.items():
        assert largest_gap(saved(result.work_dir).weights, saved(results[None].work_dir).weights) <= TOLERANCE
        assert [m["loss"] for m in result.metrics] == pytest.approx([m["loss"] for m in results[None].metrics])
        assert result.answers == results[None].answers
        now = dict(result.model.named_parameters())
        assert largest_gap({n: p.detach() for n, p in now.items()}, plain) <= TOLERANCE, zero
        question = {"input_ids": torch.arange(9)[None], "seq_lens": [9]}
        expected = results[None].model(**question).logits
        assert torch.allclose(result.model(**question).logits, expected, atol=1e-4), zero
