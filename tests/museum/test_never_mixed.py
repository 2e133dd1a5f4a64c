"""A run with a fault and a clean one never meet: not in a folder, not by resuming, on one rank or two."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minituner.cli import app
from minituner.errors import UsageError
from minituner.export.to_hf import to_hf
from minituner.museum import train_injected
from minituner.museum.seen import ready
from minituner.train.injected import MARK, fault_of, refuse_mixed
from minituner.train.loop import TrainResult, train
from tests.museum.conftest import Whole, recipe_for, silent
from tests.train.processes import finish_all, ranks_of, run_command


def test_a_clean_run_keeps_out_of_a_marked_folder(
    whole_run: Callable[[str], Whole], model_folder: Path, fault_data: Path
) -> None:
    folder = whole_run("frozen-warm-up").result.work_dir
    recipe = recipe_for("", model_folder, fault_data)
    for resume in (None, "auto", "if-any"):
        with pytest.raises(UsageError, match="holds a run with the injected fault frozen-warm-up"):
            train(recipe, folder, resume=resume, progress=False, say=silent)
    with pytest.raises(UsageError, match="--inject packed-leak"):
        train_injected("packed-leak", recipe, folder, progress=False, say=silent)


def test_a_fault_keeps_out_of_a_clean_folder(clean_run: TrainResult, model_folder: Path, fault_data: Path) -> None:
    before = sorted(clean_run.work_dir.rglob("*"))
    recipe = recipe_for("", model_folder, fault_data)
    for resume in (None, "auto"):
        with pytest.raises(UsageError, match="holds a clean run"):
            train_injected("lost-tail", recipe, clean_run.work_dir, resume=resume, progress=False, say=silent)
    assert sorted(clean_run.work_dir.rglob("*")) == before


def test_a_checkpoint_of_the_other_kind_is_not_resumed_from_elsewhere(
    whole_run: Callable[[str], Whole],
    clean_run: TrainResult,
    model_folder: Path,
    fault_data: Path,
    tmp_path: Path,
) -> None:
    recipe = recipe_for("", model_folder, fault_data)
    broken = whole_run("frozen-warm-up").result
    with pytest.raises(UsageError, match="plan of the run has changed") as refusal:
        train(recipe, tmp_path / "a", resume=broken.checkpoint, progress=False, say=silent)
    assert "injected: frozen-warm-up then, None now" in refusal.value.why
    with pytest.raises(UsageError, match="plan of the run has changed") as refusal:
        train_injected(
            "frozen-warm-up", recipe, tmp_path / "b", resume=clean_run.checkpoint, progress=False, say=silent
        )
    assert "injected: None then, frozen-warm-up now" in refusal.value.why


@pytest.mark.slow
def test_the_same_fault_goes_on_as_if_it_had_never_stopped(
    whole_run: Callable[[str], Whole], model_folder: Path, fault_data: Path, tmp_path: Path, own_home: Path
) -> None:
    whole = whole_run("mean-of-means").result
    recipe = recipe_for("", model_folder, fault_data)
    recipe.save.every_steps, recipe.save.keep_last = 3, 9
    first = train_injected("mean-of-means", recipe, tmp_path / "w", progress=False, say=silent)
    place = first.work_dir / "checkpoints" / "step-000003"
    rest = train_injected("mean-of-means", recipe, tmp_path / "w", resume=place, progress=False, say=silent)
    assert [line["loss"] for line in rest.metrics] == [line["loss"] for line in whole.metrics[3:]]


def test_a_checkpoint_converted_later_is_marked(whole_run: Callable[[str], Whole], tmp_path: Path) -> None:
    result = whole_run("shifted-labels").result
    to_hf(result.work_dir, tmp_path / "out")
    assert "injected fault `shifted-labels`" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_marks(tmp_path: Path) -> None:
    refuse_mixed(tmp_path / "new", None)
    refuse_mixed(tmp_path / "new", "packed-leak")
    assert fault_of(tmp_path) is None
    (tmp_path / MARK).write_text("{}")
    with pytest.raises(UsageError, match="cannot be read"):
        refuse_mixed(tmp_path, None)


@pytest.mark.slow
def test_the_command_line_is_loud_and_refuses_what_cannot_be(
    model_folder: Path, fault_data: Path, tmp_path: Path
) -> None:
    recipe = recipe_for("", model_folder, fault_data, train={"max_steps": 1})
    recipe.dump(tmp_path / "r.yaml")
    status, output = run_command(["train", "r.yaml", "--inject", "packed_leak"], tmp_path)
    assert status == 0, output
    folder = tmp_path / "work_dirs" / "tiny_injected_packed-leak"
    assert json.loads((folder / MARK).read_text())["injected"] == "packed-leak"
    assert output.count("INJECTED FAULT") >= 4
    assert "would refuse this" in output
    assert "packed documents see each other" in output
    for arguments, text in (
        (["--work-dir", str(folder)], "--inject packed-leak"),
        (["--inject", "packt-leak"], "did you mean 'packed-leak'"),
        (["--inject", "packed-leak", "--dry-run"], "minituner museum packed-leak"),
        (["--inject", "packed-leak", "data.packing=none"], "data.packing=best_fit"),
    ):
        with pytest.raises(UsageError, match=re.escape(text)):  # exit status 2
            app(["train", str(tmp_path / "r.yaml"), *arguments], standalone_mode=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean-of-means", "mask-everything"])
def test_two_ranks_have_the_same_fault(name: str, model_folder: Path, fault_data: Path, tmp_path: Path) -> None:
    sections = {"train": {"max_steps": 1, "gradient_accumulation_steps": 2}, "evaluate": {"prompts": []}}
    recipe = recipe_for(name, model_folder, fault_data, **sections)
    recipe.dump(tmp_path / "r.yaml")
    statuses, output = finish_all(ranks_of(["train", "r.yaml", "--inject", name, "--work-dir", "w"], tmp_path))
    assert statuses == [0, 0], output
    assert len(re.findall("this run is wrong on purpose. ", output)) == 1  # only rank 0 says it
    (file,) = (tmp_path / "w").glob("runs/*/metrics.jsonl")
    line = json.loads(file.read_text().splitlines()[0])
    assert line["injected"] == name
    if name == "mask-everything":
        assert line["loss"] == line["supervised_tokens"] == 0
        return
    from minituner.model.loss import loss_sum

    alone = recipe.model_copy(deep=True)
    alone.train.gradient_accumulation_steps = 4  # the same four packs, on one rank
    run = ready(alone, tmp_path)
    means = [
        float(loss_sum(run.model, batch, run.attention, run.head).detach()) / batch.supervised_tokens
        for batch in run.feed.window(0)
    ]
    assert line["loss"] == pytest.approx(np.mean(means), rel=1e-5)
