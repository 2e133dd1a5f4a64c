"""Choosing what is trained: mistakes are answered with the model's real names, before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minituner.errors import UsageError
from minituner.model.adapters import apply_method, count_parameters, saves_a_tied_weight, trainable_parameters
from minituner.recipe import MethodSection
from tests.tiny import tiny_model

LINEAR = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"

# target_modules -> what the message says about them, and what it proposes
WRONG_TARGETS: list[tuple[str | list[str], str, str]] = [
    (["q_projj"], "'q_projj' match no linear layer", "did you mean 'q_proj'?"),
    (["q_proj", "nope", "w1"], "'nope', 'w1' match no linear layer", "all-linear"),
    ([], "the list is empty", "all-linear"),
    (r".*\.wq", "match no linear layer", "all-linear"),
    (r".*(q_proj", "is not a regular expression", "a list of names"),
    ("q_proj", "match no linear layer", ""),  # one text is a pattern for the whole name
    (["mlp"], "'mlp' matches model.layers.0.mlp, which is no linear layer (LlamaMLP)", "down_proj, gate_proj, up_proj"),
    (["embed_tokens"], "no linear layer (Embedding)", "method.modules_to_save"),
    (["input_layernorm"], "no linear layer (LlamaRMSNorm)", "method.modules_to_save"),
    (r".*self_attn.*", "no linear layer (LlamaAttention)", "k_proj, o_proj, q_proj, v_proj"),
]


@pytest.mark.parametrize(("targets", "says", "proposes"), WRONG_TARGETS)
def test_wrong_target_modules_are_answered_with_the_real_names(
    targets: str | list[str], says: str, proposes: str
) -> None:
    model = tiny_model()
    with pytest.raises(UsageError) as caught:
        apply_method(model, MethodSection(target_modules=targets))
    assert says in caught.value.what
    assert proposes in caught.value.fix
    if "match" in says:
        assert LINEAR in caught.value.why
    assert not any("lora" in name for name, _ in model.named_parameters()), "nothing was changed"
    assert all(p.requires_grad for p in model.parameters())


RIGHT_TARGETS: list[tuple[str | list[str], int, str]] = [
    ("all-linear", 14, ""),
    (["q_proj", "v_proj"], 4, "self_attn"),
    (["self_attn.q_proj"], 2, "self_attn.q_proj"),
    (["model.layers.1.mlp.up_proj"], 1, "layers.1.mlp.up_proj"),
    (r".*layers\.0\..*(q|k)_proj", 2, "layers.0.self_attn"),
]


@pytest.mark.parametrize(("targets", "count", "within"), RIGHT_TARGETS)
def test_list_pattern_and_all_linear_reach_the_layers_they_name(
    targets: str | list[str], count: int, within: str
) -> None:
    model = apply_method(tiny_model(), MethodSection(target_modules=targets, lora_rank=2))
    trained = trainable_parameters(model)
    assert len(trained) == 2 * count
    assert all("lora_" in name and within in name for name in trained)
    assert not any("lm_head" in name for name in trained), "all-linear leaves the head out"


@pytest.mark.parametrize("tie", [True, False])
def test_full_trains_everything_and_lora_only_its_own(tie: bool) -> None:
    full = apply_method(tiny_model(tie=tie), MethodSection(name="full"))
    trained, total = count_parameters(full)
    assert trained == total == sum(p.numel() for p in tiny_model(tie=tie).parameters())
    trained, total_with = count_parameters(apply_method(tiny_model(tie=tie), MethodSection(lora_rank=4)))
    assert trained == 2 * 4 * (2 * 32 + 2 * (32 + 16) + 2 * 32 + 3 * (32 + 64))
    assert total_with == total + trained


def test_modules_to_save_that_do_not_exist_are_refused() -> None:
    """peft passes over them in silence, and the run trains less than its recipe says."""
    with pytest.raises(UsageError, match="'embed_token' matches no module") as caught:
        apply_method(tiny_model(), MethodSection(modules_to_save=["embed_token"]))
    assert "did you mean 'embed_tokens'?" in caught.value.fix
    assert "lm_head" in caught.value.why


TIED: dict[str, tuple[list[str] | None, bool]] = {
    "nothing": (None, False),
    "embedding": (["embed_tokens"], True),
    "head": (["lm_head"], True),
    "both": (["embed_tokens", "lm_head"], True),
    "by the whole name": (["model.embed_tokens"], True),
    "another": (["input_layernorm"], False),
}


@pytest.mark.parametrize(("modules", "saves"), TIED.values(), ids=TIED.keys())
def test_a_tied_weight_is_trained_once_for_both_of_its_places(modules: list[str] | None, saves: bool) -> None:
    assert saves_a_tied_weight(tiny_model(tie=True), modules) == saves
    assert not saves_a_tied_weight(tiny_model(tie=False), modules)
    model = apply_method(tiny_model(tie=True), MethodSection(modules_to_save=modules, target_modules=["q_proj"]))
    vocabulary = [p for p in trainable_parameters(model).values() if p.shape[0] == 259]
    assert len(vocabulary) == saves
    if not saves:
        return
    ids = torch.arange(20)[None]
    model(input_ids=ids).logits.square().sum().backward()
    with torch.no_grad():
        vocabulary[0] -= 0.1 * vocabulary[0].grad.sign()
    base = model.get_base_model()
    embedding = base.get_input_embeddings().modules_to_save["default"].weight
    assert base.get_output_embeddings().modules_to_save["default"].weight is embedding


WRONG_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "pissa on 4 bits": ({"name": "qlora", "init_lora_weights": "pissa"}, "pissa with method.name=qlora"),
    "olora on 8 bits": ({"name": "int8_lora", "init_lora_weights": "olora"}, "olora with method.name=int8_lora"),
    "orthogonal on 4 bits": ({"name": "qlora", "init_lora_weights": "orthogonal"}, "orthogonal with"),
    "pissa, rank above the matrix": ({"init_lora_weights": "pissa", "lora_rank": 17}, "lora_rank=17 is more than"),
    "orthogonal, odd rank": ({"init_lora_weights": "orthogonal", "lora_rank": 5}, "even lora_rank, not 5"),
}


@pytest.mark.parametrize(("settings", "says"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS.keys())
def test_settings_that_do_not_go_together_say_why(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        apply_method(tiny_model(), MethodSection(**settings))
    assert says in caught.value.what
    assert caught.value.why
    assert "method." in caught.value.fix


def test_gpt2_s_transposed_layers_are_linear_layers_too() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    model = apply_method(model, MethodSection(target_modules=["c_attn"], lora_rank=2))
    assert len(trainable_parameters(model)) == 4
