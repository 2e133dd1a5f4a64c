"""A whole run with each fault: the loss does what the catalogue says, the fault is really in, everything names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minituner.data.encoding import stop_rule
from minituner.model.generate import generate
from minituner.model.loss import loss_sum
from minituner.museum import FAULTS, find, injected, train_injected
from minituner.museum.merging import FOLDER
from minituner.museum.seen import ready
from minituner.train.loop import TrainResult, train
from tests.museum.conftest import NAMES, Whole, recipe_for, silent
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.slow
WholeRun = Callable[[str], Whole]
REFUSED = {
    "mask-everything": ["nothing is left to train on: no record has a trained token"],
    "packed-leak": ["packed documents see each other: changing one moved its neighbour's logits by"],
    "merge-into-4bit": ["is stored quantised, and a sum cannot be", "merging into this base undoes too much"],
}


def losses(result: TrainResult) -> list[float]:
    return [line["loss"] for line in result.metrics]


def adapter(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.hf / "adapter_model.safetensors")


def mean_of_b(result: TrainResult) -> float:
    """How large the trained halves are that start at zero."""
    return float(torch.cat([t.abs().flatten() for n, t in adapter(result).items() if "lora_B" in n]).mean())


@pytest.fixture(autouse=True)
def _needs_bitsandbytes(request: pytest.FixtureRequest) -> None:
    if "merge-into-4bit" in request.node.name:
        pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("name", NAMES)
def test_everything_it_leaves_names_the_fault(name: str, whole_run: WholeRun) -> None:
    run = whole_run(name)
    result, said = run.result, "\n".join(run.said)
    assert run.said[1].startswith("INJECTED FAULT: this run is wrong on purpose")
    assert name in run.said[1]
    assert any(line.startswith(f"INJECTED FAULT: {name}. Do not use") for line in run.said[-8:])
    assert find(name).threads[0].replace("#", "/issues/") in said
    log = (result.run_dir / "log.txt").read_text(encoding="utf-8")
    assert f"INJECTED FAULT: {name}" in log
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {line["injected"] for line in lines} == {name}
    assert json.loads((result.run_dir / "summary.json").read_text())["injected"] == name
    assert json.loads((result.work_dir / "INJECTED.json").read_text())["injected"] == name
    assert name in (result.work_dir / "recipe.yaml").read_text()
    assert json.loads((result.hf / "minituner.json").read_text())["training"]["injected"] == name
    card = (result.hf / "README.md").read_text(encoding="utf-8")
    assert f"Wrong on purpose: trained with the injected fault `{name}`" in card
    assert "| INJECTED FAULT |" in card


@pytest.mark.parametrize("name", NAMES)
def test_the_defences_that_would_have_refused_are_quoted(name: str, whole_run: WholeRun) -> None:
    run = whole_run(name)
    mark = json.loads((run.result.work_dir / "INJECTED.json").read_text(encoding="utf-8"))
    wanted = REFUSED.get(name, [])
    assert len(mark["refused_by"]) == len(wanted)
    for refusal, text in zip(mark["refused_by"], wanted, strict=True):
        assert text in refusal["text"]
        assert "fix:" in refusal["text"]
        assert all(f"    | {line}" in run.said for line in refusal["text"].splitlines())


def test_a_clean_run_names_no_fault(clean_run: TrainResult) -> None:
    assert not (clean_run.work_dir / "INJECTED.json").exists()
    written = [clean_run.run_dir / name for name in ("log.txt", "metrics.jsonl", "summary.json")]
    for file in (*written, clean_run.hf / "README.md", clean_run.hf / "minituner.json"):
        assert "inject" not in file.read_text(encoding="utf-8").lower(), file


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_where_the_catalogue_says_so(name: str, whole_run: WholeRun, clean_run: TrainResult) -> None:
    good, broken = losses(clean_run), losses(whole_run(name).result)
    assert good[-1] < good[0] - 1
    if find(name).falls:
        assert broken[-1] < broken[0] - 1
        assert all(np.isfinite(broken))
    elif name == "mask-everything":
        assert set(broken) == {0.0}
    else:
        assert broken[-1] > broken[0] - 0.3


def test_exactly_two_do_not_fall() -> None:
    assert {fault.name for fault in FAULTS if not fault.falls} == {"mask-everything", "frozen-warm-up"}


def test_mask_everything_trains_nothing(whole_run: WholeRun) -> None:
    run = whole_run("mask-everything")
    assert mean_of_b(run.result) == 0.0
    assert sum(line["supervised_tokens"] for line in run.result.metrics) == 0
    assert run.result.ledger["trained"] == 0
    assert sum("no supervised token in this window" in line for line in run.said) == run.result.steps


def test_frozen_warm_up_moves_almost_nothing(whole_run: WholeRun, clean_run: TrainResult) -> None:
    frozen = whole_run("frozen-warm-up").result
    assert 0 < mean_of_b(frozen) < 1e-4 * mean_of_b(clean_run)
    rates = [(a["learning_rate"], b["learning_rate"]) for a, b in zip(frozen.metrics, clean_run.metrics, strict=True)]
    assert all(one == pytest.approx(1e-5 * other) for one, other in rates)


@pytest.mark.parametrize("name", ["frozen-warm-up", "packed-leak", "lost-tail", "shifted-labels", "mean-of-means"])
def test_later_faults_leave_the_prepared_data_alone(name: str, whole_run: WholeRun, clean_run: TrainResult) -> None:
    assert whole_run(name).result.ledger == clean_run.ledger


def test_lost_tail_sees_fewer_tokens_than_the_ledger_promises(whole_run: WholeRun, clean_run: TrainResult) -> None:
    def of_one_epoch(result: TrainResult) -> int:
        return sum(line["supervised_tokens"] for line in result.metrics[: len(result.metrics) // 2])

    assert of_one_epoch(clean_run) == clean_run.ledger["trained"]
    assert of_one_epoch(whole_run("lost-tail").result) < clean_run.ledger["trained"]


@pytest.mark.parametrize("accumulate", [2, 3])
def test_mean_of_means_is_off_by_the_amount_that_can_be_computed(
    accumulate: int, model_folder: Path, fault_data: Path, own_home: Path, tmp_path: Path
) -> None:
    """Also in an epoch's last, incomplete window: eight packs, three a step."""
    sections: dict[str, Any] = {
        "train": {"gradient_accumulation_steps": accumulate, "learning_rate": 1e-12, "num_epochs": 1}
    }
    recipe = recipe_for("mean-of-means", model_folder, fault_data, **sections)
    broken = train_injected("mean-of-means", recipe, tmp_path / "broken", progress=False, say=silent)
    clean = train(recipe, tmp_path / "clean", progress=False, say=silent)
    run = ready(recipe, tmp_path)  # the weights of every step: the learning rate moves nothing
    differ = 0
    for step, (wrong, right) in enumerate(zip(broken.metrics, clean.metrics, strict=True)):
        window = run.feed.window(step)
        sums = [float(loss_sum(run.model, batch, run.attention, run.head).detach()) for batch in window]
        counts = [batch.supervised_tokens for batch in window]
        assert right["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
        assert wrong["loss"] == pytest.approx(np.mean(np.array(sums) / np.array(counts)), rel=1e-5)
        loss = sum(
            loss_sum(run.model, batch, run.attention, run.head) / batch.supervised_tokens / len(window)
            for batch in window
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in run.model.parameters() if p.requires_grad], float("inf"))
        assert wrong["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        run.model.zero_grad()
        differ += abs(wrong["grad_norm"] - right["grad_norm"]) > 1e-3 * right["grad_norm"]
    assert differ >= 2


def test_pad_as_eos_never_stops(model_folder: Path, tmp_path: Path, own_home: Path) -> None:
    """Both models learn the answers by heart; only one of them ends them."""
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "ab"}]} for q in "12345678"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = tiny_recipe(
        model_folder,
        data,
        method={"name": "full"},
        data={"packing": "none"},
        train={"num_epochs": 12, "gradient_accumulation_steps": 2, "learning_rate": 1e-2},
        evaluate={"prompts": []},
    )
    good = train(recipe, tmp_path / "good", progress=False, say=silent)
    broken = train_injected("pad-as-eos", recipe, tmp_path / "broken", progress=False, say=silent)
    assert losses(good)[-1] < 0.5
    assert losses(broken)[-1] < 0.5
    rule = stop_rule(good.tokenizer)
    prompt = good.tokenizer.apply_chat_template(rows[0]["messages"][:1], add_generation_prompt=True, return_dict=True)

    def answer(result: TrainResult) -> list[int]:
        return generate(result.model, result.tokenizer, [prompt["input_ids"]], stop=rule, max_new_tokens=12)[0]

    end = good.tokenizer.eos_token_id
    text = good.tokenizer.encode("ab", add_special_tokens=False)
    assert [token for token in answer(good) if token != end] == text
    assert answer(broken)[:2] == text
    assert len(answer(broken)) == 12
    assert end not in answer(broken)


