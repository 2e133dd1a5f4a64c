"""What the tests of ZeRO share: many short runs, one after the other, on the same two processes.

run_all({"zero1": recipe, ...}, cwd)      on two ranks; each run in cwd/NAME, its checkpoints and hf/ in there
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from minituner.train import checkpoint
from minituner.train.zero import PRESETS
from tests.train.processes import Process, finish_all, rank_environments

FINE = {**PRESETS["zero3"], "stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}


def finely_cut(folder: Path) -> str:
    """A DeepSpeed JSON whose stage 3 cuts even the smallest parameters (by default it keeps those whole)."""
    path = folder / "finely_cut.json"
    path.write_text(json.dumps({"zero_optimization": FINE, "train_batch_size": "auto"}), encoding="utf-8")
    return str(path)


def _train_all(recipes: dict[str, str], ports: dict[str, str], resume: dict[str, str]) -> None:
    from minituner import Recipe
    from minituner.train.loop import train

    for name, file in recipes.items():
        os.environ["MASTER_PORT"] = ports[name]
        train(Recipe.load(file), name, resume=resume.get(name), progress=False)


def run_all(
    recipes: dict[str, Any], cwd: Path, *, world_size: int = 2, resume: dict[str, str] | None = None
) -> tuple[list[int], str]:
    """Train each recipe on all ranks, in turn; exit statuses and output."""
    files = {}
    for name, recipe in recipes.items():
        recipe.dump(cwd / f"{name}.yaml")
        files[name] = str(cwd / f"{name}.yaml")
    if world_size == 1:
        environments: list[dict[str, str]] = [{}]
        ports = dict.fromkeys(files, "")
    else:
        environments = rank_environments(world_size)
        ports = {name: rank_environments(world_size)[0]["MASTER_PORT"] for name in files}
    work = (files, ports, resume or {})
    return finish_all([Process(_train_all, *work, cwd=cwd, environment=place) for place in environments])


def saved(work_dir: Path, step: int | None = None) -> checkpoint.Checkpoint:
    """The newest checkpoint of a run, or that of a step."""
    if step is None:
        return checkpoint.load(checkpoint.find(work_dir, "auto", print))
    return checkpoint.load(work_dir / "checkpoints" / f"step-{step:06d}")


def metrics(work_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run that was started once."""
    (file,) = work_dir.glob("runs/*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def exported(work_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of `hf/`."""
    tensors: dict[str, torch.Tensor] = {}
    for file in (work_dir / "hf").glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def largest_gap(a: Any, b: Any) -> float:
    """The largest absolute difference between tensors of the same names, random generators left out."""
    assert a.keys() == b.keys()
    names = [name for name in a if not name.startswith("random/")]
    assert names
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in names)
