"""The only training loop. Everything that happens in one optimizer step is in `run_steps`, and fits one screen.

    window of micro-batches -> loss summed where supervised -> divided by the window's supervised tokens -> backward
    -> clip -> AdamW -> metrics -> checkpoint when due

`train(recipe)` walks the whole way: data, model, adapters, loop, checkpoints, an `hf/` folder. Lesson: notebook 07.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minituner.data.encoding import encode_prompt, stop_rule
from minituner.data.prepare import Prepared, prepare
from minituner.errors import MinitunerError, StoppedEarly, UsageError
from minituner.model.adapters import apply_method, count_parameters, trainable_parameters
from minituner.model.attention import assert_isolated
from minituner.model.fingerprint import fingerprint
from minituner.model.generate import answer_text, generate
from minituner.model.loading import device_of_this_machine, load_model, load_tokenizer
from minituner.model.loss import loss_sum
from minituner.model.sources import fetch
from minituner.recipe import Recipe
from minituner.train import checkpoint
from minituner.train.callbacks import Callback, Metrics, Progress, SampleChats
from minituner.train.engines import Engine, TorchEngine
from minituner.train.feed import Feed
from minituner.train.hf_folder import export
from minituner.train.identity import IdentityProbes
from minituner.train.preempt import StopRequest
from minituner.train.resume import plan, restore, with_dtype_of
from minituner.train.schedule import learning_rate

Say = Callable[[str], None]


@dataclass
class Run:
    """A run in progress, as callbacks see it."""

    recipe: Recipe
    work_dir: Path
    run_dir: Path
    say: Say
    tokenizer: Any
    model: Any
    attention: str
    engine: Engine
    feed: Feed
    prepared: Prepared
    model_folder: Path
    base_fingerprint: str | None = None
    step: int = 0
    first_step: int = 0
    trained_tokens: int = 0
    skipped_steps: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    probes: dict[str, Any] = field(default_factory=dict)

    @property
    def stop(self) -> tuple[list[int], list[str]]:
        """Token ids and texts that end an answer."""
        return stop_rule(self.tokenizer, self.recipe.data.template)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.feed.total_steps

    def answer(self, prompts: Sequence[str], max_new_tokens: int | None = None) -> list[str]:
        """What the model, as it is now, says to each prompt (greedy)."""
        return answer(
            self.model,
            self.tokenizer,
            prompts,
            template=self.recipe.data.template,
            system=self.recipe.evaluate.system or self.recipe.data.system,
            max_new_tokens=max_new_tokens or self.recipe.evaluate.max_new_tokens,
        )


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
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    say: Say = print,
) -> TrainResult:
    """Train by a recipe and return metrics and paths; what `minituner train` calls.

    Args:
        recipe: a Recipe, a catalog name, or a YAML file.
        work_dir: where everything goes; default `work_dirs/<recipe name>`.
        resume: "auto" for the newest whole checkpoint of `work_dir`, or a checkpoint's folder.

    Raises:
        UsageError: wrong recipe or data. StoppedEarly: asked to stop, checkpoint saved. MinitunerError: it failed.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    _refuse_what_this_engine_cannot(recipe)
    work_dir = Path(work_dir or Path("work_dirs") / recipe.name)
    run_dir = _new_run_dir(work_dir)
    say = _also_to_file(say, run_dir / "log.txt")
    start = time.monotonic()
    run = set_up(recipe, work_dir, run_dir, say, resume)
    recipe.dump(work_dir / "recipe.yaml")  # only now: a refused resume must not replace the recipe of the run it names
    samples = SampleChats()
    watchers: list[Callback] = [Metrics(), samples, *([Progress()] if progress else []), *callbacks]
    if recipe.evaluate.identity:
        watchers.append(IdentityProbes(recipe.evaluate.identity, recipe.evaluate.identity_language))
    with StopRequest() as stop:
        for watcher in watchers:
            watcher.on_start(run)
        try:
            run_steps(run, watchers, stop)
        finally:
            for watcher in watchers:
                watcher.on_end(run)
    last = work_dir / "checkpoints" / f"step-{run.step:06d}"
    hf = export(run.model, run.tokenizer, work_dir / "hf", recipe, run.base_fingerprint)
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


