"""The command that shows faults: `minituner museum`. Whole runs with a fault are `minituner train --inject`.

    minituner museum                                the list
    minituner museum packed-leak                    one fault in words
    minituner museum packed-leak RECIPE [KEY=VALUE] its tool, asked about the recipe, clean and broken

Lessons: notebooks 03, 04, 05, 07 and 09.
"""

from __future__ import annotations

from typing import Annotated

import typer

museum_app = typer.Typer()


@museum_app.command("museum")
def museum(
    name: Annotated[str | None, typer.Argument(metavar="[FAULT]", help="A fault; none: the list.")] = None,
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name or a YAML file, to show the fault on.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes, each key.path=value.", metavar="[KEY=VALUE]...")
    ] = None,
) -> None:
    """Faults that spoil a training while its loss falls: what each does, and the tool that shows it."""
    from minituner.museum.catalog import find, table

    if name is None:
        print("\n".join(table()))
        print("\nminituner museum FAULT RECIPE asks its tool; minituner train RECIPE --inject FAULT trains with it")
        return
    fault = find(name)
    if recipe is None:
        print("\n".join(fault.story()))
        return
    from minituner.museum.exhibit import show
    from minituner.recipe import Recipe

    clean, broken = show(fault.name, Recipe.load(recipe, overrides or ()))
    if broken.passes or not clean.passes:
        raise typer.Exit(1)  # the tool did not tell the two apart
