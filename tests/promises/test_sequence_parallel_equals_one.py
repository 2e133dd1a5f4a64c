"""Sequence parallel 2 == 1 with packing on: the same losses, gradient norms and weights; documents stay apart.

    one rank    [p0 p1] [p2]        the whole pack
    two ranks   [p0 p1] [p2]        its first half
                [p0 p1] [p2]        its second half

Lesson: notebook 07.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from minituner.train import checkpoint
from tests.promises.common import TOLERANCE
from tests.promises.test_one_rank_equals_two import metrics_of, uneven_chats
from tests.tiny import tiny_recipe
from tests.train.processes import finish_all, ranks_of, run_command
from tests.train.shared_rows import compare, neighbour_is_still, run_ranks

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "lora, an odd length, records held out": {"data": {"max_length": 161, "holdout": 0.2}},
    "qlora": {"method": {"name": "qlora"}},
    "full, concat, two packs a micro-batch, recomputed": {
        "method": {"name": "full"},
        "data": {"max_length": 63, "packing": "concat"},
        "train": {
            "per_device_batch_size": 2,
            "weight_decay": 0.1,
            "learning_rate": 1e-3,
            "activation_checkpointing": True,
        },
    },
    "no packing, clipped": {"data": {"packing": "none"}, "train": {"max_grad_norm": 0.05}},
    "documents of a pack see each other": {"data": {"isolate_documents": False}},
}
ZERO = {"zero2": {"distributed": {"zero": "zero2"}}, "zero3, full": {"distributed": {"zero": "zero3"}}}
ZERO["zero3, full"]["method"] = {"name": "full"}


def _lines(work_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The metrics of steps, and of evaluations."""
    lines = metrics_of(work_dir)
    return [m for m in lines if "loss" in m], [m for m in lines if "eval_loss" in m]


def assert_equal_runs(one: Path, two: Path, steps: int = 2) -> None:
    """Losses, norms, counts and weights of two runs agree, and what was measured on held-out records."""
    (first, held_first), (second, held_second) = (_lines(place) for place in (one, two))
    assert len(first) == len(second) >= steps
    assert [m["eval_tokens"] for m in held_first] == [m["eval_tokens"] for m in held_second]
    assert [m["eval_loss"] for m in held_first] == pytest.approx([m["eval_loss"] for m in held_second], rel=TOLERANCE)
    for a, b in zip(first, second, strict=True):
        assert (a["supervised_tokens"], a["tokens"], a["epoch"]) == (b["supervised_tokens"], b["tokens"], b["epoch"])
        assert b["loss"] == pytest.approx(a["loss"], rel=TOLERANCE)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=TOLERANCE * 10)
    first, second = (load_file(checkpoint.find(place, "auto", print) / "model.safetensors") for place in (one, two))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        # The root mean square: AdamW moves a number whose gradient is rounding alone by its whole rate, either way.
        assert float((tensor - second[name]).square().mean().sqrt()) <= TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize("sections", [*SHAPES.values(), *ZERO.values()], ids=[*SHAPES, *ZERO])
def test_two_ranks_that_share_rows_train_what_one_rank_trains(
    sections: dict[str, dict[str, Any]], model_folder: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(model_folder, uneven_chats(tmp_path / "uneven.jsonl"), **sections)
    recipe.dump(tmp_path / "r.yaml")
    status, output = run_command(["train", "r.yaml", "--work-dir", "one", "distributed.zero=null"], tmp_path)
    assert status == 0, output
    shared = ["train", "r.yaml", "--work-dir", "two", "distributed.sequence_parallel_size=2"]
    statuses, output = finish_all(ranks_of(shared, tmp_path))
    assert statuses == [0, 0], output
    assert "sequence parallel: 2 ranks share each row, 1 at a time" in output
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    assert bool(_lines(tmp_path / "one")[1]) == bool(recipe.data.holdout)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "checkpointing"), [(2, False), (4, True)], ids=["2 ranks", "4 ranks, recomputed"])
def test_loss_and_gradients_are_the_same_for_every_length(size: int, checkpointing: bool, tmp_path: Path) -> None:
    """With 4 ranks there are fewer key-value heads (2) than ranks."""
    run_ranks(compare, size, checkpointing, world_size=size, cwd=tmp_path)


@pytest.mark.slow
def test_changing_document_a_moves_the_logits_of_document_b_by_exactly_0(tmp_path: Path) -> None:
    run_ranks(neighbour_is_still, 2, world_size=2, cwd=tmp_path)
