"""The commands that look at data: inspect, check, list-formats, list-templates, tokenize, data-order.

Each is a thin wrapper around a function that a notebook can call (`look` in `minituner.data.look`, `check` in
`minituner.data.check`, ...). `cli.py` joins them to the others with `app.add_typer(data_app)`. XTuner's names are kept
as hidden commands. What is asked for goes to the standard output, downloads and progress to the standard error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from minituner.errors import UsageError

data_app = typer.Typer(no_args_is_help=True)

Target = Annotated[
    str, typer.Argument(metavar="RECIPE|FILE", help="A recipe's name or file, or a data file, folder or hub data set.")
]
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name or a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes, each key.path=value.", metavar="[KEY=VALUE]...")]
Template = Annotated[str | None, typer.Option(help="native, or a key of list-templates; replaces the recipe's.")]
Model = Annotated[str | None, typer.Option(help="Whose tokenizer to use; replaces the recipe's.")]
Format = Annotated[str | None, typer.Option(help="The record layout (list-formats); default: recognised.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]


def _aside(line: str) -> None:
    print(line, file=sys.stderr)


@data_app.command()
def inspect(
    target: Target,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("--n", "-n", min=0, help="How many samples to show.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="Show the id of every token.")] = False,
    records: Annotated[int, typer.Option(min=1, help="Records read from the front of each source.")] = 1000,
    html: Annotated[Path | None, typer.Option(help="Also write everything as one HTML file.")] = None,
    template: Template = None,
    model: Model = None,
    format: Format = None,
    as_json: AsJson = False,
) -> None:
    """Show samples as tokens (trained, masked, stop, BOS), where tokens go, lengths and packs."""
    from minituner.data.look import look

    console = None
    if not as_json:
        from rich.console import Console

        from minituner.data.report_text import print_samples, print_survey

        console = Console()
    found = look(
        target,
        n=n,
        records=records,
        model=model,
        template=template,
        format=format,
        overrides=overrides or (),
        on_samples=(lambda found: print_samples(found, console, ids=ids)) if console else None,
        say=_aside,
    )
    if console:
        print_survey(found, console)
    else:
        print(json.dumps(found.to_dict(), ensure_ascii=False, indent=1))
    if html:
        from minituner.data.report_html import write_page

        _aside(f"written: {write_page(found, html)}")


@data_app.command()
def check(
    target: Target,
    overrides: Overrides = None,
    template: Template = None,
    model: Model = None,
    format: Format = None,
    as_json: AsJson = False,
) -> None:
    """Read everything and report each bad record, duplicates, placeholders; exit 2 if training would refuse."""
    from minituner.data.check import Finding
    from minituner.data.check import check as run
    from minituner.data.token_view import visible

    def show(finding: Finding) -> None:
        print(visible(str(finding)))

    report = run(
        target,
        model=model,
        template=template,
        format=format,
        overrides=overrides or (),
        on_finding=None if as_json else show,
        say=_aside,
    )
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False, indent=1))
    else:
        print("\n".join(visible(line) for line in report.summary()))
    raise typer.Exit(report.exit_code)


@data_app.command("list-formats")
def list_formats() -> None:
    """List the record layouts that can be read, with their columns and an example."""
    from minituner.data.listings import format_lines

    print("\n".join(format_lines()))


@data_app.command("list-templates")
def list_templates() -> None:
    """List the prompt templates, whom each fits, and what it trains."""
    from minituner.data.listings import template_lines

    print("\n".join(template_lines()))


@data_app.command()
def tokenize(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(help="A folder, or a file that ends in .bin.")],
    overrides: Overrides = None,
) -> None:
    """Write a recipe's data as InternEvo's .bin and .bin.meta files."""
    from minituner.data.target import recipe_of
    from minituner.data.to_tokenized import tokenize as run

    print(run(recipe_of(recipe, overrides=overrides or ()), out, say=_aside))


@data_app.command("data-order")
def data_order(
    folder: Annotated[Path, typer.Argument(help="A folder with .bin files.")],
    out: Annotated[Path | None, typer.Option(help="Write to this file (or data_order.txt in this folder).")] = None,
) -> None:
    """Print, or write, the order in which a folder's .bin files are read."""
    from minituner.data import tokenized

    if out is None:
        print("\n".join(tokenized.data_order(folder)))
        return
    try:
        print(tokenized.write_data_order(folder, out))
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}", fix="choose another file") from None


# ---- XTuner's names -------------------------------------------------------------------------------------------------


@data_app.command("log-dataset", hidden=True)
def log_dataset(
    target: Target,
    overrides: Overrides = None,
    show: Annotated[str, typer.Option(help="text, masked_text, input_ids, labels or all.")] = "text",
) -> None:
    """XTuner's name for `inspect RECIPE --n 1`."""
    known = ("text", "masked_text", "input_ids", "labels", "all")
    if show not in known:
        raise UsageError(f"--show {show!r} is unknown", fix=f"use one of {', '.join(known)}")
    inspect(target, overrides, n=1, ids=show in ("input_ids", "labels", "all"))


@data_app.command("check-custom-dataset", hidden=True)
def check_custom_dataset(target: Target, overrides: Overrides = None) -> None:
    """XTuner's name for `check`."""
    check(target, overrides)


@data_app.command("list-dataset-format", hidden=True)
def list_dataset_format() -> None:
    """XTuner's name for `list-formats`."""
    list_formats()
