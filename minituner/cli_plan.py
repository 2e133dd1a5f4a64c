"""Commands about the machine and the plan: `minituner doctor`, `minituner estimate`, `minituner bench data|train`.

    minituner doctor                         what is here, what each gap disables, the command that mends it
    minituner doctor --json --network        the same for programs; the model hub is asked too
    minituner estimate RECIPE --gpus 8 --card a100-80gb     memory and time before anything is spent
    minituner bench data > figures.json      progress goes to stderr, the figures to stdout
    minituner bench train                    steps of a recipe in a fresh process: tokens/s, and how near the limit

Each is thin and calls a function that a notebook can call too; heavy imports live inside. Lesson: notebook 04.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from minituner.cli_options import RecipeName

plan_app = typer.Typer()
bench_app = typer.Typer(no_args_is_help=True, help="Measure minituner on this machine; prints JSON.")


@plan_app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    network: Annotated[bool, typer.Option("--network", help="Ask the model hub too (two seconds at most).")] = False,
) -> None:
    """What this machine has, what each gap disables, and the command that mends it (exit status 1: it cannot train)."""
    from minituner.plan.doctor import checkup

    found = checkup(network=network)
    print(json.dumps(found.values, indent=2, ensure_ascii=False) if as_json else found)
    if not found.can_train:
        raise typer.Exit(1)


@plan_app.command()
def estimate(
    recipe: RecipeName,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes, each key.path=value.", metavar="[KEY=VALUE]...")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Devices of a node.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of a device: 24GB (24e9 bytes) or 24GiB.")] = None,
    card: Annotated[str | None, typer.Option(help="A GPU by name, e.g. a100-80gb: its memory and its rate.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; --gpus counts ranks on a CPU.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Run three real steps here, and take their rate.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a recipe will hold and how long it will take, and what to change when it does not fit; loads no weights."""
    from minituner.plan.estimate import estimate as plan
    from minituner.recipe import Recipe

    planned = plan(
        Recipe.load(recipe, overrides or (), world_size=(gpus or 1) * nodes),
        gpus=gpus,
        nodes=nodes,
        gpu_memory=gpu_memory,
        card=card,
        device=device,
        probe=probe,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(planned.values, indent=2, ensure_ascii=False) if as_json else planned)


@bench_app.callback()
def _bench() -> None:
    """Measure minituner on this machine; prints JSON."""


@bench_app.command("data")
def bench_data(
    records: Annotated[int, typer.Option(min=1, help="Alpaca-like records to prepare.")] = 50_000,
    runs: Annotated[int, typer.Option(min=1, help="Repetitions; the median is printed.")] = 3,
    against: Annotated[str | None, typer.Option(help="Prepare the same records with this too: trl.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="prepare, pack or first_sample; may be repeated.")] = None,
    pack_lengths: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Lengths in a pack plan; may be repeated (default: 1 million and 10)."),
    ] = None,
    file_mb: Annotated[int, typer.Option(min=1, help="Size of the file whose first sample is timed, in MB.")] = 200,
    one_gb: Annotated[bool, typer.Option("--one-gb", help="The same as --file-mb 1000.")] = False,
    max_length: Annotated[int, typer.Option(min=2, help="Longest pack in `prepare`, in tokens.")] = 2048,
    model: Annotated[str, typer.Option(help="Whose tokenizer: a catalog name or a folder.")] = "smollm2-135m-instruct",
    seed: Annotated[int, typer.Option(help="Of the generated records and lengths.")] = 42,
) -> None:
    """Time preparing, packing and the first sample of a big file, each in a fresh process."""
    from minituner.plan.bench_data import ONE_GB, PARTS, BenchOptions
    from minituner.plan.bench_data import bench_data as run

    options = BenchOptions(
        records=records,
        runs=runs,
        against=against,
        parts=tuple(only or PARTS),
        pack_lengths=tuple(pack_lengths or BenchOptions.pack_lengths),
        file_mb=ONE_GB if one_gb else file_mb,
        max_length=max_length,
        model=model,
        seed=seed,
    )
    figures = run(options, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(figures, indent=2, ensure_ascii=False))


@bench_app.command("train")
def bench_train(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's name or a YAML file; without one, the benchmark's own.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes, each key.path=value.", metavar="[KEY=VALUE]...")
    ] = None,
    steps: Annotated[int, typer.Option(min=3, help="Optimizer steps; the first two are not counted.")] = 8,
) -> None:
    """Time real training steps in a fresh process: tokens/s, share of the machine's matrix rate, peak memory."""
    from minituner.plan.bench_train import bench_train as run

    changes = list(overrides or ())
    if recipe is not None and "=" in recipe:  # no recipe, only changes to the benchmark's own
        recipe, changes = None, [recipe, *changes]
    figures = run(recipe, changes, steps=steps, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(figures, indent=2, ensure_ascii=False))
