"""The target: what `inspect` and `check` are pointed at becomes a recipe, and the recipe's tokenizer.

    inspect my_recipe.yaml        the recipe
    inspect work_dirs/mine        the recipe.yaml in it
    inspect train.jsonl           a recipe around this file: the embedded model's tokenizer and template, the defaults

Looking at a file must be quick: where the tokenizer is a plain tokenizer.json, it is loaded without importing torch,
which alone takes two seconds. Lesson: notebook 01.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from minituner.data.sources import HUB_ID, is_data_file
from minituner.recipe import Recipe

EMBEDDED = "smollm2-135m-instruct"
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def recipe_of(
    target: str | Path,
    *,
    model: str | None = None,
    template: str | None = None,
    format: str | None = None,
    overrides: Iterable[str] = (),
) -> Recipe:
    """The recipe that `target` names, or one around the data file, folder or hub data set that it names.

    Args:
        model, template, format: replace the recipe's.
        overrides: `key.path=value`, applied before these.

    Raises:
        UsageError: no such recipe, or wrong values.
    """
    path = Path(target)
    if (path / "recipe.yaml").is_file():
        recipe = Recipe.load(path / "recipe.yaml", overrides)
    elif _is_data(str(target)):
        around = {"model": {"name_or_path": EMBEDDED}, "data": {"sources": [{"path": str(target)}]}}
        recipe = Recipe.from_values(around, str(target), overrides)
    else:
        recipe = Recipe.load(target, overrides)
    if model:
        recipe.model.name_or_path = model
    if template:
        recipe.data.template = template
    for source in recipe.data.sources if format else ():
        source.format = format
    return recipe


def _is_data(target: str) -> bool:
    path = Path(target)
    if path.suffix in (".yaml", ".yml"):
        return False
    hub = HUB_ID.fullmatch(target) and not path.is_file()
    return path.is_dir() or is_data_file(path) or target.startswith("ms:") or bool(hub)


def tokenizer_of(recipe: Recipe, say: Callable[[str], None] = print) -> Any:
    """The tokenizer of the recipe's model, fetched where needed.

    Raises:
        SourceError: the model cannot be had.
        MinitunerError: it has no tokenizer.
    """
    from minituner.model.sources import fetch

    folder = fetch(recipe.model.name_or_path, source=recipe.model.source, revision=recipe.model.revision, say=say)
    return _plain_tokenizer(folder) or _any_tokenizer(folder, recipe.model.trust_remote_code)


def _plain_tokenizer(folder: Path) -> Any:
    """The tokenizer if its folder says that tokenizer.json is all there is to it, else None."""
    config = folder / "tokenizer_config.json"
    if not (config.is_file() and (folder / "tokenizer.json").is_file()):
        return None
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:  # the full loader says what is wrong with it
        return None
    if settings.get("tokenizer_class") not in PLAIN_CLASSES or "auto_map" in settings:
        return None
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def _any_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from minituner.model.loading import load_tokenizer

    return load_tokenizer(folder, trust_remote_code=trust_remote_code)
