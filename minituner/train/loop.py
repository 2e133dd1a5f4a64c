"""The only training loop. Everything that happens in one optimizer step is in `run_steps`, and fits one screen.

    window of micro-batches -> loss summed where supervised -> divided by the window's supervised tokens -> backward
    -> clip -> AdamW -> metrics -> checkpoint when due -> held-out loss when due

`train(recipe)` walks the whole way: data, model, adapters, loop, checkpoints, an `hf/` folder. Lesson: notebook 07.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minituner.errors import MinitunerError, StoppedEarly
from minituner.model.loading import device_of_this_machine
from minituner.model.loss import loss_sum
from minituner.model.residual import start_of
from minituner.recipe import Recipe
from minituner.train import checkpoint
from minituner.train.callbacks import Callback, Metrics, Progress
from minituner.train.evaluation import Evaluation, Measured
from minituner.train.hf_folder import export
from minituner.train.identity import IdentityProbes
from minituner.train.injected import refuse_mixed
from minituner.train.launch import Launcher, world_of
from minituner.train.metrics import Meter
from minituner.train.preempt import StopRequest
from minituner.train.ranks import Ranks
from minituner.train.resume import plan, schedule
from minituner.train.run import Run, Say, also_to_file, new_run_dir, set_up
from minituner.train.sample_chats import SampleChats
from minituner.train.schedule import learning_rate
from minituner.train.sequence_parallel import refuse_what_cannot_be
from minituner.train.trackers import check_trackers
from minituner.train.zero import check_zero, name_accelerator


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves: metrics of every step of this call, and where things are."""

    metrics: list[dict[str, Any]]
    work_dir: Path
    run_dir: Path
    checkpoint: Path
    hf: Path
    steps: int
    seconds: float
    ledger: dict[str, Any]
    probes: dict[str, Any]
    eval_losses: dict[int, float]
    summary: dict[str, Any]
    answers: dict[int, list[tuple[str, str]]]
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)


