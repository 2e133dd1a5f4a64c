"""The `hf/` folder: an adapter or a full model, with tokenizer and chat template, for other programs to read.

Beside the usual files lies `minituner.json`: the base model, template and system text, so that `minituner chat` asks
the way training did. Lesson: notebook 09.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from minituner.recipe import Recipe

FACTS = "minituner.json"


def export(model: Any, tokenizer: Any, folder: Path, recipe: Recipe) -> Path:
    """Write the trained model (peft: the adapter only) into `folder`, aside first, and return it."""
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    readme = aside / "README.md"
    if readme.exists():  # peft's card with its unfilled fields
        readme.unlink()
    facts = {
        "recipe": recipe.name,
        "base": recipe.model.name_or_path,
        "method": recipe.method.name,
        "template": recipe.data.template,
        "system": recipe.data.system,
    }
    (aside / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return folder


def facts_of(folder: Path) -> dict[str, Any]:
    """What `export` wrote about a folder; empty for a folder from elsewhere."""
    file = folder / FACTS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
