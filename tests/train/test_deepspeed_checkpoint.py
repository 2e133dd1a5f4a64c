"""Checkpoints that DeepSpeed wrote: nothing in them is opened without trust; with it, the weights come out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minituner.errors import UsageError
from minituner.train.deepspeed_checkpoint import convert_deepspeed_checkpoint, read_deepspeed_checkpoint
from tests.tiny import tiny_model, tiny_recipe
from tests.train.processes import run_command

pytest.importorskip("deepspeed")


class _Malicious:
    """Unpickling it makes a folder named `ran`, beside where the process runs."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A run's folder whose only piece runs code when it is read."""
    place = tmp_path / "evil" / "global_step1"
    place.mkdir(parents=True)
    (tmp_path / "evil" / "latest").write_text("global_step1")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"x": _Malicious()}, place / name)
    return tmp_path / "evil"


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["", "global_step1"])
def test_without_trust_nothing_is_executed(inner: str, evil: Path, tmp_path: Path) -> None:
    status, output = run_command(["convert", "deepspeed", str(evil / inner), "out"], tmp_path)
    assert status == 2
    assert "pickles, which can run any code" in output
    assert "--trust-checkpoint" in output
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_is_refused_would_have_run(evil: Path, tmp_path: Path) -> None:
    status, _ = run_command(["convert", "deepspeed", str(evil), "out", "--trust-checkpoint"], tmp_path)
    assert status == 1
    assert (tmp_path / "ran").exists(), "the refusal above is not for nothing"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_trusted_one_becomes_safetensors(stage: str, tmp_path: Path) -> None:
    from minituner.train.deepspeed_engine import DeepSpeedEngine

    recipe = tiny_recipe(tmp_path / "m", tmp_path / "d.jsonl", distributed={"zero": stage}, method={"name": "full"})
    engine = DeepSpeedEngine(recipe, "cpu")
    engine.prepare(tiny_model(tie=False))
    try:
        engine.backward(engine.model(input_ids=torch.arange(12)[None]).logits.logsumexp(-1).sum())
        engine.step(1e-2)
        engine.engine.save_checkpoint(str(tmp_path / "run"), tag="iter_1.pth")
        expected = engine.weights()
    finally:
        engine.close()
    status, output = run_command(["convert", "deepspeed", "run", "out", "--trust-checkpoint"], tmp_path)
    assert status == 0, output
    assert output.splitlines()[-1] == "out"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    read = read_deepspeed_checkpoint(tmp_path / "run" / "iter_1.pth", trust=True)
    assert torch.equal(read["lm_head.weight"], expected["lm_head.weight"])
    with pytest.raises(UsageError, match="exists"):
        convert_deepspeed_checkpoint(tmp_path / "run", tmp_path / "out", trust=True)


def test_a_folder_without_pieces_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no DeepSpeed checkpoint"):
        read_deepspeed_checkpoint(tmp_path, trust=True)
