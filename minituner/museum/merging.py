"""The fault after a good training: an adapter merged into 4-bit weights, which round it away.

    trained     Wq + (lora_alpha / lora_rank) B @ A      Wq lies on 16 levels, the sum does not
    merged      round(Wq + ...)                          back onto 16 levels: a change below half a gap is lost

peft does this when `merge_and_unload` is called on a model that is loaded in 4 bits, with a one-line warning. Here the
trained run's own model is merged so, into `merged_into_4bit/` beside its `hf/`. Lesson: notebook 09.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minituner.errors import MinitunerError, UsageError
from minituner.museum.injection import Injection, part, replaced
from minituner.museum.seen import Seen
from minituner.recipe import Recipe

FOLDER = "merged_into_4bit"


@contextmanager
def merge_into_4bit(injection: Injection) -> Iterator[None]:
    """Within: a finished QLoRA run also leaves its adapter merged into the 4-bit base, as a full model."""
    loop = part("train.loop")
    export = loop.export

    def export_and_merge(model: Any, tokenizer: Any, folder: Path, recipe: Recipe, *rest: Any) -> Path:
        adapter = export(model, tokenizer, folder, recipe, *rest)
        _refuse_stored_quantised(injection, model, adapter)
        merged = folder.parent / FOLDER
        merge_rounded(model, tokenizer, merged, adapter)
        injection.acted += 1
        _refuse_divergence(injection, recipe, tokenizer, adapter, merged)
        injection.say(f"{merged}: the adapter merged into the 4-bit base, wrong on purpose")
        return adapter

    with replaced(loop, export=export_and_merge):
        yield


def merge_rounded(model: Any, tokenizer: Any, folder: Path, adapter: Path) -> None:
    """peft's own merge into a 4-bit base, written with each weight made whole again, (its values are still 16 levels).

    Raises:
        UsageError: the model is not over a 4-bit base.
    """
    import bitsandbytes as bnb

    from minituner.export.beside import write_beside
    from minituner.model.loading import quiet
    from minituner.train.hf_folder import facts_of

    if not any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()):
        raise UsageError("merge-into-4bit needs a base in 4 bits", fix="method.name=qlora")
    with warnings.catch_warnings(), quiet():
        warnings.filterwarnings("ignore", message=".*4-bit linear may get different generations.*")
        merged = copy.deepcopy(model).merge_and_unload().dequantize()
        merged.config.use_cache = True
        merged.save_pretrained(folder)
    facts = facts_of(adapter) | {"merged": {"base": "4 bits, rounded again"}}
    write_beside(folder, tokenizer, facts, full=True)


def _refuse_stored_quantised(injection: Injection, model: Any, adapter: Path) -> None:
    """Ask `convert merge` to merge into the base as it is in memory: stored in 4 bits."""
    from minituner.export.merge import merge

    with tempfile.TemporaryDirectory() as place:
        stored = Path(place) / "base-in-4-bits"
        stored.mkdir()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.config.save_pretrained(stored)  # merge reads this first, and no further
        try:
            merge(adapter, Path(place) / "out", base=stored, say=lambda line: None)
        except MinitunerError as refusal:
            injection.refused("minituner convert merge", refusal)


def _refuse_divergence(injection: Injection, recipe: Recipe, tokenizer: Any, adapter: Path, merged: Path) -> None:
    """Show the merged folder to the measurement that `convert merge` makes of its own results."""
    found = divergence(recipe, tokenizer, adapter, merged)
    injection.say(found.says)
    if isinstance(refusal := found.facts["refusal"], MinitunerError):
        injection.refused("the KL measurement of minituner convert merge", refusal)


def divergence(recipe: Recipe, tokenizer: Any, adapter: Path, merged: Path) -> Seen:
    """What `convert merge` measures and says of a merged folder, and whether it would refuse it."""
    from minituner.export.merge import check_divergence
    from minituner.model.loading import resolve_dtype
    from minituner.model.sources import fetch
    from minituner.train.hf_folder import facts_of

    facts = facts_of(adapter)
    facts["dtype"] = str(resolve_dtype(str(facts.get("dtype") or "auto"), "cpu")[0]).removeprefix("torch.")
    model = recipe.model
    base = fetch(model.name_or_path, source=model.source, revision=model.revision, say=lambda line: None)
    said: list[str] = []
    values: dict[str, Any] = {"refusal": None}
    try:
        values |= check_divergence(
            base, adapter, merged, facts, tokenizer, "full", False, said.append, model.trust_remote_code
        )
    except MinitunerError as refusal:
        values["refusal"] = refusal
    return Seen(values["refusal"] is None, next(line for line in said if line.startswith("KL(")), values)


def see_merge_into_4bit(recipe: Recipe, scratch: Path) -> Seen:
    """`minituner convert merge`'s own measurement: of a good merge, or of what the fault has left.

    Raises:
        UsageError: the recipe is not a QLoRA.
    """
    from minituner.export.merge import merge
    from minituner.model.loading import load_tokenizer
    from minituner.train.loop import train

    if recipe.method.name != "qlora":
        raise UsageError("merge-into-4bit needs a base in 4 bits", fix="method.name=qlora")
    silent = {"say": lambda line: None}
    result = train(recipe, scratch / "run", progress=False, **silent)
    merged = scratch / "run" / FOLDER
    if not merged.is_dir():  # a clean run leaves only its adapter
        merged = merge(result.hf, scratch / "merged", into="dequantized", **silent)
    found = divergence(recipe, load_tokenizer(result.hf), result.hf, merged)
    facts = json.loads((merged / "minituner.json").read_text(encoding="utf-8"))["merged"]
    return Seen(found.passes, f"merged into {facts['base']}: {found.says}", {**found.facts, **facts})
