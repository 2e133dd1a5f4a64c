"""Callbacks: what watches a run without being part of it.

    on_start(run)            before the first step
    on_metrics(run, metrics) after each optimizer step, before it may be saved; metrics is one line of metrics.jsonl
    on_step(run, metrics)    after each optimizer step, when it is saved
    on_evaluation(run, m)    after the held-out loss was measured
    on_end(run)              after the last step

`Metrics` writes metrics.jsonl (always) and to trackers (when asked), `Progress` shows a bar on a terminal and plain
lines elsewhere. What lets the model answer is in sample_chats.py and identity.py. Lesson: notebook 07.
"""

from __future__ import annotations

import json
import math
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from minituner.train.metrics import summary_line
from minituner.train.trackers import open_tracker

if TYPE_CHECKING:
    from minituner.train.run import Run


class Callback:
    """Does nothing; override what you need."""

    # True: it runs the model. Where the parameters are sharded (ZeRO-3) every rank then calls it, in the same order;
    # files and prints are for the rank with `run.is_main`. False: only rank 0 calls it.
    runs_the_model = False

    def on_start(self, run: Run) -> None:
        """Before the first step."""

    def on_metrics(self, run: Run, metrics: dict[str, Any]) -> None:
        """After an optimizer step, before it may be saved: for what has to be quick, and must not miss a step."""

    def on_step(self, run: Run, metrics: dict[str, Any]) -> None:
        """After an optimizer step; if it was due for saving, it is saved."""

    def on_evaluation(self, run: Run, measured: dict[str, Any]) -> None:
        """After the held-out loss was measured: {"step", "eval_loss", "eval_tokens"}; before the first step too."""

    def on_end(self, run: Run) -> None:
        """After the last step (also when stopped early)."""


class Metrics(Callback):
    """One JSON object per logged step in `runs/<stamp>/metrics.jsonl`; TensorBoard or W&B when the recipe asks.

    An evaluation has a line of its own: {"step": 100, "eval_loss": 1.9, "eval_tokens": 4096}. At the end the shares of
    time are said, and kept in `summary.json`.
    """

    def on_start(self, run: Run) -> None:
        """Open the files."""
        self.stream = (run.run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self.trackers = [open_tracker(name, run) for name in dict.fromkeys(run.recipe.log.to)]

    def on_metrics(self, run: Run, metrics: dict[str, Any]) -> None:
        """Write the step if it is due; before it is saved, or a kill right after a save would leave a gap."""
        if metrics["step"] % run.recipe.log.every_steps == 0 or metrics["step"] == run.total_steps:
            self._write(metrics)

    def on_evaluation(self, run: Run, measured: dict[str, Any]) -> None:
        """Write every evaluation."""
        self._write(measured)

    def _write(self, line: dict[str, Any]) -> None:
        self.stream.write(json.dumps({k: v if _finite(v) else str(v) for k, v in line.items()}) + "\n")
        self.stream.flush()
        for tracker in self.trackers:
            tracker.log(line)

    def on_end(self, run: Run) -> None:
        """Say where the time went, and close."""
        self.stream.close()
        for tracker in self.trackers:
            tracker.close()
        if run.meter is not None:
            run.summary = run.meter.summary()
            text = json.dumps({k: v if _finite(v) else str(v) for k, v in run.summary.items()}, indent=1)
            (run.run_dir / "summary.json").write_text(text + "\n", encoding="utf-8")
            run.say(summary_line(run.summary))


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


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
