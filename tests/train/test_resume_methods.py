"""Resume == never stopped, bit for bit, for every method and optimizer: what each needs is in the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minituner.errors import UsageError
from minituner.model.loading import load_model
from minituner.model.residual import restore_start, start_of
from minituner.recipe import MethodSection, ModelSection
from minituner.train import checkpoint
from minituner.train.loop import train
from tests.tiny import tiny_folder, tiny_recipe

pytestmark = pytest.mark.usefixtures("own_home")

RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "pissa": {"method": {"init_lora_weights": "pissa"}},
    "olora, dora, rslora": {"method": {"init_lora_weights": "olora", "use_dora": True, "use_rslora": True}},
    "orthogonal": {"method": {"init_lora_weights": "orthogonal"}},
    "tied embedding in full": {"method": {"modules_to_save": ["embed_tokens"]}},
    "qlora with dropout": {"method": {"name": "qlora", "lora_dropout": 0.2}},
    "int8_lora": {"method": {"name": "int8_lora"}},
    "full, 8-bit AdamW": {
        "method": {"name": "full"},
        "train": {"optimizer": "adamw_8bit", "weight_decay": 0.1, "learning_rate": 1e-3},
    },
    "full, activation checkpointing": {
        "method": {"name": "full"},
        "train": {"activation_checkpointing": True, "learning_rate": 1e-3},
    },
}


def silent(line: str) -> None:
    """Say nothing."""


def run_and_stop_at_two(recipe: Any, place: Path) -> tuple[Any, Path]:
    """A run of four steps, and a copy of its folder as it was after two."""
    straight = train(recipe, place / "straight", say=silent)
    stopped = place / "stopped"
    shutil.copytree(place / "straight", stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-000004")
    shutil.rmtree(stopped / "hf")
    (stopped / "latest").write_text("step-000002\n")
    return straight, stopped


def recipe_of(sections: dict[str, dict[str, Any]], model_folder: Path, chats: Path) -> Any:
    defaults = {"train": {"max_steps": 4}, "save": {"every_steps": 2, "keep_last": 5}, "evaluate": {"prompts": []}}
    merged = {key: {**defaults.get(key, {}), **sections.get(key, {})} for key in (*defaults, *sections)}
    return tiny_recipe(model_folder, chats, **merged)


@pytest.mark.parametrize("sections", RUNS.values(), ids=RUNS.keys())
def test_a_resumed_run_ends_as_if_never_stopped(
    sections: dict[str, dict[str, Any]], model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    straight, stopped = run_and_stop_at_two(recipe_of(sections, model_folder, chats), tmp_path)
    resumed = train(recipe_of(sections, model_folder, chats), stopped, resume="auto", say=silent)
    assert [m["step"] for m in resumed.metrics] == [3, 4]
    for name in checkpoint.FILES:
        assert (straight.checkpoint / name).read_bytes() == (resumed.checkpoint / name).read_bytes(), name
    for file in straight.hf.glob("*.safetensors"):
        assert file.read_bytes() == (resumed.hf / file.name).read_bytes()
    assert [m["loss"] for m in resumed.metrics] == [m["loss"] for m in straight.metrics[2:]]


def test_a_start_that_falls_otherwise_on_this_machine_is_set_right(
    model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another SVD: vectors with other signs and a little rounding, as on another kind of processor."""
    recipe = recipe_of(RUNS["pissa"], model_folder, chats)
    straight, stopped = run_and_stop_at_two(recipe, tmp_path)
    real = torch.linalg.svd

    def other(*arguments: Any, **options: Any) -> Any:
        u, s, vh = real(*arguments, **options)
        signs = torch.where(torch.arange(u.shape[1]) % 2 == 0, 1.0, -1.0)
        return u * signs, s * (1 + 1e-3), vh * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", other)
    said: list[str] = []
    resumed = train(recipe, stopped, resume="auto", say=said.append)
    assert any("the start of 14 adapted layers falls otherwise" in line for line in said)
    for mine, theirs in zip(resumed.metrics, straight.metrics[2:], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert start_of(resumed.model).keys() == start_of(straight.model).keys()
    for (key, one), other_one in zip(start_of(resumed.model).items(), start_of(straight.model).values(), strict=True):
        assert torch.equal(one, other_one), key


def test_a_plain_lora_has_no_start_to_keep(model_folder: Path) -> None:
    from minituner.model.adapters import apply_method

    section = ModelSection(name_or_path=str(model_folder), dtype="float32", attention="sdpa")
    base, _, _ = load_model(model_folder, section, MethodSection(), one_document_rows=True, device="cpu")
    model = apply_method(base, MethodSection())
    assert start_of(model) == {}
    restore_start(model, {}, pytest.fail)


def test_qlora_on_another_base_is_refused(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    _, stopped = run_and_stop_at_two(recipe_of(RUNS["qlora with dropout"], model_folder, chats), tmp_path)
    other = recipe_of(RUNS["qlora with dropout"], tiny_folder(tmp_path / "other", seed=5), chats)
    with pytest.raises(UsageError, match="plan of the run has changed") as caught:
        train(other, stopped, resume="auto", say=silent)
    assert "model's weights: 4bit:" in caught.value.why


def test_another_optimizer_is_refused(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    _, stopped = run_and_stop_at_two(recipe_of(RUNS["full, 8-bit AdamW"], model_folder, chats), tmp_path)
    plain = recipe_of({"method": {"name": "full"}}, model_folder, chats)
    with pytest.raises(UsageError, match="optimizer is not this one"):
        train(plain, stopped, resume="auto", say=silent)
