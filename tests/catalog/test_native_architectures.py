"""Every architecture that the catalog calls native trains here: built tiny and random from its own config class, two
LoRA steps with finite losses, isolation proved, and its checkpoint reloads bit for bit."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from minituner.catalog.lookup import compose, load
from minituner.errors import UsageError
from minituner.model.adapters import apply_method
from minituner.recipe import MethodSection
from minituner.train import checkpoint
from minituner.train.loop import train
from tests.tiny import tiny_recipe, tiny_tokenizer

ARCHITECTURES = sorted({entry["architecture"] for entry in load("models").values() if entry["native"]})

SMALL: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 258,
    "attention_dropout": 0.0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
EXTRA: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2}
    | {"topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    "deepseek_v3": {**LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2}
    | {"topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gpt_bigcode": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 64, "n_positions": 512, "attn_pdrop": 0.0}
    | {"embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "minicpm3": {**LATENT, "head_dim": None},
    "mistral": {"sliding_window": 16},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "phi3": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
}


def tiny(architecture: str) -> Any:
    """A random model of the architecture, built from its own config class."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = CONFIG_MAPPING[architecture]
    wanted = {key: value for key, value in {**SMALL, **EXTRA.get(architecture, {})}.items() if value is not None}
    if architecture == "gpt_bigcode":  # its settings have other names
        wanted = {k: v for k, v in wanted.items() if k in EXTRA[architecture] or k.endswith(("_id", "vocab_size"))}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**wanted), dtype=torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_trains_two_steps_and_reloads(architecture: str, tmp_path: Path, chats: Path, own_home: Path) -> None:
    folder = tmp_path / "model"
    tiny(architecture).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    key = next(key for key, entry in load("models").items() if entry["architecture"] == architecture)
    # As a recipe of the catalog adapts it: its target modules, and the dropout of qlora.
    method = {**compose(f"{key}_qlora_alpaca_e3")["method"], "name": "lora", "lora_rank": 4}
    recipe = tiny_recipe(folder, chats, method=method, train={"max_steps": 2}, evaluate={"prompts": []})
    done = train(recipe, tmp_path / "run", progress=False, say=lambda line: None)
    assert [math.isfinite(row["loss"]) for row in done.metrics] == [True, True]
    assert all(row["grad_norm"] > 0 for row in done.metrics)
    saved = checkpoint.load(checkpoint.find(tmp_path / "run", "auto", print))
    held = {name: p for name, p in done.model.named_parameters() if p.requires_grad}
    assert set(saved.weights) == set(held)
    assert all(torch.equal(saved.weights[name], held[name]) for name in held)


def test_dropout_on_experts_is_a_message_that_names_what_to_change() -> None:
    """peft takes all-linear to mean the experts of a mixture too, and knows no dropout there."""
    with pytest.raises(UsageError) as caught:
        apply_method(tiny("mixtral"), MethodSection(lora_dropout=0.1))
    assert "method.lora_dropout=0" in caught.value.fix
    pattern = re.search(r"method\.target_modules='(.*)'", caught.value.fix)
    assert pattern
    mixtures = {entry["target_modules"] for entry in load("models").values() if "target_modules" in entry}
    assert mixtures == {pattern[1]}, "what the message proposes is what the catalog's recipes have"


def test_list_models_names_every_model_and_what_it_needs() -> None:
    from minituner.catalog import support

    rows = support.list_models()
    text = "\n".join(support.lines(rows))
    assert len(rows) == len(load("models"))
    assert all(row["key"] in text for row in rows)
    assert {row["trains"] == "natively" for row in rows} == {True, False}
    assert all(
        "trust_remote_code" in row["trains"] or "convert" in row["trains"].lower() for row in rows if not row["native"]
    )
    assert [row["family"] for row in support.list_models("smollm2")] == ["SmolLM2"] * len(
        support.list_models("smollm2")
    )