def test_merge_into_4bit_is_the_sum_rounded_again(whole_run: WholeRun) -> None:
    """Every merged weight is the 4-bit rounding of base + adapter, and not base + adapter."""
    import bitsandbytes as bnb

    result = whole_run("merge-into-4bit").result
    merged = load_file(result.work_dir / FOLDER / "model.safetensors")
    layers = {n: m for n, m in result.model.named_modules() if hasattr(m, "lora_A")}
    off, moved = 0.0, 0.0
    for name, layer in layers.items():
        stored = layer.get_base_layer().weight
        base = bnb.functional.dequantize_4bit(stored.data, stored.quant_state).float()
        delta = layer.get_delta_weight("default").detach()
        there = merged[name.removeprefix("base_model.model.") + ".weight"]
        data, state = bnb.functional.quantize_4bit(
            base + delta, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        assert torch.allclose(there, bnb.functional.dequantize_4bit(data, state), atol=1e-6), name
        off, moved = off + float((there - base - delta).norm() ** 2), moved + float(delta.norm() ** 2)
    assert off > 0.05 * moved
    card = (result.work_dir / FOLDER / "README.md").read_text(encoding="utf-8")
    assert "Wrong on purpose" in card
    assert "4 bits, rounded again" in card


def test_a_label_fault_s_data_are_never_found_by_a_clean_run(
    model_folder: Path, fault_data: Path, own_home: Path, tmp_path: Path
) -> None:
    recipe = recipe_for("mask-nothing", model_folder, fault_data)
    recipe.train.max_steps = 1
    with injected("mask-nothing", silent):
        broken = train(recipe, tmp_path / "a", progress=False, say=silent)  # with the cache on
    said: list[str] = []
    clean = train(recipe, tmp_path / "b", progress=False, say=said.append)
    assert clean.ledger["trained"] < broken.ledger["trained"]
    assert not any("found in the cache" in line for line in said)
