"""1 rank == 2 ranks: the same losses, gradient norms and weights, whatever falls to which rank.

Both see the same windows: one rank with four micro-batches to a step, two ranks with two each.

    one rank    [p0 p1 p2 p3] [p4]
    two ranks   [p0    p2   ] [p4]        an incomplete last window,
                [   p1    p3] [ -]        and a micro-batch for which rank 1 has no pack
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minituner.data.prepare import prepare
from minituner.train import checkpoint
from minituner.train.feed import Feed
from tests.promises.common import TOLERANCE
from tests.tiny import tiny_recipe, tiny_tokenizer
from tests.train.processes import finish_all, ranks_of, run_command

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {"data": {"max_length": 160}},
    "full, two packs a micro-batch": {
        "method": {"name": "full"},
        "data": {"max_length": 64, "packing": "concat"},
        "train": {"per_device_batch_size": 2, "weight_decay": 0.1, "learning_rate": 1e-3},
    },
    "no packing, clipped, cache off": {
        "data": {"packing": "none", "cache": False},
        "train": {"max_grad_norm": 0.05},
    },
}


def uneven_chats(path: Path, count: int = 13) -> Path:
    """Chats whose answers differ in length by far, so that ranks never have equally many supervised tokens."""
    rows = [
        [{"role": "user", "content": f"第{i}个问题"}, {"role": "assistant", "content": "好。" * (1 + 7 * (i % 3 == 0))}]
        for i in range(count)
    ]
    text = "".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def metrics_of(work_dir: Path) -> list[dict[str, Any]]:
    (file,) = work_dir.glob("runs/*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("sections", SHAPES.values(), ids=SHAPES.keys())
def test_two_ranks_train_what_one_rank_trains(
    sections: dict[str, dict[str, Any]], model_folder: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(model_folder, uneven_chats(tmp_path / "uneven.jsonl"), **sections)
    recipe.dump(tmp_path / "r.yaml")
    status, output = run_command(
        ["train", "r.yaml", "train.gradient_accumulation_steps=4", "--work-dir", "one"], tmp_path
    )
    assert status == 0, output
    statuses, output = finish_all(
        ranks_of(["train", "r.yaml", "train.gradient_accumulation_steps=2", "--work-dir", "two"], tmp_path)
    )
    assert statuses == [0, 0], output

    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert len(one) == len(two) >= 2
    for a, b in zip(one, two, strict=True):
        assert (a["supervised_tokens"], a["tokens"], a["epoch"]) == (b["supervised_tokens"], b["tokens"], b["epoch"])
        assert b["loss"] == pytest.approx(a["loss"], rel=TOLERANCE)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=TOLERANCE * 10)
    assert len({m["supervised_tokens"] for m in one}) > 1, "windows differ, so a mean over ranks would be noticed"
    first, second = (
        load_file(checkpoint.find(tmp_path / name, "auto", print) / "model.safetensors") for name in ("one", "two")
    )
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=0, atol=TOLERANCE), name


@pytest.mark.usefixtures("own_home")
def test_the_cases_have_an_empty_micro_batch_and_an_incomplete_window(model_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model_folder, uneven_chats(tmp_path / "uneven.jsonl"), data={"packing": "none"})
    prepared = prepare(recipe.data, tiny_tokenizer(), say=lambda line: None)
    feeds = [Feed(prepared, recipe, rank, 2) for rank in (0, 1)]
    last = [feed.packs(feed.steps_per_epoch - 1) for feed in feeds]
    assert [len(batches) for batches in last] == [1, 1], "recipe: two micro-batches to a window"
    assert [len(batches[0]) for batches in last] == [1, 0]


@pytest.mark.slow
def test_the_second_rank_writes_and_says_nothing(model_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model_folder, uneven_chats(tmp_path / "uneven.jsonl"), train={"max_steps": 2})
    recipe.dump(tmp_path / "r.yaml")
    ranks = ranks_of(["train", "r.yaml", "--work-dir", "w"], tmp_path)
    statuses, output = finish_all(ranks)
    assert statuses == [0, 0], output
    assert ranks[1].output == ""
    assert "2 ranks on cpu" in ranks[0].output
    assert len(list((tmp_path / "w" / "runs").iterdir())) == 1
    assert ranks[0].output.count("done: 2 steps") == 1
