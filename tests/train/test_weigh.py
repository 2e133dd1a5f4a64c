"""Weighing a real run: what an engine holds is what the formula says, and where it is more, for a known reason."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from minituner.train.ranks import Ranks
from minituner.train.spawn import on_ranks
from minituner.train.weigh import held_bytes, weigh
from minituner.train.zero_bytes import bytes_held
from tests.tiny import tiny_folder, tiny_model, tiny_recipe, write_chats
from tests.train.processes import forked_ranks

EVERYTHING = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
COPY = {"optimizer": 2.0}  # bytes per parameter: DeepSpeed's float32 copy of the half that a rank updates
KEPT = {"weights": 4.0}  # stage 3: parameters as small as these also stay whole on every rank, unless told otherwise


def weigh_at_home(ranks: Ranks, home: str, recipe: Mapping[str, Any], zero: str) -> dict[str, int]:
    os.environ["MINITUNER_HOME"] = home
    return weigh(ranks, recipe, zero)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "stage", "more"),
    [("zero2", 2, COPY), ("zero3", 3, {**COPY, **KEPT}), ("all.json", 3, COPY)],
)
def test_two_ranks_hold_what_the_formula_says(
    zero: str, stage: int, more: dict[str, float], tmp_path: Path, own_home: Path
) -> None:
    model = tiny_folder(tmp_path / "model", tie=False)
    parameters = sum(p.numel() for p in tiny_model(tie=False).parameters())
    recipe = tiny_recipe(model, write_chats(tmp_path / "chats.jsonl"), method={"name": "full"}).model_dump()
    if zero == "all.json":
        (tmp_path / zero).write_text(json.dumps(EVERYTHING))
        zero = str(tmp_path / zero)
    with forked_ranks():
        ranks = on_ranks(2, weigh_at_home, str(own_home), recipe, zero, quiet=True)
    for held in ranks:
        for part, size in bytes_held(parameters, 2, stage).items():
            # DeepSpeed fills its pieces up to equal, aligned lengths.
            assert held[part] == pytest.approx(size + more.get(part, 0) * parameters, rel=0.01), part


def test_without_zero_a_rank_holds_sixteen_bytes_a_parameter(tmp_path: Path, own_home: Path) -> None:
    model = tiny_folder(tmp_path / "model", tie=False)
    recipe = tiny_recipe(model, write_chats(tmp_path / "chats.jsonl"), method={"name": "full"}).model_dump()
    held = weigh(Ranks(), recipe)
    parameters = list(tiny_model(tie=False).parameters())
    steps = 4 * len(parameters)  # AdamW's count of its steps, a number for each parameter
    formula = bytes_held(sum(p.numel() for p in parameters), 1, 0)
    assert {part: held[part] for part in formula} == {**formula, "optimizer": formula["optimizer"] + steps}


def test_memory_is_counted_once_however_many_views_there_are() -> None:
    from minituner.recipe import TrainSection
    from minituner.train.engines import TorchEngine

    model = tiny_model(tie=True)
    engine = TorchEngine(TrainSection(), "cpu")
    engine.prepare(model)
    whole = sum(p.numel() * 4 for p in model.parameters())
    assert whole < sum(p.numel() * 4 for _, p in model.named_parameters(remove_duplicate=False)), "embeddings are tied"
    assert held_bytes(engine, model)["weights"] == whole
    extra = torch.zeros(1000)
    before = held_bytes(engine, model)["other"]
    views = [extra[:10], extra[10:]]
    assert held_bytes(engine, model)["other"] == before
    assert len(views) == 2
    more = torch.zeros(250)
    assert held_bytes(engine, model)["other"] == before + 4 * len(more)
