"""Resume after kill == never killed: weights, optimizer, random generators and sample order, bit for bit."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from minituner import Recipe
from minituner.errors import UsageError
from minituner.train import checkpoint, loop
from minituner.train.callbacks import Callback
from minituner.train.loop import train
from minituner.train.resume import with_dtype_of
from minituner.train.schedule import learning_rate
from tests.tiny import tiny_folder, tiny_recipe, write_chats
from tests.train.processes import Process, command_line, run_command


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
        "train": {"per_device_batch_size": 2, "num_epochs": 16, "learning_rate": 1e-3, "weight_decay": 0.1},
    },
}


# Where a process is killed: at the n-th line of Python that runs in the loop and what it calls, at the n-th line of
# checkpoint.py, or by the kernel in the middle of a write, when a file reaches n bytes.
Kill = tuple[str, int]
PACKAGE = Path(checkpoint.__file__).parents[1]


def killed(arguments: list[str], kill: Kill, where: str) -> None:
    """The command line, with a kill -9 at one exact place; `where` is the file that the place is noted in."""
    kind, count = kill
    traced = checkpoint.__file__ if kind == "checkpoint" else str(PACKAGE)

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count -= event == "line"
        if not count:
            Path(where).write_text(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    def on_call(frame: FrameType, _event: str, _: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(traced) else None

    def with_trace(work: Callable[..., Any]) -> Callable[..., Any]:
        def traced_work(*given: Any, **named: Any) -> Any:
            sys.settrace(on_call)
            try:
                return work(*given, **named)
            finally:
                sys.settrace(None)

        return traced_work

    def cut_off(*given: Any, **named: Any) -> Path:
        Path(where).write_text("in the middle of a write")
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it and reports an error instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, resource.RLIM_INFINITY))
        return real_save(*given, **named)

    real_save = checkpoint.save
    if kind == "anywhere":
        loop.run_steps = with_trace(loop.run_steps)
    else:
        checkpoint.save = cut_off if kind == "write" else with_trace(real_save)
    command_line(arguments)


def draw_kills(seed: int, largest_file: int) -> list[Kill]:
    """Ten places. A step is about 700 lines, a save 350, and 4,500 come before the first step."""
    draw = random.Random(seed)
    kills = [("anywhere", draw.randint(4_000, 13_000)) for _ in range(5)]
    kills += [("checkpoint", draw.randint(1, 700)) for _ in range(3)]
    kills += [("write", draw.randint(1, largest_file)) for _ in range(2)]
    draw.shuffle(kills)
    return kills


@pytest.mark.slow
@pytest.mark.parametrize(("sections", "seed"), [(RUNS[name], n) for n, name in enumerate(RUNS)], ids=RUNS.keys())
def test_killed_ten_times_it_ends_as_if_never_killed(
    sections: dict[str, dict[str, Any]], seed: int, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    """Two runs, twenty kills: in the loop, between any two lines that write a checkpoint, and within a write."""
    defaults = {"train": {"num_epochs": 12}, "save": {"every_steps": 3}, "evaluate": {"every_steps": 4}}
    recipe = tiny_recipe(model_folder, chats, **{**defaults, **sections})
    recipe.dump(tmp_path / "r.yaml")
    status, output = run_command(["train", "r.yaml", "--work-dir", "never"], tmp_path)
    assert status == 0, output
    total = max(metrics_of(tmp_path / "never"))
    assert total >= 48, "more than ten kills reach"

    places = []
    arguments = ["train", "r.yaml", "--work-dir", "killed", "--resume", "if-any"]
    largest = max(map(len, last_files(tmp_path / "never").values()))
    for kill in draw_kills(seed, largest):
        process = Process(killed, arguments, kill, str(tmp_path / "where.txt"), cwd=tmp_path)
        status = process.finish()
        assert status == (-signal.SIGXFSZ if kill[0] == "write" else -signal.SIGKILL), (kill, process.output)
        places.append((tmp_path / "where.txt").read_text())
    assert sum("checkpoint.py" in place or "write" in place for place in places) >= 5, places
    status, output = run_command([*arguments[:-1], "auto"], tmp_path)
    assert status == 0, output
    assert "resumed from killed/checkpoints/step-" in output, places

    assert last_files(tmp_path / "killed") == last_files(tmp_path / "never")
    never, seen = metrics_of(tmp_path / "never"), metrics_of(tmp_path / "killed")
    assert sorted(seen) == sorted(never)
    for step, facts in seen.items():
        assert set(facts) == set(never[step]), f"step {step} saw something else"
    weights = [next((tmp_path / name / "hf").glob("*model.safetensors")) for name in ("never", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run of four steps, and the recipe it had."""
    place = tmp_path_factory.mktemp("finished")
    model, chats = tiny_folder(place / "model"), write_chats(place / "chats.jsonl")
    tiny_folder(place / "other", seed=1)
    recipe = tiny_recipe(model, chats, train={"num_epochs": 1}, evaluate={"prompts": []})
    result = train(recipe, place / "w", say=lambda line: None)
    return {"recipe": recipe, "work_dir": place / "w", "result": result, "place": place}


