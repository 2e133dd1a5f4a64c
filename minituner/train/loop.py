"""The only training loop. Everything that happens in one optimizer step is in `run_steps`, and fits one screen.

    window of micro-batches -> loss summed where supervised -> divided by the window's supervised tokens -> backward
    -> clip -> AdamW -> metrics -> checkpoint when due

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

from minituner.errors import MinitunerError, StoppedEarly, UsageError
from minituner.model.adapters import trainable_parameters
from minituner.model.loading import device_of_this_machine
from minituner.model.loss import loss_sum
from minituner.recipe import Recipe
from minituner.train import checkpoint
from minituner.train.callbacks import Callback, Metrics, Progress, SampleChats
from minituner.train.hf_folder import export
from minituner.train.identity import IdentityProbes
from minituner.train.launch import Launcher, world_of
from minituner.train.preempt import StopRequest
from minituner.train.ranks import Ranks
from minituner.train.resume import plan
from minituner.train.run import Run, Say, also_to_file, new_run_dir, set_up
from minituner.train.schedule import learning_rate


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

    Raises:
        UsageError: wrong recipe or data. StoppedEarly: asked to stop, checkpoint saved. MinitunerError: it failed.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    _refuse_what_this_engine_cannot(recipe)
    work_dir = Path(work_dir or Path("work_dirs") / recipe.name)
    world = world_of(launcher)
    alone = world.world_size == 1
    with StopRequest(quiet=not world.is_main, keep=not alone) as stop:
        ranks = Ranks(world, device_of_this_machine(), stop).join()
        try:
            return _train(recipe, work_dir, resume, callbacks, progress, say, ranks, stop)
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
) -> TrainResult:
    start = time.monotonic()
    run_dir = Path(ranks.share(str(ranks.main_only(lambda: new_run_dir(work_dir)) or "")))
    say = also_to_file(say, run_dir / "log.txt") if ranks.is_main else (lambda line: None)
    with stop.at_once() if not ranks.together else nullcontext():
        run = set_up(recipe, work_dir, run_dir, say, ranks, resume)
    samples = SampleChats()
    watchers: list[Callback] = []
    if ranks.is_main:
        recipe.dump(work_dir / "recipe.yaml")  # only now: a refused resume must not replace the recipe of its run
        watchers = [Metrics(), samples, *([Progress()] if progress else []), *callbacks]
        if recipe.evaluate.identity:
            watchers.append(IdentityProbes(recipe.evaluate.identity, recipe.evaluate.identity_language))
    for watcher in watchers:
        watcher.on_start(run)
    try:
        run_steps(run, watchers, stop)
    finally:
        for watcher in watchers:
            watcher.on_end(run)
    last = work_dir / "checkpoints" / f"step-{run.step:06d}"
    hf = work_dir / "hf"
    ranks.main_only(lambda: export(run.model, run.tokenizer, hf, recipe, run.base_fingerprint))
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
        answers=samples.answers,
        model=run.model,
        tokenizer=run.tokenizer,
    )


def run_steps(run: Run, watchers: Sequence[Callback], stop: StopRequest) -> None:
    """The loop. One pass is one optimizer step over one window of micro-batches."""
    recipe, engine = run.recipe, run.engine
    began = time.monotonic()
    while run.step < run.total_steps:
        tick = time.monotonic()
        window = run.feed.window(run.step, lambda batch: batch.to(engine.device))
        # One denominator for the whole window on all ranks: every supervised token weighs the same.
        counts = sum(batch.supervised_tokens for batch in window), sum(sum(batch.seq_lens) for batch in window)
        supervised, tokens = engine.all_sums(counts)
        total_loss = 0.0
        for batch in window:
            loss = loss_sum(run.model, batch, run.attention)
            total_loss += loss.item()
            engine.backward(loss / max(supervised, 1))
        # Ranks agree on stopping by votes that travel with the loss: all leave after the same step.
        total_loss, *votes = engine.all_sums([total_loss, *stop.votes()])
        stopping = stop.decide(votes)
        mean_loss = total_loss / max(supervised, 1)
        rate = learning_rate(run.step, run.total_steps, recipe.train)
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
        metrics = _metrics(run, mean_loss, rate, norm, tokens, supervised, time.monotonic() - tick, began)
        run.metrics.append(metrics)
        every = recipe.save.every_steps
        if run.step == run.total_steps or stopping or (every and run.step % every == 0):
            save(run)
        for watcher in watchers:
            watcher.on_step(run, metrics)
        if stopping and run.step < run.total_steps:
            raise _stopped(run, stopping)


def save(run: Run) -> Path:
    """Write a checkpoint of the run as it is now; rank 0 writes, with every rank's random generators."""
    ranks = run.engine.ranks
    random = checkpoint.random_states(ranks)
    ranks.main_only(
        lambda: checkpoint.save(
            run.work_dir,
            run.step,
            trainable_parameters(run.model),
            {**run.engine.state(), **random},
            {"trained_tokens": run.trained_tokens, "skipped_steps": run.skipped_steps, "plan": plan(run)},
            run.recipe.save.keep_last,
        )
    )
    return run.work_dir / "checkpoints" / f"step-{run.step:06d}"


def _metrics(
    run: Run,
    loss: float,
    rate: float,
    norm: float,
    tokens: float,
    supervised: float,
    seconds: float,
    began: float,
) -> dict[str, Any]:
    done = run.step - run.first_step
    return {
        "step": run.step,
        "epoch": run.step / run.feed.steps_per_epoch,
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "supervised_tokens": int(supervised),
        "tokens": int(tokens),
        "supervised_tokens_per_second": supervised / seconds,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "eta_seconds": (time.monotonic() - began) / done * (run.total_steps - run.step),
    }


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


def _refuse_what_this_engine_cannot(recipe: Recipe) -> None:
    if recipe.distributed.zero or recipe.distributed.sequence_parallel_size > 1:
        raise UsageError(
            "distributed.zero and sequence_parallel_size need the DeepSpeed engine, which is not here yet",
            fix="distributed.zero=null distributed.sequence_parallel_size=1",
        )
