"""The trade-off is measured at the steps asked for, agrees with the end-of-run probes, and training does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minituner.errors import UsageError
from minituner.train.identity import log_probabilities
from minituner.train.loop import TrainResult, train
from minituner.train.tradeoff import TradeOff
from tests.tiny import tiny_recipe, write_chats

pytestmark = pytest.mark.slow


def run(model_folder: Path, place: Path, watch: list[Any], **train_settings: Any) -> TrainResult:
    place.mkdir(exist_ok=True)
    chats = write_chats(place / "chats.jsonl")
    recipe = tiny_recipe(
        model_folder,
        chats,
        method={"lora_dropout": 0.1},  # draws random numbers: a measurement that disturbs them changes the weights
        train={"max_steps": 4, **train_settings},
        evaluate={"identity": "Ada", "prompts": []},
    )
    return train(recipe, place / "w", callbacks=watch, progress=False, say=lambda _: None)


def adapter(result: TrainResult) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in result.model.named_parameters() if p.requires_grad}


def test_points_at_the_steps_asked_for_and_training_does_not_notice(model_folder: Path, tmp_path: Path) -> None:
    watch = TradeOff("Ada", (4, 2))
    watched = run(model_folder, tmp_path / "a", [watch])
    assert [point["step"] for point in watch.points] == [0, 2, 4]
    start, middle, end = watch.points
    assert start["identity_rate"] == 0
    assert start["clean_rate"] == 1
    assert start["retention_kl"] == pytest.approx(0, abs=1e-9), "the model is still the one it was"
    assert middle["retention_kl"] > 1e-6
    assert {key: end[key] for key in watched.probes} == watched.probes, "the last point is what the run itself reports"
    assert set(watch.answers) == {0, 2, 4}
    assert list(watch.answers[4]) == [*watch.identity, *watch.ordinary]
    alone = run(model_folder, tmp_path / "b", [])
    theirs = adapter(alone)
    assert all(torch.equal(weight, theirs[name]) for name, weight in adapter(watched).items())
    assert [m["loss"] for m in watched.metrics] == [m["loss"] for m in alone.metrics]


def test_its_divergence_is_the_formula_s(model_folder: Path, tmp_path: Path) -> None:
    watch = TradeOff("Ada", (4,), questions=3)
    result = run(model_folder, tmp_path, [watch])
    assert len(watch.identity) == len(watch.ordinary) == 3
    terms = []
    for prompt, answer in watch.sequences:
        now = log_probabilities(result.model, prompt, answer).double()
        with result.model.disable_adapter():
            before = log_probabilities(result.model, prompt, answer).double()
        terms.append((now.exp() * (now - before)).sum(-1))
    assert watch.points[-1]["retention_kl"] == pytest.approx(float(torch.cat(terms).mean()), rel=1e-4)


def test_a_resumed_run_says_that_it_has_nothing_to_compare_with(model_folder: Path, tmp_path: Path) -> None:
    run(model_folder, tmp_path, [])
    watch = TradeOff("Ada", (6,), questions=2)
    recipe = tiny_recipe(
        model_folder,
        tmp_path / "chats.jsonl",
        method={"lora_dropout": 0.1},
        train={"max_steps": 6},
        evaluate={"identity": "Ada", "prompts": []},
    )
    train(recipe, tmp_path / "w", resume="auto", callbacks=[watch], progress=False, say=lambda _: None)
    assert [point["step"] for point in watch.points] == [4, 6]
    assert {point["retention_kl"] for point in watch.points} == {None}


def test_what_another_measured_of_the_untuned_model_is_taken_over(model_folder: Path, tmp_path: Path) -> None:
    watch = TradeOff("Ada", (2,), questions=2)
    run(model_folder, tmp_path / "a", [watch], learning_rate=1e-3)
    again = TradeOff("Ada", (2,), questions=2)
    run(model_folder, tmp_path / "b", [again])
    spared = TradeOff("Ada", (2,), questions=2, untuned=watch)
    run(model_folder, tmp_path / "c", [spared])
    assert spared.points == again.points
    assert spared.answers == again.answers
    assert spared.points[1] != watch.points[1], "only what was before the first step is the other's"
    for other in (
        TradeOff("Ada", (2,), questions=2, untuned=TradeOff("Ada", (2,), questions=2)),
        TradeOff("Eve", (2,), questions=2, untuned=watch),
        TradeOff("Ada", (2,), untuned=watch),
    ):
        with pytest.raises(UsageError, match="did not ask the same model the same questions"):
            run(model_folder, tmp_path / "d", [other])


@pytest.mark.parametrize(
    ("options", "said"), [({"steps": (0, 2)}, "first step"), ({"steps": (1,), "questions": 0}, "1")]
)
def test_what_cannot_be_measured_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TradeOff("Ada", **options)
