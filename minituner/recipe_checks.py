"""Settings that are right one by one and wrong together, all found at once, each with what to change.

    model.attention=sdpa with data.packing=best_fit      packed documents would see each other
    method.name=qlora with distributed.zero=zero3        4-bit weights cannot be cut into pieces

What depends on the machine (packages, ranks, the model's own length) is checked where it is known, at the start of a
run, before anything is loaded. Lesson: notebook 08.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minituner.recipe import Recipe

ONE_MASK = ("sdpa", "eager")
NEEDS_HALF = ("flash_attention_2", "flash_attention_3", "varlen")
REWRITES_BASE = ("pissa", "olora", "orthogonal")


def contradictions(recipe: Recipe) -> list[str]:
    """One line for each pair of settings that cannot be together: what, why, and the change."""
    found = []
    model, method, data, train, distributed = (
        recipe.model,
        recipe.method,
        recipe.data,
        recipe.train,
        recipe.distributed,
    )
    several = data.packing != "none" or train.per_device_batch_size > 1
    if model.attention in ONE_MASK and several:
        how = f"data.packing={data.packing}" if data.packing != "none" else "several records in a micro-batch"
        found.append(
            f"model.attention={model.attention} with {how}: documents in one row would see each other;"
            " take model.attention=auto, or data.packing=none with train.per_device_batch_size=1"
        )
    if model.attention in NEEDS_HALF and model.dtype == "float32":
        found.append(
            f"model.attention={model.attention} with model.dtype=float32: its kernels compute in 16 bits;"
            " take model.dtype=bfloat16, or model.attention=auto"
        )
    if model.attention in ONE_MASK and distributed.sequence_parallel_size > 1:
        found.append(
            f"model.attention={model.attention} with distributed.sequence_parallel_size="
            f"{distributed.sequence_parallel_size}: shared rows are padded, and it has one mask for a row;"
            " take model.attention=auto"
        )
    quantised = method.name in ("qlora", "int8_lora")
    zero = (distributed.zero or "").removeprefix("deepspeed_")
    if quantised and zero.startswith("zero3"):
        found.append(
            f"method.name={method.name} with distributed.zero={distributed.zero}: packed integers cannot be cut into"
            " pieces; take distributed.zero=zero2, or method.name=lora"
        )
    if method.use_dora and method.name != "full" and zero.startswith("zero3"):
        found.append(
            "method.use_dora with distributed.zero=zero3: DoRA reads whole weights when it starts;"
            " take distributed.zero=zero2, or method.use_dora=false"
        )
    if quantised and method.init_lora_weights in REWRITES_BASE:
        found.append(
            f"method.init_lora_weights={method.init_lora_weights} with method.name={method.name}: it rewrites the base,"
            " which is quantised; take method.init_lora_weights=true, or method.name=lora"
        )
    if train.optimizer == "adamw_8bit" and distributed.zero:
        found.append(
            f"train.optimizer=adamw_8bit with distributed.zero={distributed.zero}: its states cannot be cut into"
            " pieces; take train.optimizer=adamw, whose states are cut, or distributed.zero=null"
        )
    return found
