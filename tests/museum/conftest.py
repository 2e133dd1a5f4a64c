"""A tiny recipe for each fault, and one whole run with each, made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minituner.museum import FAULTS, train_injected
from minituner.train.loop import TrainResult, train
from tests.tiny import tiny_recipe, write_chats


def silent(line: str) -> None:
    """Say nothing."""


def recipe_for(name: str, model_folder: Path, data: Path, /, **sections: dict[str, Any]) -> Any:
    """A tiny recipe in which the fault can happen; `sections` change it."""
    if name == "merge-into-4bit":
        sections = {**sections, "method": {"name": "qlora", **sections.get("method", {})}}
    return tiny_recipe(model_folder, data, **sections)


@dataclass(frozen=True)
class Whole:
    """A run with a fault: what it returned, and everything it said."""

    result: TrainResult
    said: list[str]


@pytest.fixture(scope="session")
def fault_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen small chats in eight packs, the last one not full."""
    return write_chats(tmp_path_factory.mktemp("museum-data") / "chats.jsonl", 14)


@pytest.fixture(scope="session")
def clean_run(model_folder: Path, fault_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The recipe without any fault."""
    recipe = recipe_for("", model_folder, fault_data)
    return train(recipe, tmp_path_factory.mktemp("museum-clean"), progress=False, say=silent)


@pytest.fixture(scope="session")
def whole_run(model_folder: Path, fault_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """`whole_run(name)`: the run with that fault, the same one each time it is asked for."""
    made: dict[str, Whole] = {}

    def run(name: str) -> Whole:
        if name not in made:
            said: list[str] = []
            folder = tmp_path_factory.mktemp(f"museum-{name}")
            recipe = recipe_for(name, model_folder, fault_data)
            made[name] = Whole(train_injected(name, recipe, folder, progress=False, say=said.append), said)
        return made[name]

    return run


NAMES = [fault.name for fault in FAULTS]
