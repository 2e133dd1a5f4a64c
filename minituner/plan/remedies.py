"""Remedies: what to change when a run does not fit, the cheapest first, each tried on paper.

    zero1, zero2      optimizer and gradients in pieces     only talk between ranks
    micro-batch / 2   accumulation x 2                      the same numbers, a little slower
    checkpointing     activations computed twice            about a third more time
    zero3, offload    weights in pieces, or elsewhere       much talk, much moving
    sequence parallel a row shared by ranks                 fewer rows at once
    lora, qlora       another method                        another model comes out
    max_length / 2    shorter rows                          long records are cut

Each is tried alone; when one fits, the rest need not be looked at. If none does, all that helped are tried together.
And the other way round: where rows are short and memory is left, more of them in a micro-batch (`fewer_passes`).
Lesson: notebook 08.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from minituner.model.adapters import ON_ATTENTION, QUANTIZED
from minituner.plan.memory import STAGES
from minituner.plan.workload import Row
from minituner.recipe import Recipe

if TYPE_CHECKING:
    from minituner.plan.estimate import Change, Plans

ENOUGH = 1024  # tokens: on a CPU a longer micro-batch is no faster, one of 512 is 10% slower (assets/benchmarks)


def remedies(plans: Plans, recipe: Recipe, row: Row, budget: float) -> tuple[Change, ...]:
    """The changes tried, in order of their cost, up to the first that needs no more than `budget` bytes."""
    from minituner.plan.estimate import Change

    before = _peak(plans, recipe, row)
    tried: list[Change] = []
    together: list[str] = []
    costs: list[str] = []
    for name, cost, overrides in _candidates(recipe, plans):
        size = _peak(plans, changed(recipe, overrides), resized(row, recipe, overrides))
        tried.append(Change(name, cost, tuple(overrides), size, size <= budget))
        if size <= budget:
            return tuple(tried)
        if size < before:
            together = [kept for kept in together if kept.split("=")[0] not in {o.split("=")[0] for o in overrides}]
            together += overrides
            costs.append(name)
    if len(costs) > 1:
        both = _compatible(recipe, together)
        size = _peak(plans, changed(recipe, both), resized(row, recipe, both))
        tried.append(Change("all that helps, together", "all of the above", tuple(both), size, size <= budget))
    return tuple(tried)


def fewer_passes(plans: Plans, recipe: Recipe, row: Row, budget: float) -> list[str]:
    """How to make the same steps in fewer, longer micro-batches, if rows are short and there is memory; on a CPU only.

    Each micro-batch reads all weights twice and starts every operation once, whatever is in it.
    """
    from minituner.plan.estimate_text import size

    train, factor = recipe.train, 1
    alone = recipe.data.packing != "none" and recipe.distributed.sequence_parallel_size == 1
    while train.gradient_accumulation_steps % (2 * factor) == 0 and 2 * factor * row.tokens <= ENOUGH:
        factor *= 2
    if factor == 1 or not alone or plans.device != "cpu":
        return []
    overrides = [
        f"train.per_device_batch_size={train.per_device_batch_size * factor}",
        f"train.gradient_accumulation_steps={train.gradient_accumulation_steps // factor}",
    ]
    peak = _peak(plans, changed(recipe, overrides), Row(row.seq_lens * factor, row.supervised * factor))
    if peak > budget:
        return []
    return [
        f"rows are short ({row.tokens:,} tokens at most): {' '.join(overrides)} makes the same steps of fewer, longer "
        f"micro-batches, a few percent faster or more, in {size(peak)} of memory"
    ]


def changed(recipe: Recipe, overrides: list[str]) -> Recipe:
    """The recipe with these settings."""
    return Recipe.from_values(recipe.model_dump(mode="json"), "plan", overrides)


def resized(row: Row, recipe: Recipe, overrides: list[str]) -> Row:
    """The fullest micro-batch under the new settings: fewer or shorter documents."""
    after = changed(recipe, overrides)
    share = after.train.per_device_batch_size / recipe.train.per_device_batch_size
    share *= min(1.0, after.data.max_length / recipe.data.max_length)
    if share >= 1:
        return row
    left, lengths = max(2, round(row.tokens * share)), []
    for length in row.seq_lens:
        if left > 0:
            lengths.append(min(length, left))
            left -= length
    return Row(tuple(lengths), max(1, round(row.supervised * share)))


def _candidates(recipe: Recipe, plans: Plans) -> Iterator[tuple[str, str, list[str]]]:
    train, method, zero, world_size = recipe.train, recipe.method.name, recipe.distributed.zero, plans.world_size
    sharded = STAGES.get(zero or "none", (3, False))[0]
    cuts = world_size > 1 and train.optimizer == "adamw"
    for stage in ("zero1", "zero2"):
        if cuts and sharded < STAGES[stage][0]:
            yield f"ZeRO-{STAGES[stage][0]}", "talk between ranks", [f"distributed.zero={stage}"]
    if train.per_device_batch_size > 1:
        half = train.per_device_batch_size // 2
        more = train.gradient_accumulation_steps * -(-train.per_device_batch_size // half)
        yield (
            "smaller micro-batch",
            "the same numbers, a little slower",
            [f"train.per_device_batch_size={half}", f"train.gradient_accumulation_steps={more}"],
        )
    if not train.activation_checkpointing:
        yield "activation checkpointing", "about a third more time", ["train.activation_checkpointing=true"]
    if method != "full" and recipe.method.target_modules == "all-linear" and plans.sizes(recipe).idle:
        name = "adapters on attention only"
        yield name, "a mixture's experts are not adapted", [f"method.target_modules={ON_ATTENTION}"]
    if cuts and sharded < 3 and method not in QUANTIZED and not recipe.method.use_dora:
        yield "ZeRO-3", "weights travel for every micro-batch", ["distributed.zero=zero3"]
    if cuts and zero != "zero2_offload" and sharded < 3:
        yield "ZeRO-2 with offload", "gradients and averages move to main memory", ["distributed.zero=zero2_offload"]
    if world_size % 2 == 0 and recipe.distributed.sequence_parallel_size == 1:
        overrides = ["distributed.sequence_parallel_size=2"]
        yield "sequence parallel", "half as many rows at once", overrides
    if method == "full":
        yield "LoRA", "another method: adapters only", ["method.name=lora"]
    if method in ("full", "lora", "int8_lora"):
        more = ["distributed.zero=zero2"] if sharded == 3 else []
        yield "QLoRA", "the frozen base in 4 bits", ["method.name=qlora", *more]
    if recipe.data.max_length >= 64:
        yield "half of max_length", "longer records are cut", [f"data.max_length={recipe.data.max_length // 2}"]


def _compatible(recipe: Recipe, overrides: list[str]) -> list[str]:
    """Without what contradicts the rest: a quantised base has no stage 3."""
    if any(o.removeprefix("method.name=") in QUANTIZED for o in overrides):
        overrides = ["distributed.zero=zero2" if o.startswith("distributed.zero=zero3") else o for o in overrides]
    return overrides


def _peak(plans: Plans, recipe: Recipe, row: Row) -> float:
    return sum(plans.parts(recipe, row, recipe.distributed.zero or "none").values())
