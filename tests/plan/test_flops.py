"""FLOPs on paper == FLOPs that torch counts while the model computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from minituner.data.collate import Batch, collate
from minituner.model.adapters import ON_ATTENTION, apply_method
from minituner.model.loss import loss_sum
from minituner.plan.flops import causal_pairs, compute_dtype, gemm_rate, model_flops
from minituner.recipe import MethodSection
from tests.catalog.test_native_architectures import tiny
from tests.tiny import tiny_model

LENGTH, SUPERVISED = 24, 7
PAIRS = causal_pairs([LENGTH])


def batch_of() -> Batch:
    ids = np.arange(LENGTH, dtype=np.int64)
    labels = np.where(np.arange(LENGTH) > LENGTH - 1 - SUPERVISED, ids, -100)
    return collate([[(ids, labels)]])


def counted(model: Any) -> tuple[float, float]:
    """(operations with weights, operations of attention) that torch counts in one forward and backward pass."""
    model.train()
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter:
        loss_sum(model, batch_of(), "eager").backward()
    counts = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for name, n in counts.items() if "bmm" in name)
    return sum(counts.values()) - attention, attention


# Settings, and how many of attention's four backward products the lowest adapted layer could do without.
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "full": ({"name": "full"}, 0),
    "lora everywhere": ({}, 0),
    "lora on values": ({"target_modules": ["v_proj"]}, 3),
    "lora on the mlp": ({"target_modules": ["down_proj"]}, 0),
    "lora in the last layer": ({"target_modules": r"model\.layers\.2\.self_attn\.(q|o)_proj"}, 2),
    "the head too": ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, 2),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "recomputing"])
@pytest.mark.parametrize(("settings", "spared"), METHODS.values(), ids=METHODS.keys())
def test_the_count_is_what_torch_counts(settings: dict[str, Any], spared: int, checkpointing: bool) -> None:
    method = MethodSection(**{"lora_rank": 4, **settings})
    model = apply_method(tiny_model(layers=3, tie=False), method, activation_checkpointing=checkpointing)
    to_embedding = checkpointing and method.name != "full"
    ours = model_flops(model, flows_to_embedding=to_embedding)
    with set_checkpoint_early_stop(False):  # torch would spare the last product of each block
        weights, attention = counted(model)
    step = ours.of(LENGTH, SUPERVISED, PAIRS, recompute=checkpointing)
    # Eager attention computes the whole square, the upper half included, which a causal model never needs.
    of_attention = (ours.per_pair + ours.forward_per_pair * checkpointing) * PAIRS
    spared = 0 if to_embedding else spared * 2 * 32 * LENGTH**2
    rotary = 2 * 4 * LENGTH * (1 + checkpointing)  # angles of the positions: a tiny product without weights
    assert of_attention * LENGTH**2 / PAIRS == pytest.approx(attention + spared, abs=rotary)
    assert step - of_attention == pytest.approx(weights)


def test_the_formulas_that_people_know() -> None:
    """6 N with everything trained, 4 N + 6 P for adapters, 4 d V and 6 d V for the head."""
    model = tiny_model(tie=False)
    layers = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    head = model.lm_head.weight.numel()
    full = model_flops(apply_method(model, MethodSection(name="full")))
    assert (full.per_token, full.per_supervised) == (6 * layers, 6 * head)
    assert full.forward_per_token == 2 * layers
    assert full.per_pair == 3 * full.forward_per_pair == 3 * 4 * 32 * 2

    adapted = apply_method(tiny_model(tie=False), MethodSection(lora_rank=4))
    lora = model_flops(adapted, flows_to_embedding=True)
    added = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert (lora.per_token, lora.per_supervised) == (4 * layers + 6 * added, 4 * head)
    stops = model_flops(adapted)
    entry = sum(p.numel() for n, p in adapted.named_parameters() if "layers.0.self_attn" in n and _reads_input(n))
    assert lora.per_token - stops.per_token == 2 * entry, "nothing flows back below the lowest adapter"


def _reads_input(name: str) -> bool:
    return any(part in name for part in ("q_proj", "k_proj", "v_proj")) and "lora_B" not in name


def test_tied_weights_are_a_head_too() -> None:
    tied, untied = (model_flops(apply_method(tiny_model(tie=t), MethodSection(name="full"))) for t in (True, False))
    assert tied == untied


def test_documents_do_not_attend_to_each_other() -> None:
    flops = model_flops(apply_method(tiny_model(), MethodSection()))
    one, two = (flops.of(40, 5, causal_pairs(lengths)) for lengths in ([40], [20, 20]))
    assert one - two == flops.per_pair * 20 * 20


def test_it_counts_a_model_that_has_no_memory() -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_model().config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert model_flops(empty) == model_flops(tiny_model())


def test_a_token_visits_few_experts() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    def mixture(experts: int, active: int) -> Any:
        config = MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=experts,
            num_experts_per_tok=active,
        )
        with torch.device("meta"):
            return model_flops(MixtralForCausalLM(config))

    one, two = mixture(4, 1), mixture(4, 2)
    assert two.per_token - one.per_token == 6 * 3 * 16 * 32, "three matrices more"
    router = 6 * 16 * 4  # the router grows with the number of experts, the work of the experts does not
    assert mixture(8, 1).per_token - one.per_token == router


MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "minicpm3"]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_and_latent_attention_are_what_torch_counts(architecture: str, method: str) -> None:
    """Stacked experts, of which a token visits some, their router, and queries that are wider than values."""
    model = tiny(architecture)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # one product for each expert, which torch's counter knows
    section = MethodSection(name=method, lora_rank=4, target_modules=ON_ATTENTION)
    model = apply_method(model, section)
    ours = model_flops(model)
    weights, attention = counted(model)
    of_attention = ours.per_pair * PAIRS
    assert of_attention * LENGTH**2 / PAIRS == pytest.approx(attention, rel=0.01)
    assert ours.of(LENGTH, SUPERVISED, PAIRS) - of_attention == pytest.approx(weights, rel=1e-6)


def test_adapted_experts_cost_their_gradient_and_the_adapters_on_them_nothing_a_token() -> None:
    """peft adds B A to the stack once a step, and computes the gradient of all its weights on the way to A and B."""
    sections = {"attention": ON_ATTENTION, "experts too": "all-linear"}
    attention, experts = (
        model_flops(apply_method(tiny("mixtral"), MethodSection(lora_rank=4, target_modules=targets))).per_token
        for targets in sections.values()
    )
    visited, router = 2 * 3 * 32 * 64, 32 * 4  # two of four experts with three matrices each
    assert experts - attention == 2 * 2 * (visited + router), "in two layers, 2 for each weight"


def test_the_machines_rate_is_measured_once_and_positive() -> None:
    assert compute_dtype(tiny_model()) == torch.float32
    rate = gemm_rate(torch.float32)
    assert rate > 1e8
    assert gemm_rate(torch.float32) == rate
