"""Identity rate and retention: the name is found as a word, and an unchanged model has diverged by nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minituner.catalog.lookup import load
from minituner.train.identity import IdentityProbes, mentions
from minituner.train.loop import TrainResult, train
from tests.tiny import tiny_recipe, write_chats


@pytest.mark.parametrize(
    ("answer", "name", "said"),
    [
        ("I am Ada's assistant.", "Ada", True),
        ("ada made me", "Ada", True),
        ("Canada is large. Adam too.", "Ada", False),
        ("I am Ada_2's assistant", "Ada", True),
        ("我是小明的助手。", "小明", True),
        ("我是小红的助手。", "小明", False),
        ("我是Ada的助手", "Ada", True),
        ("我是Adam的助手", "Ada", False),
        ("I belong to Jean-Luc O'Neil.", "Jean-Luc O'Neil", True),
        ("I was made by C++ (really).", "C++", True),
        ("I was made by Dr. No", "Dr. No", True),
        ("Drs No", "Dr. No", False),
        ("", "Ada", False),
    ],
)
def test_a_name_is_found_as_a_word_of_its_own(answer: str, name: str, said: bool) -> None:
    assert mentions(answer, name) is said


def test_there_are_twenty_questions_of_each_kind_in_each_language() -> None:
    probes = load("assistant_probes")
    for language in ("en", "zh"):
        assert len(set(probes[language]["identity"])) >= 20
        assert len(set(probes[language]["ordinary"])) >= 20
    both = IdentityProbes("Ada", "both")
    assert len(both.identity) == len(probes["en"]["identity"]) + len(probes["zh"]["identity"])


def run(model_folder: Path, tmp_path: Path, learning_rate: float, steps: int) -> TrainResult:
    chats = write_chats(tmp_path / "chats.jsonl")
    recipe = tiny_recipe(
        model_folder,
        chats,
        train={"max_steps": steps, "learning_rate": learning_rate},
        evaluate={"identity": "小图", "identity_language": "zh", "prompts": []},
    )
    said: list[str] = []
    result = train(recipe, tmp_path / "w", say=said.append)
    assert any(line.startswith("identity rate") and "小图" in line for line in said)
    assert any(line.startswith("retention:") and "KL" in line for line in said)
    return result


@pytest.mark.slow
@pytest.mark.usefixtures("own_home")
def test_an_unchanged_model_has_not_diverged_and_a_trained_one_has(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    still = run(model_folder, tmp_path / "a", 1e-12, 1)
    moved = run(model_folder, tmp_path / "b", 1e-2, 6)
    assert still.probes["retention_kl"] == pytest.approx(0, abs=1e-9)
    assert moved.probes["retention_kl"] > 1e-3
    for result in (still, moved):
        assert set(result.probes) == {"identity_rate", "clean_rate", "retention_kl"}
        last = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        assert last == {"step": result.steps, **result.probes}
        saved = json.loads((result.run_dir / "identity.json").read_text(encoding="utf-8"))
        assert saved["name"] == "小图"
        assert len(saved["answers"]) == 40
    assert still.probes["identity_rate"] == 0, "a random model does not know the name"
    assert still.probes["clean_rate"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("own_home")
def test_a_resumed_run_has_no_untuned_model_to_compare_with(model_folder: Path, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    recipe = tiny_recipe(model_folder, chats, train={"max_steps": 1}, evaluate={"identity": "Ada", "prompts": []})
    train(recipe, tmp_path / "w", say=lambda line: None)
    recipe.train.max_steps = 2
    result = train(recipe, tmp_path / "w", resume="auto", say=lambda line: None)
    assert result.probes["retention_kl"] is None
    assert 0 <= result.probes["identity_rate"] <= 1
