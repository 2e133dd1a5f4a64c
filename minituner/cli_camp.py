"""Commands for teachers: `minituner camp report CLASS`, `minituner camp solutions OUT`, `minituner camp pack OUT`.

    minituner camp report class                 a table of students and exercises; report.csv and report.html in class/
    minituner camp report class -o grades       the two files elsewhere
    minituner camp solutions answers            the solution notebooks, built from notebooks/
    minituner camp pack OUT                     one folder for a room without network

Each is thin and calls a function that a notebook can call too; heavy imports live inside. Lesson: the teacher's kit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

camp_app = typer.Typer(
    no_args_is_help=True, help="For teachers: grade a class, build solution notebooks, pack for a room without network."
)


@camp_app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The class: NAME/NN_*.ipynb or NAME_NN.ipynb for each student.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of report.csv, report.html.")] = None,
    seed: Annotated[str | None, typer.Option(help="Draw the hidden cases again as in an earlier report.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="For one exercise of one student.")] = 20.0,
) -> None:
    """Run every student's answers again, behind walls and on new cases, and say who has passed what."""
    from minituner.camp.report import report as grade_class
    from minituner.camp.report_files import table, write

    found = grade_class(folder, seed=seed, seconds=seconds, say=lambda text: print(text, file=sys.stderr))
    print(table(found))
    for file in write(found, out or folder):
        print(file)


@camp_app.command()
def solutions(
    out: Annotated[Path, typer.Argument(help="Where the solution notebooks are written.")],
    notebooks: Annotated[Path, typer.Option(help="The learner's notebooks.")] = Path("notebooks"),
    renew: Annotated[bool, typer.Option("--renew", help="First write the stubs into the learner's notebooks.")] = False,
) -> None:
    """Build the solution notebooks: the learner's, with the exercise cells solved and checked."""
    from minituner.camp.book import write_solutions, write_stubs

    for file in write_stubs(notebooks) if renew else []:
        print(f"{file}: stubs renewed")
    for file in write_solutions(notebooks, out):
        print(file)


@camp_app.command("pack")
def pack_course(
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist, or be empty.")],
    root: Annotated[
        Path | None, typer.Option(help="The checkout with notebooks/ (default: where minituner is).")
    ] = None,
    extras: Annotated[str, typer.Option(help="Optional parts to take along.")] = "notebooks,quantization,deepspeed,web",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write wheels, model, notebooks, data and an install script into one folder, for a room without network."""
    import tempfile

    from minituner.camp.pack import pack, whole_course

    checkout = (root or Path(__file__).parents[1]).resolve()
    with tempfile.TemporaryDirectory() as data:
        wanted = [name.strip() for name in extras.split(",") if name.strip()]
        pack(out, whole_course(checkout, Path(data), wanted), force=force)
