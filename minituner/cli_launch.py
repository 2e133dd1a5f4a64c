"""Commands that write a script for a cluster: `minituner launch slurm`.

    minituner launch slurm RECIPE --nodes 2 --gpus 8 --time 12:00:00 > job.sh      then: sbatch job.sh

Each is thin and calls a function that a notebook can call too. Lesson: notebook 07.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minituner.cli_options import RecipeName
from minituner.errors import UsageError

launch_app = typer.Typer(no_args_is_help=True, help="Write a script that starts training on a cluster.")


@launch_app.callback()
def _launch() -> None:
    """Write a script that starts training on a cluster."""


@launch_app.command("slurm")
def slurm(
    recipe: RecipeName,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes, each key.path=value.", metavar="[KEY=VALUE]...")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs (and ranks) on each machine; 0: one rank, on CPUs.")] = 1,
    time: Annotated[str, typer.Option(help="Time limit; the job goes on by itself afterwards.")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPU cores for each rank.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    work_dir: Annotated[Path | None, typer.Option(help="Default: work_dirs/<recipe name>.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it here (default: print it).")] = None,
) -> None:
    """Print an sbatch script: pre-empted or out of time, the job saves, queues again, and resumes by itself."""
    from minituner.recipe import Recipe
    from minituner.train.slurm import Job, sbatch_script

    loaded = Recipe.load(recipe, overrides or ())  # a wrong recipe is found now and not when the job has waited
    script = sbatch_script(
        recipe,
        overrides or (),
        work_dir or Path("work_dirs") / loaded.name,
        Job(loaded.name, nodes, gpus, time, partition, cpus, account),
    )
    if output is None:
        print(script, end="")
        return
    try:
        output.write_text(script, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from None
    print(f"{output}; start it with: sbatch {output}")