# change -> what the message must name
CHANGES: dict[str, str] = {
    "train.seed=1": "train.seed: 42 then, 1 now",
    "train.per_device_batch_size=2": "train.per_device_batch_size: 1 then, 2 now",
    "train.gradient_accumulation_steps=3": "train.gradient_accumulation_steps: 2 then, 3 now",
    "data.max_length=96": "data.max_length: 128 then, 96 now",
    "data.packing=none": "data.packing: best_fit then, none now",
    "data.shuffle=false": "data.shuffle: True then, False now",
    "data.holdout=0.2": "data.holdout: 0.0 then, 0.2 now",
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
    work_dir = finished["work_dir"]
    before = (work_dir / "hf" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(work_dir / "hf")
    result = train(finished["recipe"], work_dir, resume="auto", say=lambda line: None)
    assert result.metrics == []
    assert result.steps == finished["result"].steps
    assert (result.hf / "adapter_model.safetensors").read_bytes() == before


class Seen(Callback):
    """Pack numbers and rate of each step."""

    def __init__(self) -> None:
        self.packs: dict[int, list[list[int]]] = {}
        self.rates: dict[int, float] = {}

    def on_step(self, run: Any, metrics: dict[str, Any]) -> None:
        self.packs[run.step] = run.feed.packs(run.step - 1)
        self.rates[run.step] = metrics["learning_rate"]


def test_more_epochs_see_the_windows_of_a_longer_run_and_the_new_rates_are_said(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    work_dir = shutil.copytree(finished["work_dir"], tmp_path / "w")
    recipe = Recipe.load(work_dir / "recipe.yaml", ["train.num_epochs=2"])
    whole, more, said = Seen(), Seen(), []
    train(recipe, tmp_path / "whole", callbacks=[whole], say=lambda line: None)
    train(recipe, work_dir, resume="auto", callbacks=[more], say=said.append)
    assert sorted(more.packs) == [5, 6, 7, 8]
    assert more.packs == {step: packs for step, packs in whole.packs.items() if step > 4}
    assert more.rates == {step: rate for step, rate in whole.rates.items() if step > 4}

    old = finished["result"].metrics[3]["learning_rate"]
    at = next(n for n, line in enumerate(said) if "schedule has changed" in line)
    assert said[at - 1].endswith("at step 4 of 8")
    assert said[at : at + 3] == [
        "the schedule has changed since the checkpoint: total_steps 4 -> 8",
        f"  step 4, already done, had the rate {old:.3e}; on the new curve it is {whole.rates[4]:.3e}",
        f"  step 5, the next, did not exist: the old schedule ended at step 4; it now has {more.rates[5]:.3e}",
    ]
    assert old < whole.rates[4], "stretched"


def test_another_rate_shape_or_warm_up_is_said_too(finished: dict[str, Any], tmp_path: Path) -> None:
    recipe = finished["recipe"]
    train(Recipe.load(finished["work_dir"] / "recipe.yaml", ["train.max_steps=2"]), tmp_path / "w", say=lambda _: None)
    changes = ["train.max_steps=10", "train.learning_rate=0.001", "train.lr_schedule=linear", "train.warmup_ratio=0.5"]
    changed, seen, said = Recipe.load(tmp_path / "w" / "recipe.yaml", changes), Seen(), []
    train(changed, tmp_path / "w", resume="auto", callbacks=[seen], say=said.append)
    text = "\n".join(said)
    for part in ("total_steps 2 -> 10", "learning_rate 0.01 -> 0.001", "lr_schedule cosine -> linear", "0.03 -> 0.5"):
        assert part in text
    used, stretched = learning_rate(1, 2, recipe.train), learning_rate(1, 10, changed.train)
    assert f"step 2, already done, had the rate {used:.3e}; on the new curve it is {stretched:.3e}" in text
    assert f"it now has {seen.rates[3]:.3e}" in text
    assert seen.rates[3] == pytest.approx(0.001 * 3 / 6)
    assert "it warms up (again) until step 5" in text
    said.clear()
    train(changed, tmp_path / "w", resume="auto", say=said.append)
    assert not any("schedule" in line for line in said), "nothing has changed"


def test_a_change_before_the_old_end_names_both_rates_of_the_next_step(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    work_dir = shutil.copytree(finished["work_dir"], tmp_path / "w")
    more = Recipe.load(work_dir / "recipe.yaml", ["train.max_steps=8", "save.every_steps=6", "save.keep_last=9"])
    train(more, work_dir, resume="auto", say=lambda line: None)
    said: list[str] = []
    fewer = Recipe.load(work_dir / "recipe.yaml", ["train.max_steps=7"])
    train(fewer, work_dir, resume=work_dir / "checkpoints" / "step-000006", say=said.append)
    was, now = learning_rate(6, 8, more.train), learning_rate(6, 7, fewer.train)
    assert f"  step 7, the next, would have had {was:.3e}; it now has {now:.3e}" in said


def test_fewer_steps_than_the_checkpoint_has_are_said(finished: dict[str, Any], tmp_path: Path) -> None:
    work_dir = shutil.copytree(finished["work_dir"], tmp_path / "w")
    said: list[str] = []
    result = train(
        Recipe.load(work_dir / "recipe.yaml", ["train.max_steps=3"]), work_dir, resume="auto", say=said.append
    )
    assert result.metrics == []
    assert "the schedule has changed since the checkpoint: total_steps 4 -> 3" in said


@pytest.mark.slow
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
