"""The held-out loss is the loss of records never trained on, over all ranks, and measuring it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minituner import Recipe
from minituner.train.callbacks import Callback
from minituner.train.loop import TrainResult, train
from minituner.train.run import Run
from tests.tiny import tiny_recipe, write_chats
from tests.train.processes import finish_all, ranks_of

pytestmark = pytest.mark.usefixtures("own_home")
FILES = ("model.safetensors", "optimizer.safetensors")


def quiet(recipe: Recipe, work_dir: Path, **options: Any) -> TrainResult:
    return train(recipe, work_dir, say=options.pop("say", lambda line: None), progress=False, **options)


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def evaluations(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in lines_of(run_dir) if "eval_loss" in line}


class KeepRun(Callback):
    """The run, to look into after it is over, and what was told about evaluations."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def on_start(self, run: Run) -> None:
        self.run = run

    def on_evaluation(self, run: Run, measured: dict[str, Any]) -> None:
        assert run.model.training, "dropout is on again"
        self.told.append(measured)


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_it_is_the_mean_over_held_out_tokens_computed_with_transformers_alone(
    packing: str, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    data = {"holdout": 0.3, "packing": packing, "max_length": 128}
    keep, said = KeepRun(), []
    result = quiet(
        tiny_recipe(model_folder, chats, data=data, train={"max_steps": 2, "per_device_batch_size": 2}),
        tmp_path / "w",
        callbacks=[keep],
        say=said.append,
    )
    held = keep.run.prepared.held_out
    assert held is not None
    assert len(held.rows) == 4, "0.3 of 12 records"
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    total = count = 0
    for number in range(len(held.packs)):
        for ids, labels in held.documents(number):
            targets = torch.from_numpy(labels).long()[1:]
            logits = model(input_ids=torch.from_numpy(ids)[None].long()).logits.detach()[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += int((targets != -100).sum())
    assert result.eval_losses[0] == pytest.approx(total / count, rel=1e-5)
    assert keep.told[0] == {"step": 0, "eval_loss": result.eval_losses[0], "eval_tokens": count}
    assert f"step 0: eval_loss {total / count:.4f} of {count:,} held-out tokens" in said
    assert result.eval_losses[2] != result.eval_losses[0], "the model has changed"
    assert result.ledger["held_out_documents"] == 4


@pytest.mark.slow
def test_at_both_ends_and_in_between_and_again_after_a_resume(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        model_folder,
        chats,
        data={"holdout": 0.2},
        train={"max_steps": 5},
        evaluate={"every_steps": 2},
        method={"lora_dropout": 0.3},
    )
    result = quiet(recipe, tmp_path / "w")
    assert evaluations(result.run_dir) == result.eval_losses
    assert list(result.eval_losses) == [0, 2, 4, 5]
    assert [line["step"] for line in lines_of(result.run_dir) if "loss" in line] == [1, 2, 3, 4, 5]
    longer = Recipe.load(tmp_path / "w" / "recipe.yaml", ["train.max_steps=6"])
    again = quiet(longer, tmp_path / "w", resume="auto")
    assert list(again.eval_losses) == [5, 6]
    assert again.eval_losses[5] == result.eval_losses[5], "the same weights, the same records"
    ends = quiet(tiny_recipe(model_folder, chats, data={"holdout": 0.2}, train={"max_steps": 5}), tmp_path / "ends")
    assert list(ends.eval_losses) == [0, 5], "every_steps: null"


def test_nothing_held_out_nothing_measured(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    result = quiet(tiny_recipe(model_folder, chats, train={"max_steps": 1}), tmp_path / "w")
    assert result.eval_losses == {}
    assert evaluations(result.run_dir) == {}


@pytest.mark.slow
def test_evaluating_after_each_step_trains_as_if_the_records_had_never_been_there(
    model_folder: Path, tmp_path: Path
) -> None:
    """With dropout, so that one drawn number too many would show; random generators are in the checkpoint, too."""
    chats = write_chats(tmp_path / "chats.jsonl", 20)
    settings: dict[str, Any] = {"method": {"lora_dropout": 0.3}, "train": {"max_steps": 8}}
    keep = KeepRun()
    recipe = tiny_recipe(model_folder, chats, data={"holdout": 0.3}, evaluate={"every_steps": 1}, **settings)
    evaluated = quiet(recipe, tmp_path / "evaluated", callbacks=[keep])
    assert len(evaluated.eval_losses) == 9

    where = keep.run.prepared.dataset.with_format(None)["where"]
    assert keep.run.prepared.held_out is not None
    held = {int(where[row].rsplit(":", 1)[1]) for row in keep.run.prepared.held_out.rows}
    rest = tmp_path / "rest.jsonl"
    lines = chats.read_text(encoding="utf-8").splitlines(keepends=True)
    rest.write_text("".join(line for n, line in enumerate(lines, start=1) if n not in held), encoding="utf-8")
    assert len(held) == 6
    plain = quiet(tiny_recipe(model_folder, rest, evaluate={"prompts": []}, **settings), tmp_path / "plain")
    for name in FILES:
        assert (evaluated.checkpoint / name).read_bytes() == (plain.checkpoint / name).read_bytes(), name


def test_sample_chats_after_each_step_change_no_bit_either(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": {"lora_dropout": 0.3}, "train": {"max_steps": 6}}
    results, switches = [], []
    for name, evaluate in {
        "asked": {"every_steps": 1, "prompts": ["Hi", "你是谁?"], "system": "Be {kind}, {} and {{brief}}."},
        "silent": {"prompts": []},
    }.items():
        keep = KeepRun()
        recipe = tiny_recipe(model_folder, chats, evaluate=evaluate, **settings)
        results.append(quiet(recipe, tmp_path / name, callbacks=[keep]))
        config = keep.run.model.config
        switches.append((config.use_cache, config._attn_implementation, keep.run.model.training))
    asked, silent = results
    assert sorted(asked.answers) == [0, 1, 2, 3, 4, 5, 6]
    assert silent.answers == {}
    assert switches[0] == switches[1] == (False, "per_document_sdpa", True)
    for name in FILES:
        assert (asked.checkpoint / name).read_bytes() == (silent.checkpoint / name).read_bytes(), name


@pytest.mark.slow
def test_two_ranks_measure_what_one_measures(model_folder: Path, tmp_path: Path) -> None:
    """Three held-out packs for two ranks: at the end one of them has an empty micro-batch."""
    recipe = tiny_recipe(
        model_folder,
        write_chats(tmp_path / "chats.jsonl", 14),
        data={"packing": "none", "holdout": 0.2},
        train={"num_epochs": 1, "gradient_accumulation_steps": 2},
        evaluate={"every_steps": 2, "prompts": []},
    )
    recipe.dump(tmp_path / "r.yaml")
    arguments = ["train", "r.yaml", "--work-dir", "two", "train.gradient_accumulation_steps=1"]
    statuses, output = finish_all(ranks_of(arguments, tmp_path))
    assert statuses == [0, 0], output
    one = quiet(recipe, tmp_path / "one")
    assert one.ledger["held_out_documents"] == 3
    (two,) = (tmp_path / "two" / "runs").iterdir()
    assert evaluations(two) == pytest.approx(one.eval_losses, rel=1e-5)
    assert output.count("eval_loss") == len(one.eval_losses), "said once"
    for line, other in zip(one.metrics, [line for line in lines_of(two) if "loss" in line], strict=True):
        assert line["tokens"] == other["tokens"]
        flops = [row["model_flops_per_second"] * row["seconds"] for row in (line, other)]
        assert flops[0] == pytest.approx(flops[1]), "of all ranks"
