"""Resume after kill == never killed: weights, optimizer, random generators and sample order, bit for bit."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from minituner import Recipe
from minituner.errors import UsageError
from minituner.train import checkpoint
from minituner.train.loop import train
from minituner.train.resume import with_dtype_of
from tests.tiny import tiny_folder, tiny_recipe, write_chats
from tests.train.processes import Command, run_command


def metrics_of(work_dir: Path) -> dict[int, list[tuple[Any, ...]]]:
    """Step -> what each run in `work_dir` measured there (a killed run may have left half a line)."""
    seen: dict[int, list[tuple[Any, ...]]] = {}
    for file in work_dir.glob("runs/*/metrics.jsonl"):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                m = json.loads(line)
                facts = (m["loss"], m["grad_norm"], m["learning_rate"], m["supervised_tokens"], m["tokens"])
                seen.setdefault(m["step"], []).append(facts)
    return seen


def last_files(work_dir: Path) -> dict[str, bytes]:
    folder = checkpoint.find(work_dir, "auto", print)
    return {name: (folder / name).read_bytes() for name in checkpoint.FILES}


RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "lora with dropout": {"method": {"lora_dropout": 0.3}},
    "full, concat, two rows a batch": {
        "method": {"name": "full"},
        "data": {"packing": "concat", "max_length": 64},
        "train": {"per_device_batch_size": 2, "num_epochs": 6, "learning_rate": 1e-3, "weight_decay": 0.1},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("sections", RUNS.values(), ids=RUNS.keys())
def test_killed_again_and_again_it_ends_as_if_never_killed(
    sections: dict[str, dict[str, Any]], model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    defaults = {"train": {"num_epochs": 5}, "save": {"every_steps": 3}, "evaluate": {"every_steps": 4}}
    recipe = tiny_recipe(model_folder, chats, **{**defaults, **sections})
    recipe.dump(tmp_path / "r.yaml")
    status, output = run_command(["train", "r.yaml", "--work-dir", "never"], tmp_path)
    assert status == 0, output
    total = max(metrics_of(tmp_path / "never"))
    assert total >= 15, "several epochs"

    draw = random.Random(7)
    kills = sorted(draw.sample(range(1, total), 4))
    arguments = ["train", "r.yaml", "--work-dir", "killed"]
    for step in kills:
        whole = (tmp_path / "killed" / "latest").is_file()
        command = Command([*arguments, *(["--resume", "auto"] if whole else [])], tmp_path)
        assert command.wait_for_step(tmp_path / "killed", step), command.output
        command.send(signal.SIGKILL)
        assert command.finish() == -signal.SIGKILL
    status, output = run_command([*arguments, "--resume", "auto"], tmp_path)
    assert status == 0, output
    assert "resumed from killed/checkpoints/step-" in output

    assert last_files(tmp_path / "killed") == last_files(tmp_path / "never")
    never, killed = metrics_of(tmp_path / "never"), metrics_of(tmp_path / "killed")
    assert sorted(killed) == sorted(never)
    for step, facts in killed.items():
        assert set(facts) == set(never[step]), f"step {step} saw something else"
    for name in ("never", "killed"):
        weights = next((tmp_path / name / "hf").glob("*model.safetensors"))
        assert weights.read_bytes() == next((tmp_path / "never" / "hf").glob("*model.safetensors")).read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run of four steps, and the recipe it had."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITUNER_HOME", str(place / "home"))
        model, chats = tiny_folder(place / "model"), write_chats(place / "chats.jsonl")
        tiny_folder(place / "other", seed=1)
        recipe = tiny_recipe(model, chats, train={"num_epochs": 1}, evaluate={"prompts": []})
        result = train(recipe, place / "w", say=lambda line: None)
        yield {"recipe": recipe, "work_dir": place / "w", "result": result, "place": place}


# change -> what the message must name
CHANGES: dict[str, str] = {
    "train.seed=1": "train.seed: 42 then, 1 now",
    "train.per_device_batch_size=2": "train.per_device_batch_size: 1 then, 2 now",
    "train.gradient_accumulation_steps=3": "train.gradient_accumulation_steps: 2 then, 3 now",
    "data.max_length=96": "data.max_length: 128 then, 96 now",
    "data.packing=none": "data.packing: best_fit then, none now",
    "data.shuffle=false": "data.shuffle: True then, False now",
    "data.isolate_documents=false": "data.isolate_documents: True then, False now",
    "data.sources.0.weight=1.5": "packs: ",
    "data.sources.0.limit=11": "prepared data: ",
    "data.system=Be kind.": "prepared data: ",
    "method.lora_alpha=32": "method.lora_alpha: 8.0 then, 32.0 now",
    "method.lora_rank=8": "names or shapes differ",
    "method.name=full": "method.name: lora then, full now",
    "model.name_or_path=OTHER": "model's weights: ",
    "model.dtype=bfloat16": "dtype: float32 then, bfloat16 now",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_plan_is_refused_naming_what_changed(change: str, finished: dict[str, Any]) -> None:
    kept = (finished["work_dir"] / "recipe.yaml").read_text()
    override = change.replace("OTHER", str(finished["place"] / "other"))
    recipe = Recipe.load(finished["work_dir"] / "recipe.yaml", [override])
    with pytest.raises(UsageError) as caught:
        train(recipe, finished["work_dir"], resume="auto", say=lambda line: None)
    assert caught.value.exit_code == 2
    assert CHANGES[change] in caught.value.text()
    assert (finished["work_dir"] / "recipe.yaml").read_text() == kept, "the run's own recipe is still there to resume"


def test_other_records_under_the_same_name_are_refused(finished: dict[str, Any]) -> None:
    source = Path(finished["recipe"].data.sources[0].path)
    before = source.read_text(encoding="utf-8")
    source.write_text(before.replace("It is", "It's "), encoding="utf-8")
    try:
        with pytest.raises(UsageError, match="cannot resume") as caught:
            train(finished["recipe"], finished["work_dir"], resume="auto", say=lambda line: None)
        assert "prepared data" in caught.value.why
    finally:
        source.write_text(before, encoding="utf-8")


def test_a_finished_run_resumed_trains_nothing_and_writes_hf_again(finished: dict[str, Any]) -> None:
    import shutil

    work_dir = finished["work_dir"]
    before = (work_dir / "hf" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(work_dir / "hf")
    result = train(finished["recipe"], work_dir, resume="auto", say=lambda line: None)
    assert result.metrics == []
    assert result.steps == finished["result"].steps
    assert (result.hf / "adapter_model.safetensors").read_bytes() == before


def test_more_epochs_and_another_learning_rate_may_be_asked_for(finished: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    work_dir = shutil.copytree(finished["work_dir"], tmp_path / "w")
    changes = ["train.num_epochs=2", "train.learning_rate=1e-3", "save.keep_last=5"]
    recipe = Recipe.load(work_dir / "recipe.yaml", changes)
    said: list[str] = []
    result = train(recipe, work_dir, resume=work_dir / "checkpoints" / "step-000004", say=said.append)
    assert [m["step"] for m in result.metrics] == [5, 6, 7, 8]
    assert result.metrics[0]["learning_rate"] < 1e-3
    assert any(line.endswith("at step 4 of 8") for line in said)


def test_auto_with_nothing_to_resume_is_exit_2(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    tiny_recipe(model_folder, chats).dump(tmp_path / "r.yaml")
    status, output = run_command(["train", "r.yaml", "--work-dir", "w", "--resume", "auto"], tmp_path)
    assert status == 2
    assert "no whole checkpoint under w/checkpoints" in output
    assert "leave --resume out" in output
    status, output = run_command(["train", "r.yaml", "--work-dir", "w", "--resume", "w/step-9"], tmp_path)
    assert status == 2
    assert "w/step-9: there is no such folder" in output


def test_a_measured_dtype_is_not_measured_again(model_folder: Path, chats: Path) -> None:
    state = {"plan": {"dtype": "bfloat16"}}
    auto = tiny_recipe(model_folder, chats, model={"dtype": "auto"})
    assert with_dtype_of(auto, state).model.dtype == "bfloat16"
    assert auto.model.dtype == "auto", "the recipe that was given is not changed"
    named = tiny_recipe(model_folder, chats)
    assert with_dtype_of(named, state) == named
    full = tiny_recipe(model_folder, chats, model={"dtype": "auto"}, method={"name": "full"})
    assert with_dtype_of(full, state) == full