def train(
    recipe: Recipe | str | Path,
    work_dir: str | Path | None = None,
    *,
    resume: str | Path | None = None,
    launcher: Launcher = "none",
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    say: Say = print,
    injected: str | None = None,
) -> TrainResult:
    """Train by a recipe and return metrics and paths; what `minituner train` calls.

    Started by torchrun or srun it is one of several ranks: all of them compute, only rank 0 prints, writes, answers
    sample chats and runs `callbacks`.

    Args:
        recipe: a Recipe, a catalog name, or a YAML file.
        work_dir: where everything goes; default `work_dirs/<recipe name>`.
        resume: "auto" for the newest whole checkpoint of `work_dir`, "if-any" for the same or a start from the
            beginning where there is none yet, or a checkpoint's folder.
        launcher: how this process was started; "none" looks for torchrun's variables.
        injected: the fault that the museum has put into this process; everything the run leaves names it.

    Raises:
        UsageError: wrong recipe or data. StoppedEarly: asked to stop, checkpoint saved. MinitunerError: it failed.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    check_trackers(recipe.log.to)
    check_zero(recipe)
    work_dir = Path(work_dir or Path("work_dirs") / recipe.name)
    refuse_mixed(work_dir, injected)
    world = world_of(launcher)
    refuse_what_cannot_be(recipe, world)
    alone = world.world_size == 1
    with StopRequest(quiet=not world.is_main, keep=not alone) as stop:
        name_accelerator(device := device_of_this_machine())
        ranks = Ranks(world, device, stop).join()
        try:
            with ranks.contact_throughout():
                return _train(recipe, work_dir, resume, callbacks, progress, say, ranks, stop, injected)
        finally:
            ranks.leave()


def _train(
    recipe: Recipe,
    work_dir: Path,
    resume: str | Path | None,
    callbacks: Sequence[Callback],
    progress: bool,
    say: Say,
    ranks: Ranks,
    stop: StopRequest,
    injected: str | None,
) -> TrainResult:
    start = time.monotonic()
    run_dir = Path(ranks.share(str(ranks.main_only(lambda: new_run_dir(work_dir)) or "")))
    say = also_to_file(say, run_dir / "log.txt") if ranks.is_main else (lambda line: None)
    with stop.at_once() if not ranks.together else nullcontext():
        run = set_up(recipe, work_dir, run_dir, say, ranks, resume, injected)
    samples = SampleChats()
    watchers: list[Callback] = [Metrics(), samples, *([Progress()] if progress else []), *callbacks]
    if recipe.evaluate.identity:
        watchers.append(IdentityProbes(recipe.evaluate.identity, recipe.evaluate.identity_language))
    if ranks.is_main:
        recipe.dump(work_dir / "recipe.yaml")  # only now: a refused resume must not replace the recipe of its run
    else:  # where parameters are sharded, no rank can run the model alone
        watchers = [watcher for watcher in watchers if watcher.runs_the_model and run.engine.sharded]
    hf = work_dir / "hf"
    try:
        for watcher in watchers:
            watcher.on_start(run)
        try:
            run_steps(run, watchers, stop)
        finally:
            for watcher in watchers:
                watcher.on_end(run)
        tensors = run.engine.exported()
        ranks.main_only(lambda: export(run.model, run.tokenizer, hf, recipe, run.base_fingerprint, tensors))
    finally:
        run.engine.close()
    last = work_dir / "checkpoints" / f"step-{run.step:06d}"
    say(f"done: {run.step} steps; {hf} holds what transformers, peft and vLLM read")
    return TrainResult(
        metrics=run.metrics,
        work_dir=work_dir,
        run_dir=run_dir,
        checkpoint=last,
        hf=hf,
        steps=run.step,
        seconds=time.monotonic() - start,
        ledger=run.prepared.ledger.to_dict(),
        probes=run.probes,
        eval_losses=run.eval_losses,
        summary=run.summary,
        answers=samples.answers,
        model=run.model,
        tokenizer=run.tokenizer,
    )


def run_steps(run: Run, watchers: Sequence[Callback], stop: StopRequest) -> None:
    """The loop. One pass is one optimizer step over one window of micro-batches."""
    recipe, engine = run.recipe, run.engine
    run.meter = meter = Meter(run)
    clock, evaluation = meter.clock, Evaluation(run, stop)
    if evaluation.feed is not None:
        with clock("evaluation"):
            _tell(run, watchers, evaluation.before_the_first_step())
    while run.step < run.total_steps:
        with clock("data"):
            window = run.feed.window(run.step, lambda batch: batch.to(engine.device))
        # One denominator for the whole window on all ranks: every supervised token weighs the same.
        with clock("waiting"):
            supervised, *_ = sums = engine.all_sums(meter.window_counts(window))
        total_loss = 0.0
        with clock("model"):
            for batch in window:
                loss = loss_sum(engine.model, batch, run.attention, run.head)
                total_loss += loss.item()
                engine.backward(loss / max(supervised, 1))
        # Ranks agree on stopping by votes that travel with the loss: all leave after the same step.
        with clock("waiting"):
            total_loss, *votes = engine.all_sums([total_loss, *stop.votes()])
        stopping = stop.decide(votes)
        mean_loss = total_loss / max(supervised, 1)
        rate = learning_rate(run.step, run.total_steps, recipe.train)
        with clock("optimizer"):
            if not supervised:
                run.say(f"step {run.step + 1}: no supervised token in this window; nothing is changed")
                norm = engine.skip() or 0.0
            elif not math.isfinite(mean_loss):
                norm = engine.skip() or math.nan
            else:
                norm = engine.step(rate)
        run.step += 1
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            _not_finite(run, mean_loss, norm)
        run.trained_tokens += int(supervised)
        metrics = meter.line(mean_loss, rate, norm, sums)
        run.metrics.append(metrics)
        with clock("callbacks"):
            for watcher in watchers:
                watcher.on_metrics(run, metrics)
        every = recipe.save.every_steps
        saving = run.step == run.total_steps or bool(stopping) or bool(every and run.step % every == 0)
        if saving:
            with clock("saving"):
                save(run)
        for watcher in watchers:
            with clock("answers" if watcher.runs_the_model else "callbacks"):
                watcher.on_step(run, metrics)
        if evaluation.due() and not stopping:
            with clock("evaluation"):
                stopping = _tell(run, watchers, evaluation.measure())
        if stopping and run.step < run.total_steps:
            if not saving:  # asked to stop while evaluating
                save(run)
            raise _stopped(run, stopping)


def _tell(run: Run, watchers: Sequence[Callback], measured: Measured) -> int:
    """Pass a held-out loss on to all that watch; returns the exit status if the ranks were asked to stop instead."""
    if not measured.stopping:
        run.eval_losses[run.step] = measured.eval_loss
        run.say(
            f"step {run.step}: eval_loss {measured.eval_loss:.4f} of {measured.supervised_tokens:,} held-out tokens"
        )
        for watcher in watchers:
            watcher.on_evaluation(
                run, {"step": run.step, "eval_loss": measured.eval_loss, "eval_tokens": measured.supervised_tokens}
            )
    return measured.stopping


def save(run: Run) -> Path:
    """Write a checkpoint of the run as it is now; rank 0 writes, with what the other ranks hold."""
    ranks = run.engine.ranks
    random = checkpoint.random_states(ranks)
    weights, state = run.engine.weights(), run.engine.state()
    ranks.main_only(
        lambda: checkpoint.save(
            run.work_dir,
            run.step,
            weights,
            {**state, **random, **start_of(run.model)},
            {
                "trained_tokens": run.trained_tokens,
                "skipped_steps": run.skipped_steps,
                "plan": plan(run),
                "schedule": schedule(run),
            },
            run.recipe.save.keep_last,
        )
    )
    return run.work_dir / "checkpoints" / f"step-{run.step:06d}"


def _not_finite(run: Run, loss: float, norm: float) -> None:
    """A loss or gradient that is not finite: nothing was updated; stop with the place, or count and go on."""
    packs = run.feed.packs(run.step - 1)
    what = f"step {run.step}: loss {loss}, gradient norm {norm}; packs {packs}"
    if run.recipe.train.on_nonfinite == "stop":
        raise MinitunerError(
            f"{what}; the weights were not touched",
            why="a learning rate that is too high, float16, or a broken record",
            fix="lower train.learning_rate, use model.dtype=float32, or train.on_nonfinite=skip to pass over it",
            next_command=checkpoint.resume_command(run.work_dir) + " train.on_nonfinite=skip",
        )
    run.skipped_steps += 1
    run.say(f"{what}; skipped ({run.skipped_steps} so far)")


def _stopped(run: Run, status: int) -> StoppedEarly:
    error = StoppedEarly(
        f"stopped after step {run.step} of {run.total_steps}; the checkpoint is saved in {run.work_dir}",
        next_command=checkpoint.resume_command(run.work_dir),
    )
    error.exit_code, error.said_elsewhere = status, run.engine.rank > 0
    return error
