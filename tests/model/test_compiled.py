"""Regional torch.compile == eager (1e-5), the same files, and a machine without a compiler says so and trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from minituner.model import compiled
from minituner.model.adapters import apply_method
from minituner.model.compiled import compile_regions, feed_forward_blocks
from minituner.recipe import MethodSection
from minituner.train.loop import train
from tests.promises.common import TOLERANCE, gradients, largest_difference
from tests.tiny import tiny_model, tiny_recipe

pytestmark = pytest.mark.usefixtures("own_home")
needs_compiler = pytest.mark.skipif(compiled._missing_compiler("cpu") is not None, reason="no C++ compiler here")


def test_the_feed_forward_blocks_are_found_with_and_without_adapters() -> None:
    model = tiny_model()
    blocks = [layer.mlp for layer in model.model.layers]
    assert feed_forward_blocks(model) == blocks
    assert feed_forward_blocks(apply_method(model, MethodSection())) == blocks


def test_experts_are_left_alone() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=259, num_key_value_heads=2, num_local_experts=2, **sizes))
    assert feed_forward_blocks(model) == []
    assert "no feed-forward blocks were found" in compile_regions(model, "cpu")


@needs_compiler
@pytest.mark.slow
def test_compiled_equals_eager_and_is_compiled_once_for_all_layers_and_lengths() -> None:
    from torch._dynamo.utils import counters

    models: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(apply_method(tiny_model(layers=3), MethodSection(lora_rank=4)).train())
    eager, fast = models
    names = set(fast.state_dict())
    counters.clear()
    assert compile_regions(fast, "cpu").startswith("train.compile: 3 feed-forward blocks")
    for length in (10, 33, 7, 64):
        for model in models:
            model.zero_grad()
            loss = model(input_ids=torch.arange(length)[None], use_cache=False).logits.logsumexp(-1).sum()
            loss.backward()
        assert largest_difference(gradients(fast), gradients(eager)) <= TOLERANCE
    assert counters["stats"]["unique_graphs"] == 1
    assert set(fast.state_dict()) == names, "no _orig_mod in any name"


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_resumes_answers_and_writes_the_same_files(
    model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    import shutil

    runs = {}
    for on in (False, True):
        settings = {"compile": on, "max_steps": 4}
        recipe = tiny_recipe(model_folder, chats, train=settings, save={"every_steps": 2, "keep_last": 5})
        said: list[str] = []
        runs[on] = train(recipe, tmp_path / str(on), say=said.append)
        assert any("feed-forward blocks; the first step waits" in line for line in said) == on
    eager, fast = runs[False], runs[True]
    assert [m["loss"] for m in fast.metrics] == pytest.approx([m["loss"] for m in eager.metrics], rel=TOLERANCE)
    assert fast.answers.keys() == eager.answers.keys()
    for file in ("hf/adapter_model.safetensors", "checkpoints/step-000004/model.safetensors"):
        with safe_open(fast.work_dir / file, "pt") as one, safe_open(eager.work_dir / file, "pt") as other:
            assert list(one.keys()) == list(other.keys())
            for key in one.keys():  # noqa: SIM118
                assert torch.allclose(one.get_tensor(key), other.get_tensor(key), rtol=0, atol=1e-4), key
    shutil.rmtree(fast.checkpoint)
    (fast.work_dir / "latest").write_text("step-000002\n")
    again = train(recipe, fast.work_dir, resume="auto", say=lambda line: None)
    assert [m["loss"] for m in again.metrics] == pytest.approx([m["loss"] for m in fast.metrics[2:]], rel=TOLERANCE)


def test_without_a_compiler_it_trains_uncompiled_and_says_what_was_lost(
    model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    said: list[str] = []
    recipe = tiny_recipe(model_folder, chats, train={"compile": True, "max_steps": 2})
    result = train(recipe, tmp_path / "w", say=said.append)
    assert result.steps == 2
    (line,) = [line for line in said if line.startswith("train.compile")]
    assert "no C++ compiler" in line
    assert "the same results and no speed-up" in line
    assert all(module._compiled_call_impl is None for module in result.model.modules())