def set_up(recipe: Recipe, work_dir: Path, run_dir: Path, say: Say, resume: str | Path | None = None) -> Run:
    """Everything before the first step: data, ledger, model, proof of isolation, adapters, engine, resume."""
    # Look for the checkpoint first: a wrong --resume should not cost the minutes that follow.
    found = checkpoint.find(work_dir, resume, say) if resume else None
    if found:
        recipe, asked = with_dtype_of(recipe, checkpoint.state_of(found)), recipe
        if recipe != asked:
            say(f"model.dtype=auto is {recipe.model.dtype} here, as in the checkpoint")
    folder = fetch(recipe.model.name_or_path, source=recipe.model.source, revision=recipe.model.revision, say=say)
    tokenizer = load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)
    prepared = prepare(recipe.data, tokenizer, seed=recipe.train.seed, say=say)
    for line in prepared.ledger.lines():
        say(line)
    if prepared.bad.count:
        prepared.bad.write(run_dir / "bad_records.txt")
        say(f"{prepared.bad.count} records cannot be used; they are listed in {run_dir / 'bad_records.txt'}")
    say(f"{len(prepared.packs)} packs of at most {recipe.data.max_length} tokens, {prepared.packs.fill:.1%} full")
    torch.manual_seed(recipe.train.seed)
    single = recipe.data.packing == "none" and recipe.train.per_device_batch_size == 1
    model, attention, notes = load_model(folder, recipe.model, recipe.method, one_document_rows=single)
    for note in notes:
        say(note)
    if not single:
        assert_isolated(model, attention, model.config.vocab_size)
        say("isolation proved on this model: changing a packed document moves its neighbour's logits by exactly 0")
    base = fingerprint(model)
    model = apply_method(model, recipe.method, activation_checkpointing=recipe.train.activation_checkpointing)
    trained, total = count_parameters(model)
    say(f"{recipe.method.name}: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})")
    engine: Engine = TorchEngine(recipe.train, device_of_this_machine())
    model = engine.prepare(model)
    model.train()
    feed = Feed(prepared, recipe, engine.rank, engine.world_size)
    run = Run(recipe, work_dir, run_dir, say, tokenizer, model, attention, engine, feed, prepared, folder, base)
    if found:
        restore(run, checkpoint.load(found))
    return run


def run_steps(run: Run, watchers: Sequence[Callback], stop: StopRequest) -> None:
    """The loop. One pass is one optimizer step over one window of micro-batches."""
    recipe, engine = run.recipe, run.engine
    began = time.monotonic()
    while run.step < run.total_steps:
        tick = time.monotonic()
        window = run.feed.window(run.step, lambda batch: batch.to(engine.device))
        # One denominator for the whole window on all ranks: every supervised token weighs the same.
        supervised = engine.all_sum(sum(batch.supervised_tokens for batch in window))
        total_loss = 0.0
        for batch in window:
            loss = loss_sum(run.model, batch, run.attention)
            total_loss += loss.item()
            engine.backward(loss / max(supervised, 1))
        mean_loss = engine.all_sum(total_loss) / max(supervised, 1)
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
        metrics = _metrics(run, mean_loss, rate, norm, window, supervised, time.monotonic() - tick, began)
        run.metrics.append(metrics)
        every = recipe.save.every_steps
        if run.step == run.total_steps or stop.signal is not None or (every and run.step % every == 0):
            save(run)
        for watcher in watchers:
            watcher.on_step(run, metrics)
        if stop.signal is not None and run.step < run.total_steps:
            raise _stopped(run, stop)


def save(run: Run) -> Path:
    """Write a checkpoint of the run as it is now."""
    return checkpoint.save(
        run.work_dir,
        run.step,
        trainable_parameters(run.model),
        run.engine.state(),
        {"trained_tokens": run.trained_tokens, "skipped_steps": run.skipped_steps, "plan": plan(run)},
        run.recipe.save.keep_last,
    )


def _metrics(
    run: Run,
    loss: float,
    rate: float,
    norm: float,
    window: Sequence[Any],
    supervised: float,
    seconds: float,
    began: float,
) -> dict[str, Any]:
    tokens = run.engine.all_sum(sum(sum(batch.seq_lens) for batch in window))
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


def _stopped(run: Run, stop: StopRequest) -> StoppedEarly:
    error = StoppedEarly(
        f"stopped after step {run.step} of {run.total_steps}; the checkpoint is saved in {run.work_dir}",
        next_command=checkpoint.resume_command(run.work_dir),
    )
    error.exit_code = stop.exit_code
    return error


def answer(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, template: str, system: str | None, max_new_tokens: int
) -> list[str]:
    """Greedy answers to single-turn prompts, in one batch."""
    from minituner.data.conversation import Conversation, Message

    head = [Message("system", system)] if system else []
    ids = [encode_prompt(Conversation([*head, Message("user", p)]), tokenizer, template) for p in prompts]
    stop = stop_rule(tokenizer, template)
    out = generate(model, tokenizer, ids, stop=stop, max_new_tokens=max_new_tokens)
    return [answer_text(tokenizer, new, stop) for new in out]


def _refuse_what_this_engine_cannot(recipe: Recipe) -> None:
    if recipe.distributed.zero or recipe.distributed.sequence_parallel_size > 1:
        raise UsageError(
            "distributed.zero and sequence_parallel_size need the DeepSpeed engine, which is not here yet",
            fix="distributed.zero=null distributed.sequence_parallel_size=1",
        )


def _new_run_dir(work_dir: Path) -> Path:
    """`runs/<stamp>`, a fresh folder even when two runs start within a second."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        folder = work_dir / "runs" / (f"{stamp}-{number}" if number else stamp)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"cannot write into --work-dir {work_dir}: {error.strerror}") from None
        return folder
    raise MinitunerError(f"too many runs in {work_dir / 'runs'}")


def _also_to_file(say: Say, path: Path) -> Say:
    def both(line: str) -> None:
        say(line)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    return both
