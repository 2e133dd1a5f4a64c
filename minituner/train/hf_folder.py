"""The `hf/` folder: an adapter or a full model, with tokenizer and chat template, for other programs to read.

Beside the usual files lies `minituner.json`: the base model, template and system text, so that `minituner chat` asks
the way training did. The tokenizer's chat template is the trained one, and README.md a model card (export/beside.py).
Lesson: notebook 09.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from minituner.errors import MinitunerError, UsageError
from minituner.export.beside import FACTS, training_facts, write_beside
from minituner.model.fingerprint import comparable, fingerprint
from minituner.model.loading import quiet
from minituner.model.quantized import import_bitsandbytes
from minituner.model.residual import save_as_plain_lora
from minituner.recipe import Recipe
from minituner.train.checkpoint import resume_command


def export(
    model: Any,
    tokenizer: Any,
    folder: Path,
    recipe: Recipe,
    base_fingerprint: str | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write the trained model (peft: the adapter only) into `folder`, aside first, and return it.

    Args:
        tensors: the state dict to write, for a model that holds only pieces of its parameters (ZeRO-3).

    Raises:
        MinitunerError: the disk is full or cannot be written; an earlier `folder` is untouched. Or a tensor is empty.
    """
    from safetensors import SafetensorError

    aside = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write(model, tokenizer, aside, recipe, base_fingerprint, tensors, folder.parent)
        _assert_whole(aside)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    except (OSError, SafetensorError) as error:
        raise MinitunerError(
            f"cannot write {folder}: {getattr(error, 'strerror', None) or error}",
            why="the training itself is complete, and its last checkpoint is saved",
            fix="make room, then resume: nothing is trained again, only this folder is written",
            next_command=resume_command(folder.parent),
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _write(
    model: Any,
    tokenizer: Any,
    aside: Path,
    recipe: Recipe,
    base_fingerprint: str | None,
    tensors: Mapping[str, torch.Tensor] | None,
    work_dir: Path,
) -> None:
    model.config.use_cache, before = True, model.config.use_cache  # off in training only; readers want their cache
    try:
        with quiet():
            model.save_pretrained(aside, **({"state_dict": dict(tensors)} if tensors is not None else {}))
        save_as_plain_lora(model, aside)
    finally:
        model.config.use_cache = before
    dtype = str(model.dtype).removeprefix("torch.")
    facts = facts_for(recipe, base_fingerprint, dtype, training_facts(work_dir, newest_checkpoint(work_dir)))
    write_beside(aside, tokenizer, facts, full=recipe.method.name == "full")


def facts_for(
    recipe: Recipe, base_fingerprint: str | None, dtype: str | None, training: Mapping[str, Any]
) -> dict[str, Any]:
    """What `minituner.json` says: how the model was trained and wants to be asked."""
    return {
        "recipe": recipe.name,
        "base": recipe.model.name_or_path,
        "base_fingerprint": base_fingerprint,
        "method": recipe.method.name,
        "template": recipe.data.template,
        "system": recipe.data.system,
        "dtype": dtype,
        "prompts": recipe.evaluate.prompts,
        "prompts_system": recipe.evaluate.system,
        "training": dict(training),
        "recipe_yaml": recipe.dump(),
    }


def newest_checkpoint(work_dir: Path) -> Path | None:
    """The checkpoint that a run's `latest` names, if there is one."""
    pointer = work_dir / "latest"
    return work_dir / "checkpoints" / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def _assert_whole(folder: Path) -> None:
    """Refuse a folder with an empty tensor in it: what is saved of a parameter whose values are on other ranks."""
    from safetensors import safe_open

    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if empty := [key for key in file.keys() if 0 in file.get_slice(key).get_shape()]:  # noqa: SIM118
                raise MinitunerError(f"{path.name} would have {len(empty)} empty tensors, {empty[0]} first")


def facts_of(folder: Path) -> dict[str, Any]:
    """What `export` wrote about a folder; empty for a folder from elsewhere."""
    file = folder / FACTS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def base_of(adapter: Path) -> str:
    """The base model of an adapter folder: the name training used, else peft's record of it.

    Raises:
        UsageError: neither is there.
    """
    if base := facts_of(adapter).get("base"):
        return base
    try:
        return json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{adapter} does not say which base model it belongs to: {error}", fix="name it") from None


def put_adapter_on(
    model: Any,
    adapter: Path,
    say: Callable[[str], None],
    *,
    name: str = "default",
    base_fingerprint: str | None = None,
    other_base: bool = False,
) -> Any:
    """`model` with the adapter of a folder on it, every tensor of it in its place.

    A model that wears adapters already gets it beside them, under `name`; its `base_fingerprint` must be given then.

    peft only warns when tensors are left over or missing, which is how an adapter of another model gets used by
    mistake: here that is an error. So is another base of the same shape (see `fingerprint`), which is only said aloud
    with `other_base`.

    Raises:
        UsageError: the adapter belongs to another model. MinitunerError: its files cannot be read.
    """
    import_bitsandbytes()
    from peft import PeftModel
    from peft.utils.save_and_load import get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    trained_on, this = facts_of(adapter).get("base_fingerprint"), base_fingerprint or fingerprint(model)
    if comparable(trained_on, this) and trained_on != this:
        if trained_on.split("-")[0] != this.split("-")[0]:  # more layers than the adapter has would load silently
            raise _other_base(adapter, "this model's weights have other names or shapes than the base of the training")
        differs = f"fingerprint {trained_on} then, {this} now"
        if not other_base:
            raise UsageError(
                f"the adapter {adapter} was trained on a base with other weights than this one",
                why=f"it corrects those weights and no others: answers may be nonsense ({differs})",
                fix=f"use the base it was trained on: {base_of(adapter)}; or --other-base, to try it all the same",
            )
        say(
            f"careful: {adapter} was trained on a base with other weights than this one ({differs}); answers may be"
            f" nonsense. It was trained on {base_of(adapter)}"
        )
    try:
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        with warnings.catch_warnings():
            # As in model/adapters.py; and peft's own warning of missing tensors, which is an error below.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*missing adapter keys.*")
            if isinstance(model, PeftModel):
                model.load_adapter(str(adapter), adapter_name=name)
                loaded = model
            else:
                loaded = PeftModel.from_pretrained(model, str(adapter), adapter_name=name)
    except (RuntimeError, ValueError) as error:  # peft: size mismatch, target modules not found
        raise _other_base(adapter, " ".join(str(error).split())[:300]) from None
    except (OSError, SafetensorError) as error:
        raise MinitunerError(
            f"cannot read the adapter {adapter}: {error}", fix="give the hf/ folder of a finished LoRA run"
        ) from None
    places = get_peft_model_state_dict(loaded, save_embedding_layers=False, adapter_name=name)
    wanted = {key: tuple(value.shape) for key, value in places.items()}
    over = {key for key in saved if key not in wanted and "lora_" in key}  # a copy of the embedding may lie beside
    if wrong := sorted(over | {key for key, shape in wanted.items() if saved.get(key) != shape}):
        raise _other_base(adapter, f"{len(wrong)} tensors have no match between the two, {wrong[0]} first")
    return loaded


def _other_base(adapter: Path, why: str) -> UsageError:
    return UsageError(
        f"the adapter {adapter} does not fit this model",
        why=why,
        fix=f"use the base it was trained on: {base_of(adapter)}",
    )
