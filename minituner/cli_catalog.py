"""Commands that list and copy what is shipped: list-cfg, copy-cfg, list-models.

Only PyYAML is needed for the lists, so they answer at once. Lesson: notebook 08.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from minituner.cli_options import RecipeName
from minituner.errors import UsageError

catalog_app = typer.Typer()

Pattern = Annotated[str | None, typer.Option("--pattern", "-p", help="Show what contains this.")]


@catalog_app.command("list-cfg")
def list_cfg(pattern: Pattern = None) -> None:
    """List the shipped recipes."""
    from minituner.catalog.lookup import list_recipes

    names = list_recipes(pattern)
    if not names:
        raise UsageError(f"no recipe's name contains {pattern!r}", next_command="minituner list-cfg")
    print("\n".join(names))


@catalog_app.command("list-models")
def list_models(
    pattern: Pattern = None, as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False
) -> None:
    """List the models, and say plainly which train here natively and what the others need."""
    from minituner.catalog import support

    rows = support.list_models(pattern)
    if not rows:
        raise UsageError(f"no model's key, family or hub id contains {pattern!r}", next_command="minituner list-models")
    print(json.dumps(rows, indent=2, ensure_ascii=False) if as_json else "\n".join(support.lines(rows)))


@catalog_app.command("copy-cfg")
def copy_cfg(
    recipe: RecipeName,
    folder: Annotated[Path, typer.Argument(help="Where to write NAME_copy.yaml.")] = Path("."),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes, each key.path=value.", metavar="[KEY=VALUE]...")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write a recipe as YAML with every field explained, to edit."""
    from minituner.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    path = folder / f"{loaded.name}_copy.yaml"
    if path.exists() and not force:
        raise UsageError(f"{path} exists", fix="choose another folder, or --force")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(loaded.dump_commented(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", fix="choose a folder you can write to") from None
    print(path)
