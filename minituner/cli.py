"""The command line: one thin command per verb, each calling a function that a notebook can call too.

Heavy imports live inside the commands, so `minituner --help` answers at once. An error is a message, not a traceback
(`--debug` shows it), and the exit status is 0 only when the work is done:

    0 done   1 failed   2 wrong recipe, data or usage   75 stopped early, checkpoint saved   130 interrupted
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from minituner.cli_camp import camp_app
from minituner.cli_catalog import catalog_app
from minituner.cli_chat import chat_app
from minituner.cli_convert import convert_app, parity_app
from minituner.cli_data import data_app
from minituner.cli_launch import launch_app
from minituner.cli_migrate import migrate_app
from minituner.cli_museum import museum_app
from minituner.cli_options import RecipeName
from minituner.cli_plan import bench_app, plan_app
from minituner.cli_web import web_app
from minituner.collection import collect_seldom
from minituner.errors import MinitunerError, UsageError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="minituner: fine-tune language models, and see and prove that training is right.",
)
app.add_typer(convert_app, name="convert")
app.add_typer(parity_app)  # parity
app.add_typer(chat_app)  # chat
app.add_typer(web_app)  # web
app.add_typer(catalog_app)  # list-cfg, list-models, copy-cfg
app.add_typer(data_app)  # inspect, check, list-formats, list-templates, tokenize, data-order
app.add_typer(migrate_app)  # import-cfg
app.add_typer(plan_app)  # doctor
app.add_typer(bench_app, name="bench")
app.add_typer(camp_app, name="camp")
app.add_typer(launch_app, name="launch")
app.add_typer(museum_app)  # museum

Overrides = Annotated[list[str] | None, typer.Argument(help="Changes, each key.path=value.", metavar="[KEY=VALUE]...")]


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        from minituner import __version__

        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command()
def quickstart(
    name: Annotated[str, typer.Option(help="Whose assistant it is to be.")] = "Alex",
    author: Annotated[str | None, typer.Option(help="Who made it (default: the same).")] = None,
    work_dir: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("work_dirs/quickstart"),
    lang: Annotated[str, typer.Option(help="Language of the data: en, zh or both.")] = "en",
    overrides: Overrides = None,
) -> None:
    """From nothing to your own assistant: model, data, training, before and after."""
    from minituner.quickstart import quickstart as run

    run(name, author, work_dir, lang=lang, overrides=tuple(overrides or ()))


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    work_dir: Annotated[Path | None, typer.Option(help="Default: work_dirs/<recipe name>.")] = None,
    resume: Annotated[
        str | None, typer.Option(help="auto, if-any (a start where there is none yet), or a checkpoint's folder.")
    ] = None,
    launcher: Annotated[
        str, typer.Option(help="none, torchrun (or pytorch) or slurm. NPROC_PER_NODE=2 starts torchrun by itself.")
    ] = "none",
    deepspeed: Annotated[
        str | None,
        typer.Option(help="zero1, zero2, zero3, zero2_offload, zero3_offload, or a JSON: sets distributed.zero."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, prepare the data, and stop.")] = False,
    inject: Annotated[
        str | None, typer.Option(help="Train with this fault, wrong on purpose and marked (minituner museum lists).")
    ] = None,
) -> None:
    """Train by a recipe."""
    from minituner.recipe import Recipe
    from minituner.train.launch import check_launcher, ranks_asked, relaunch

    changes = [*(overrides or ()), *([f"distributed.zero={deepspeed}"] if deepspeed else [])]
    known = check_launcher(launcher)
    loaded = Recipe.load(recipe, changes, world_size=None if dry_run else ranks_asked(known))
    if inject and dry_run:
        raise UsageError("--inject trains, and --dry-run does not", next_command=f"minituner museum {inject} {recipe}")
    if dry_run:
        from minituner.train.dry_run import dry_run as look

        look(loaded)
        return
    if inject:
        from minituner.museum.catalog import find
        from minituner.museum.fitting import fitting

        fitting(find(inject), loaded)
    status = relaunch(sys.argv[1:], known)  # the recipe is known to be right: what is wrong is said once, not per rank
    if status is not None:
        raise typer.Exit(status)
    if inject:
        from minituner.museum.run import train_injected

        train_injected(inject, loaded, work_dir, resume=resume, launcher=known)
        return
    from minituner.train.loop import train as run

    run(loaded, work_dir, resume=resume, launcher=known)


@app.command()
def plot(
    work_dir: Annotated[Path, typer.Argument(help="The --work-dir of a training, running or not.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="FILE.png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers that were drawn.")] = False,
) -> None:
    """Draw the curves of a training: loss, eval_loss, learning rate, gradient norm, tokens/s."""
    import json

    from minituner.viz.run import plot as draw

    facts = draw(work_dir, out)
    print(json.dumps(facts, ensure_ascii=False) if as_json else f"{facts['summary']}\n{facts['file']}")


def console() -> None:
    """The console script: `main` in a process of its own, which a run leaves without Python's teardown."""
    collect_seldom()
    try:
        main()
    except SystemExit as stop:
        ranks = sys.modules.get("minituner.train.ranks")
        if ranks and isinstance(stop.code, int | None):
            ranks.end_process(stop.code or 0)
        raise


def main() -> None:
    """Run the command of `sys.argv`; errors become messages and exit codes."""
    debug = "--debug" in sys.argv[1:]  # it may stand anywhere; sys.argv keeps it, for the ranks of `train`
    try:
        app([argument for argument in sys.argv[1:] if argument != "--debug"])
    except SystemExit as stop:
        if stop.code == 130:  # typer turns Ctrl-C into this
            print("minituner: interrupted", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("minituner: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe (head, less) has left
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        if not getattr(error, "said_elsewhere", False):
            print(f"minituner: {_message(error)}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, MinitunerError) else 1)


def _message(error: Exception) -> str:
    """What to tell a person about an error, whoever raised it."""
    if isinstance(error, MinitunerError):
        return error.text()
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return (
            f"{error.strerror or error}{where}\n"
            "  fix:  see that the place exists, can be written and has room (df -h); nothing half-written is used\n"
            "  next: run it again with --debug to see where it happened"
        )
    return f"unexpected {type(error).__name__}: {error}\n  next: run it again with --debug to see where it happened"


if __name__ == "__main__":
    main()
