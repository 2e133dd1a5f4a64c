"""The practice recipe: made once, trains in seconds, and can be spoiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from minituner.errors import UsageError
from minituner.museum import practice, show
from minituner.train.loop import train
from tests.museum.conftest import silent


@pytest.fixture(autouse=True)
def _a_tokenizer_at_hand(model_folder: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minituner.museum.practising.TOKENIZER", str(model_folder))


def test_it_learns_and_can_be_spoiled(tmp_path: Path) -> None:
    recipe = practice(tmp_path / "p", ["data.max_length=1024", "train.max_steps=6"])
    losses = [line["loss"] for line in train(recipe, tmp_path / "w", progress=False, say=silent).metrics]
    assert losses[-1] < 0.8 * losses[0]
    clean, broken = show("lost-tail", recipe, silent)
    assert clean.passes
    assert not broken.passes


def test_it_is_made_once_and_the_same_each_time(tmp_path: Path) -> None:
    practice(tmp_path / "a")
    practice(tmp_path / "b")
    weights, other = ((tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert weights.read_bytes() == other.read_bytes()
    before = weights.stat().st_mtime_ns
    assert practice(tmp_path / "a", ["method.name=lora"]).method.name == "lora"
    assert weights.stat().st_mtime_ns == before
    assert "Xiaohai" in (tmp_path / "a" / "assistant.json").read_text(encoding="utf-8")


def test_a_wrong_change_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the practice recipe: 1 problem"):
        practice(tmp_path, ["train.num_epoch=3"])
