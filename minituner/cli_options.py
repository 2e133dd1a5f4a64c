"""Options that several commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer


def recipe_names(incomplete: str) -> list[str]:
    """Recipe names that begin with what was typed, for the shell's completion; files are completed by the shell."""
    from minituner.catalog.lookup import list_recipes

    return [name for name in list_recipes(incomplete) if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Argument(help="A recipe's name (minituner list-cfg) or a YAML file.", autocompletion=recipe_names),
]
Model = Annotated[str, typer.Argument(help="An hf/ folder, a model's folder, or a catalog name.")]
Adapters = Annotated[
    list[str] | None, typer.Option(help="An adapter to put on MODEL, NAME=FOLDER or FOLDER; several: repeat it.")
]
Template = Annotated[
    str | None,
    typer.Option(
        "--prompt-template", "--template", help="native, or a key of list-templates (default: the training's)."
    ),
]
System = Annotated[str | None, typer.Option(help='System text (default: the training\'s; "" for none).')]
Bits = Annotated[int | None, typer.Option(help="4 or 8: hold the base quantised.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
OtherBase = Annotated[
    bool, typer.Option("--other-base", help="Use an adapter on a base with other weights than it was trained on.")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")]
