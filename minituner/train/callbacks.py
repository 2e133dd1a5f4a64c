"""Callbacks: what watches a run without being part of it.

    on_start(run)            before the first step
    on_step(run, metrics)    after each optimizer step; metrics is one line of metrics.jsonl
    on_end(run)              after the last step

`Metrics` writes metrics.jsonl (always) and TensorBoard or W&B (when asked), `Progress` shows a bar on a terminal and
plain lines elsewhere, `SampleChats` lets the model answer the recipe's prompts. Lesson: notebook 07.
"""

from __future__ import annotations

import json
import math
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minituner.errors import UsageError

if TYPE_CHECKING:
    from minituner.train.run import Run


class Callback:
    """Does nothing; override what you need."""

    def on_start(self, run: Run) -> None:
        """Before the first step."""

    def on_step(self, run: Run, metrics: dict[str, Any]) -> None:
        """After an optimizer step."""

    def on_end(self, run: Run) -> None:
        """After the last step (also when stopped early)."""


class Metrics(Callback):
    """One JSON object per logged step in `runs/<stamp>/metrics.jsonl`; TensorBoard or W&B when the recipe asks."""

    def on_start(self, run: Run) -> None:
        self.stream = (run.run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self.writers = [_writer(name, run) for name in run.recipe.log.to]

    def on_step(self, run: Run, metrics: dict[str, Any]) -> None:
        if metrics["step"] % run.recipe.log.every_steps and metrics["step"] != run.total_steps:
            return
        self.stream.write(json.dumps({k: v if _finite(v) else str(v) for k, v in metrics.items()}) + "\n")
        self.stream.flush()
        for write in self.writers:
            write(metrics)

    def on_end(self, run: Run) -> None:
        self.stream.close()


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _writer(name: str, run: Run) -> Any:
    """A function that takes a step's metrics to TensorBoard or W&B. Raises UsageError if it is not installed."""
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(run.run_dir))
            return lambda m: [board.add_scalar(k, v, m["step"]) for k, v in m.items() if isinstance(v, (int, float))]
        import wandb
    except ImportError:
        raise UsageError(
            f"log.to names {name}, which is not installed", fix=f"pip install {name}, or log.to=[]"
        ) from None
    session = wandb.init(
        project="minituner", name=run.recipe.name, dir=str(run.run_dir), config=run.recipe.model_dump()
    )
    return lambda m: session.log(m, step=m["step"])


class Progress(Callback):
    """A progress bar on a terminal; elsewhere a line at the first step, every few seconds, and at the last step."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self.every_seconds, self.last, self.bar = every_seconds, 0.0, None

    def on_start(self, run: Run) -> None:
        if not sys.stdout.isatty():
            return
        from rich import progress

        self.bar = progress.Progress(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(),
            progress.TextColumn("{task.description}"),
            progress.TimeRemainingColumn(),
        )
        self.task = self.bar.add_task("", total=run.total_steps, completed=run.step)
        self.bar.start()

    def on_step(self, run: Run, metrics: dict[str, Any]) -> None:
        text = (
            f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}"
            f"  {metrics['supervised_tokens_per_second']:,.0f} trained tokens/s"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=metrics["step"], description=text)
            return
        now = time.monotonic()
        if metrics["step"] in (run.first_step + 1, run.total_steps) or now - self.last > self.every_seconds:
            self.last = now
            eta = timedelta(seconds=round(metrics["eta_seconds"]))
            run.say(f"step {metrics['step']}/{run.total_steps}  {text}  ETA {eta}")

    def on_end(self, run: Run) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class SampleChats(Callback):
    """Answers the recipe's prompts before, during and after training; each time a file in `runs/<stamp>/samples/`."""

    def __init__(self) -> None:
        self.answers: dict[int, list[tuple[str, str]]] = {}

    def on_start(self, run: Run) -> None:
        self._answer(run, run.step)

    def on_step(self, run: Run, metrics: dict[str, Any]) -> None:
        every = run.recipe.evaluate.every_steps
        if metrics["step"] == run.total_steps or (every and metrics["step"] % every == 0):
            self._answer(run, metrics["step"])

    def _answer(self, run: Run, step: int) -> None:
        prompts = run.recipe.evaluate.prompts
        if not prompts:
            return
        answers = run.answer(prompts)
        self.answers[step] = list(zip(prompts, answers, strict=True))
        text = "\n\n".join(f"> {prompt}\n{answer}" for prompt, answer in self.answers[step])
        path = Path(run.run_dir) / "samples" / f"step-{step:06d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
        run.say(f"sample answers at step {step}:")
        for prompt, answer in self.answers[step]:
            run.say(f"  > {prompt}\n    {answer}")
