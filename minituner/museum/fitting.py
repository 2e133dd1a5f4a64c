"""Which recipes a fault can happen in: asked before anything is spent.

    mean-of-means      needs more than one micro-batch in a step
    packed-leak        needs more than one document in a row, kept apart

Lesson: notebook 03.
"""

from __future__ import annotations

from minituner.errors import UsageError
from minituner.museum.catalog import Fault
from minituner.recipe import Recipe

ENCODED = ("double-bos", "pad-as-eos", "mask-everything", "mask-nothing")  # put in where documents are encoded


def fitting(fault: Fault, recipe: Recipe) -> Recipe:
    """A copy of the recipe with which the fault can be shown; its name says so.

    Raises:
        UsageError: the fault cannot happen in this recipe; names the setting.
    """
    data, train, distributed = recipe.data, recipe.train, recipe.distributed
    neighbours = data.packing != "none" or train.per_device_batch_size > 1
    checks = {
        "mean-of-means": (
            train.gradient_accumulation_steps > 1,
            "a step has one micro-batch, so there is one mean",
            "train.gradient_accumulation_steps=4",
        ),
        "packed-leak": (
            neighbours and data.isolate_documents and distributed.sequence_parallel_size == 1,
            "no document has a neighbour that it is kept apart from",
            "data.packing=best_fit data.isolate_documents=true distributed.sequence_parallel_size=1",
        ),
        "merge-into-4bit": (
            recipe.method.name == "qlora" and distributed.zero is None,
            "there is no base in 4 bits to merge into (or it is cut into pieces)",
            "method.name=qlora distributed.zero=null",
        ),
        "pad-as-eos": (
            data.loss_on != "all" or data.bos_policy == "xtuner",
            "plain text (loss_on=all) has no answers that end",
            "data.loss_on=assistant",
        ),
    }
    possible, why, change = checks.get(fault.name, (True, "", ""))
    if not possible:
        raise UsageError(f"{fault.name} cannot happen in recipe {recipe.name}", why=why, fix=change)
    copy = recipe.model_copy(deep=True)
    ending = f"_injected_{fault.name}"
    copy.name = recipe.name if recipe.name.endswith(ending) else f"{recipe.name}{ending}"
    if fault.name in ENCODED:
        # Worker processes are fresh interpreters without the fault; and what is in the cache was not encoded now.
        copy.data.num_proc, copy.data.cache = 1, False
    return copy
