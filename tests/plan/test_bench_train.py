"""`minituner bench train`: steps are real steps, figures follow from them, and a failing process says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minituner.cli import app
from minituner.errors import MinitunerError, UsageError
from minituner.plan.bench_train import WARM_UP, bench_train, benchmark_recipe, own_worker, summary
from minituner.recipe import Recipe
from minituner.train.loop import train
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("own_home")
SETTINGS = {"gradient_accumulation_steps": 2, "num_epochs": 3}


def rows_of(*steps: tuple[float, int, int, int, float]) -> list[dict[str, Any]]:
    keys = ("seconds", "tokens", "computed_tokens", "supervised_tokens", "flops")
    return [{**dict(zip(keys, step, strict=True)), "peak_memory_gb": i, "loss": 1.0} for i, step in enumerate(steps)]


def test_figures_follow_from_the_steady_steps_only() -> None:
    warm_up = (99.0, 1, 1, 1, 1e9), (50.0, 1, 1, 1, 1e9)
    rows = rows_of(*warm_up, (2.0, 100, 90, 40, 4e10), (4.0, 200, 150, 110, 8e10), (3.0, 60, 30, 0, 3e10))
    figures = summary({"fill": 0.9}, rows, [1e10, 2e10])
    assert figures["tokens_per_second"] == 40.0  # 360 tokens in 9 seconds
    assert figures["computed_share"] == 0.75
    assert figures["trained_tokens_per_second"] == pytest.approx(150 / 9, abs=0.05)
    assert figures["seconds_per_step"] == 3.0
    assert figures["first_step_seconds"] == 99.0
    assert figures["gemm_share"] == pytest.approx(15e10 / 9 / 2e10, abs=1e-4)
    assert figures["tokens_per_second"] / figures["limit_tokens_per_second"] == pytest.approx(
        figures["gemm_share"], rel=1e-2
    )
    assert figures["peak_memory_gb"] == 4
    assert figures["fill"] == 0.9


@pytest.mark.slow
def test_the_measured_steps_are_those_of_training(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    """The same losses as `train`, step by step: a benchmark of something else would be worth nothing."""
    constant = {**SETTINGS, "lr_schedule": "constant", "warmup_ratio": 0.0}
    recipe = tiny_recipe(model_folder, chats, train=constant)
    trained = train(recipe, tmp_path / "work", say=lambda line: None, progress=False)
    file = tmp_path / "recipe.yaml"
    recipe.dump(file)
    done = CliRunner().invoke(app, ["bench", "train", str(file), "--steps", "4"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    expected = [line["loss"] for line in trained.metrics[:4]]
    assert figures["loss_of_each_step"] == pytest.approx(expected, rel=1e-4)
    assert figures["tokens_of_each_step"] == [line["tokens"] for line in trained.metrics[:4]]
    assert figures["settings"]["steps"] == 4
    assert 0 < figures["fill"] <= 1
    assert figures["gemm_share"] > 0
    assert figures["peak_memory_gb"] > 0
    assert figures["machine"]["cores"] >= 1
    assert any(note.startswith("fused: ") for note in figures["notes"])
    assert str(tmp_path) not in done.stdout, "no path of this machine"


def test_the_benchmarks_own_recipe_is_what_the_readme_says() -> None:
    recipe = benchmark_recipe(Path("x.jsonl"))
    assert (recipe.method.name, recipe.method.lora_rank, recipe.method.target_modules) == ("lora", 16, "all-linear")
    assert (recipe.model.dtype, recipe.data.max_length, recipe.data.packing) == ("float32", 1024, "best_fit")
    assert recipe.train.gradient_accumulation_steps == recipe.train.per_device_batch_size == 1


@pytest.mark.slow
def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    values = benchmark_recipe(tmp_path / "no.jsonl").model_dump(mode="json")
    values["model"]["name_or_path"] = str(tmp_path)
    with pytest.raises(MinitunerError, match=r"ended with exit status [12]") as caught:
        own_worker(Recipe.from_values(values))
    assert "config.json" in str(caught.value.text())


@pytest.mark.slow
def test_the_gpu_script_runs_here_with_a_tiny_shape(model_folder: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_training.py"
    small = ["--max-length", "3000", "--records", "40", "--steps", "3", "--tokenizer", str(model_folder)]
    command = [sys.executable, str(script), "--shapes", "tiny", "--methods", "lora", "--dtype", "float32", *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    packed, unpacked = (figures["runs"][f"tiny lora auto {kind}"] for kind in ("packed", "unpacked"))
    assert packed["tokens_per_second"] > 0
    assert "error" not in unpacked
    assert sum(packed["tokens_of_each_step"]) > sum(unpacked["tokens_of_each_step"]) > 0
    assert set(figures["packed_by_unpacked"]) == {"tiny lora auto"}


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="warm up"):
        bench_train(steps=WARM_UP)
