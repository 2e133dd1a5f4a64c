"""TensorBoard and W&B are given what metrics.jsonl holds; what is not installed is said before anything else."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from minituner.errors import UsageError
from minituner.train.loop import TrainResult, train
from minituner.train.trackers import check_trackers
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("own_home")


def run(model_folder: Path, chats: Path, work_dir: Path, **log: Any) -> TrainResult:
    recipe = tiny_recipe(
        model_folder, chats, train={"max_steps": 4}, data={"holdout": 0.2}, evaluate={"every_steps": 2}, log=log
    )
    return train(recipe, work_dir, say=lambda line: None)


def written(result: TrainResult) -> dict[str, dict[int, float]]:
    """Name -> step -> number, of metrics.jsonl."""
    values: dict[str, dict[int, float]] = {}
    for text in (result.run_dir / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for key, value in line.items():
            if key != "step":
                values.setdefault(key, {})[line["step"]] = value
    return values


@pytest.mark.parametrize("every", [1, 3])
def test_tensorboard_has_every_number_of_every_line(
    every: int, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(model_folder, chats, tmp_path / "w", to=["tensorboard"], every_steps=every)
    events = EventAccumulator(str(result.run_dir), size_guidance={"scalars": 0}).Reload()
    expected = written(result)
    assert {"loss", "eval_loss", "learning_rate", "grad_norm", "gemm_share", "seconds_model"} <= set(expected)
    assert sorted(expected["loss"]) == ([1, 2, 3, 4] if every == 1 else [3, 4])
    assert sorted(expected["eval_loss"]) == [0, 2, 4]
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, numbers in expected.items():
        seen = {event.step: np.float32(event.value) for event in events.Scalars(name)}
        assert seen == {step: np.float32(value) for step, value in numbers.items()}, name


class StandIn(ModuleType):
    """A module named wandb that writes down what it is called with; no network."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **options: Any) -> StandIn:
        self.started.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        assert not self.finished
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_is_given_every_number_of_every_line(
    model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    result = run(model_folder, chats, tmp_path / "my run", to=["wandb", "wandb"])
    (started,) = stand_in.started
    assert (started["project"], started["group"]) == ("minituner", "my run")
    assert started["config"]["train"]["max_steps"] == 4
    json.dumps(started["config"])
    assert stand_in.finished == 1
    seen: dict[str, dict[int, float]] = {}
    for step, values in stand_in.logged:
        for key, value in values.items():
            seen.setdefault(key, {})[step] = value
    assert seen == written(result)
    steps = [step for step, _ in stand_in.logged]
    assert steps == sorted(steps), "W&B drops what comes late"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_before_anything_is_read(
    name: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UsageError, match=f"log.to names {name}") as caught:
        run(model_folder, tmp_path / "there is no such file", tmp_path / "w", to=[name])
    assert caught.value.next_command == f"pip install {name}"
    assert caught.value.exit_code == 2
    assert not (tmp_path / "w").exists()


def test_several_missing_packages_are_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="tensorboard and wandb, which are not installed"):
        check_trackers(["tensorboard", "wandb"])
    check_trackers([])
