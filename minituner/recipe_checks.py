"""Settings that are right one by one and wrong together, all found at once, each with what to change.

    model.attention=sdpa with data.packing=best_fit      packed documents would see each other
    method.name=qlora with distributed.zero=zero3        4-bit weights cannot be cut into pieces

The number of ranks is checked with them where a command knows it (`train`, `estimate`), and the model's own length
where its config lies here or the catalog knows it. What only the machine or the data tell (packages, the longest
record) is checked at the start of a run, before anything is loaded. Lesson: notebook 08.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minituner.recipe import Recipe

ONE_MASK = ("sdpa", "eager")
NEEDS_HALF = ("flash_attention_2", "flash_attention_3", "varlen")
REWRITES_BASE = ("pissa", "olora", "orthogonal")


def contradictions(recipe: Recipe, world_size: int | None = None) -> list[str]:
    """One line for each pair of settings that cannot be together: what, why, and the change.

    Args:
        world_size: how many ranks there will be; None where nobody knows yet.
    """
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
    if model.attention == "varlen" and not several:
        found.append(
            "model.attention=varlen with data.packing=none: it keeps apart the documents of a row, and each row is one;"
            " take data.packing=best_fit, or model.attention=auto"
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
    shared = distributed.sequence_parallel_size
    if world_size is not None and world_size % shared:
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        found.append(
            f"distributed.sequence_parallel_size={shared}: {ranks} cannot be put into groups of {shared};"
            f" take distributed.sequence_parallel_size=1, or start a multiple of it (NPROC_PER_NODE={shared};"
            f" to estimate: --gpus {shared})"
        )
    runs_on = data.packing != "none" and not data.isolate_documents
    context = known_context(model.name_or_path) if runs_on else None
    if context is not None and data.max_length > context:
        found.append(
            f"data.max_length={data.max_length} with data.isolate_documents=false: positions run on through a pack, and"
            f" the model was made for {context}; take data.max_length={context}, or data.isolate_documents=true"
        )
    return found


def known_context(name_or_path: str) -> int | None:
    """How many positions a model was made for, by its folder's config.json or the catalog; None if neither says."""
    from minituner.catalog.lookup import find_model

    try:
        config = json.loads((Path(name_or_path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no folder; or a broken one, of which loading says what is wrong
        entry = find_model(name_or_path)
        return entry["context"] if entry else None
    length = config.get("max_position_embeddings") or config.get("n_positions") if isinstance(config, dict) else None
    return length if isinstance(length, int) else None
