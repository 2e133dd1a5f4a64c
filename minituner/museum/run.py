"""A whole training with a fault in it, and no way to take it for a good one.

    work_dirs/mine_injected_packed-leak/     its own folder, whose name says it
        INJECTED.json                        the mark, and what the defences said
        runs/.../metrics.jsonl, summary.json, log.txt, hf/README.md       each names the fault

The defences that would have refused are asked first and quoted. Lesson: notebook 03.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minituner.museum.catalog import Fault, find
from minituner.museum.fitting import fitting
from minituner.museum.injection import Injection, injected
from minituner.recipe import Recipe
from minituner.train.callbacks import Callback
from minituner.train.injected import mark, refuse_mixed
from minituner.train.launch import Launcher, world_of

if TYPE_CHECKING:
    from minituner.train.loop import TrainResult
    from minituner.train.run import Run

RULE = "=" * 100
ON_DATA = ("double-bos", "pad-as-eos", "mask-everything", "mask-nothing", "lost-tail")  # have acted before step 1


def train_injected(
    name: str,
    recipe: Recipe | str | Path,
    work_dir: str | Path | None = None,
    *,
    resume: str | Path | None = None,
    launcher: Launcher = "none",
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Train by a recipe with one fault of the museum in the pipeline; what `train --inject` calls.

    Args:
        name: a fault (`minituner museum` lists them).
        recipe, resume, launcher, callbacks, progress, say: as `train` takes them.
        work_dir: default `work_dirs/<recipe name>_injected_<fault>`.

    Raises:
        UsageError: no such fault, it cannot happen in this recipe, or `work_dir` holds another kind of run.
    """
    from minituner.train.loop import train

    fault = find(name)
    recipe = fitting(fault, recipe if isinstance(recipe, Recipe) else Recipe.load(recipe))
    work_dir = Path(work_dir or Path("work_dirs") / recipe.name)
    refuse_mixed(work_dir, fault.name)
    main = world_of(launcher).is_main
    tell = say if main else (lambda line: None)
    if main:
        mark(work_dir, fault.name, {})
    for line in banner(fault):
        tell(line)
    with injected(fault.name, tell) as injection:
        result = train(
            recipe,
            work_dir,
            resume=resume,
            launcher=launcher,
            callbacks=[*callbacks, _Witness(injection)],
            progress=progress,
            say=say,
            injected=fault.name,
        )
    if main:
        injection.must_have_acted()
        mark(work_dir, fault.name, {"refused_by": [asdict(refusal) for refusal in injection.refusals]})
    for line in ending(injection, result.metrics, recipe):
        tell(line)
    return result


def banner(fault: Fault) -> list[str]:
    """What is said before anything happens."""
    return [RULE, f"INJECTED FAULT: this run is wrong on purpose. {fault.story()[0]}", *fault.story()[1:], RULE]


def ending(injection: Injection, metrics: Sequence[dict[str, Any]], recipe: Recipe) -> list[str]:
    """What is said when the run is over: the curve, who would have refused, who shows it."""
    fault = injection.fault
    lines = [RULE, f"INJECTED FAULT: {fault.name}. Do not use what this run has made."]
    if metrics:
        first, last = metrics[0]["loss"], metrics[-1]["loss"]
        lines.append(
            f"  loss         {first:.4f} at step {metrics[0]['step']}, {last:.4f} at step {metrics[-1]['step']}"
        )
    who = "; ".join(refusal.defence.rstrip(",") for refusal in injection.refusals)
    lines.append(f"  refused by   {who or 'nothing during the run'}")
    lines.append(f"  seen by      {fault.tool}")
    lines.append(f"  next         minituner museum {fault.name} RECIPE: the tool, on {recipe.name} and on a clean run")
    return [*lines, RULE]


class _Witness(Callback):
    """Writes the fault into the run's log, and stops a run that is as good as clean before its first step."""

    def __init__(self, injection: Injection) -> None:
        self.injection = injection

    def on_start(self, run: Run) -> None:
        run.say(f"INJECTED FAULT: {self.injection.fault.name}; this run is wrong on purpose")
        if self.injection.fault.name in ON_DATA:
            self.injection.must_have_acted()

    def on_end(self, run: Run) -> None:
        run.say(f"INJECTED FAULT: {self.injection.fault.name}; do not use what this run has made")
