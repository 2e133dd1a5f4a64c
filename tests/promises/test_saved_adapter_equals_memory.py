"""Adapter saved, loaded on the original base == in memory (1e-5), for every method, by peft alone.

`hf/` must be right on the base that everybody can load. PiSSA and OLoRA train over a base that lost a part, which
exists nowhere else, so what is saved is converted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minituner.export.merge import merge
from minituner.model.loading import load_model
from minituner.recipe import MethodSection, ModelSection
from minituner.train.loop import train
from tests.promises.common import TOLERANCE
from tests.tiny import tiny_folder, tiny_recipe, tiny_tokenizer

pytestmark = [
    pytest.mark.usefixtures("own_home"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]

IDS = torch.tensor([tiny_tokenizer().encode("Who are you? 你好，请介绍你自己。")])
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "pattern": {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa, dora": {"init_lora_weights": "pissa", "use_dora": True},
    "olora, rslora, dora": {"init_lora_weights": "olora", "use_rslora": True, "use_dora": True},
    "embedding in full": {"modules_to_save": ["embed_tokens"]},
    "head in full": {"modules_to_save": ["lm_head"]},
    "pissa, embedding and head in full": {"init_lora_weights": "pissa", "modules_to_save": ["embed_tokens", "lm_head"]},
    "norms in full": {"modules_to_save": ["input_layernorm"]},
    "qlora": {"name": "qlora"},
    "qlora, rslora, dora": {"name": "qlora", "use_rslora": True, "use_dora": True},
    "qlora, embedding in full": {"name": "qlora", "modules_to_save": ["embed_tokens"]},
    "int8_lora": {"name": "int8_lora"},
}


def base_of(folder: Path, method: str) -> Any:
    section = ModelSection(name_or_path=str(folder), dtype="float32", attention="sdpa")
    return load_model(folder, section, MethodSection(name=method), one_document_rows=True, device="cpu")[0]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS.keys())
def test_what_is_saved_is_what_was_trained(settings: dict[str, Any], tie: bool, chats: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = tiny_folder(tmp_path / "base", tie=tie)
    recipe = tiny_recipe(folder, chats, method=settings, train={"max_steps": 3})
    result = train(recipe, tmp_path / "w", say=lambda line: None)
    assert result.metrics[-1]["loss"] < result.metrics[0]["loss"]
    result.model.set_attn_implementation("sdpa")
    trained = logits(result.model)
    base = base_of(folder, recipe.method.name)
    before = logits(base)
    loaded = PeftModel.from_pretrained(base, result.hf)
    scale = float(trained.abs().max())
    assert float((trained - before).abs().max()) > 1e-2 * scale, "it learned something"
    assert torch.allclose(logits(loaded), trained, rtol=0, atol=TOLERANCE * scale)
    parts = loaded.get_base_model()
    embedding, head = (_trained(part) for part in (parts.get_input_embeddings(), parts.get_output_embeddings()))
    assert torch.equal(embedding, head) == tie, "what was one tensor is still one"


def _trained(module: Any) -> torch.Tensor:
    return module.modules_to_save["default"].weight if hasattr(module, "modules_to_save") else module.weight


@pytest.mark.parametrize("settings", [METHODS["pissa"], METHODS["olora, rslora, dora"]], ids=["pissa", "olora"])
def test_a_moved_start_is_saved_as_a_plain_lora_of_twice_the_rank(
    settings: dict[str, Any], model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    """So a reader that knows nothing of it (vLLM, a merge by hand) is right as well."""
    recipe = tiny_recipe(model_folder, chats, method=settings, train={"max_steps": 3})
    result = train(recipe, tmp_path / "w", say=lambda line: None)
    config = json.loads((result.hf / "adapter_config.json").read_text())
    rank, alpha = recipe.method.lora_rank, recipe.method.lora_alpha
    assert (config["r"], config["init_lora_weights"]) == (2 * rank, True)
    scale = alpha / (rank**0.5 if recipe.method.use_rslora else rank)
    assert config["lora_alpha"] / (config["r"] ** (0.5 if config["use_rslora"] else 1)) == pytest.approx(scale)
    tensors = load_file(result.hf / "adapter_model.safetensors")
    layer = result.model.get_base_model().model.layers[0].mlp.up_proj
    original = base_of(model_folder, "lora").model.layers[0].mlp.up_proj.weight
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    by_hand = original + scale * tensors[name.format("B")] @ tensors[name.format("A")]
    assert not torch.allclose(layer.get_base_layer().weight, original, atol=1e-2), "the base in memory gave a part away"
    in_memory = layer.get_base_layer().weight + layer.get_delta_weight("default")
    if not recipe.method.use_dora:
        in_memory = layer.get_base_layer().weight + scale * layer.lora_B.default.weight @ layer.lora_A.default.weight
    assert torch.allclose(by_hand, in_memory, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_merged_it_is_still_the_same_and_tied(tie: bool, chats: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(tmp_path / "base", tie=tie)
    method = {"init_lora_weights": "pissa", "modules_to_save": ["embed_tokens", "lm_head"]}
    result = train(
        tiny_recipe(folder, chats, method=method, train={"max_steps": 3}), tmp_path / "w", say=lambda line: None
    )
    result.model.set_attn_implementation("sdpa")
    merged = AutoModelForCausalLM.from_pretrained(merge(result.hf, tmp_path / "merged", say=lambda line: None))
    trained = logits(result.model)
    assert torch.allclose(logits(merged), trained, rtol=0, atol=TOLERANCE * float(trained.abs().max()))
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tie
