"""The loss curve, after a run and while it runs.

    loss_curve(result.metrics)                      loss (thin), its running mean (thick), learning rate below
    train(recipe, callbacks=[viz.LiveLoss()])       the same picture, renewed in place every two seconds

A falling loss proves little (it falls in broken set-ups too): look at the samples and at the promises as well.
Lesson: notebook 07.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minituner.errors import UsageError
from minituner.train.callbacks import Callback
from minituner.viz.picture import Picture, new_figure
from minituner.viz.style import BLUE, ORANGE, SKY, styled

if TYPE_CHECKING:
    from minituner.train.loop import Run

SMOOTHING = 0.9  # weight of the past in the running mean: about the last ten steps


@styled
def loss_curve(metrics: Sequence[Mapping[str, Any]]) -> Picture:
    """Loss and learning rate by step, from a run's metrics (or the lines of its metrics.jsonl).

    `data` has steps, loss, smoothed and learning_rate, (n,) each. A step whose loss is not finite leaves a gap and is
    counted in `data["not_finite"]`.

    Raises:
        UsageError: there are no metrics.
    """
    if not metrics:
        raise UsageError("loss_curve needs the metrics of at least one step", fix="give it result.metrics")
    steps = np.array([line["step"] for line in metrics], dtype=np.int64)
    loss = np.array([float(line["loss"]) for line in metrics])
    rate = np.array([float(line.get("learning_rate", "nan")) for line in metrics])
    smoothed = running_mean(loss)
    figure = new_figure(8, 4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    mark = "." if len(steps) < 50 else ""
    top.plot(steps, loss, color=SKY, linewidth=0.8, linestyle="-", marker=mark, label="loss of each step")
    top.plot(steps, smoothed, color=BLUE, linewidth=2, linestyle="-", label="running mean")
    top.set_ylabel("loss per trained token")
    top.legend()
    bottom.plot(steps, rate, color=ORANGE, linewidth=1.5, linestyle="--")
    bottom.set(xlabel="optimizer step", ylabel="lr", ylim=(0, None))
    lost = int((~np.isfinite(loss)).sum())
    summary = f"step {steps[-1]}: loss {loss[-1]:.4f}, running mean {smoothed[-1]:.4f}"
    top.set_title(summary + (f"; {lost} steps not finite" if lost else ""))
    data = {"steps": steps, "loss": loss, "smoothed": smoothed, "learning_rate": rate, "not_finite": lost}
    return Picture(figure, data, summary)


def running_mean(values: np.ndarray, weight: float = SMOOTHING) -> np.ndarray:
    """Exponential running mean (n,) without the usual pull towards zero at the start; gaps are passed over."""
    means, total, mass = [], 0.0, 0.0
    for value in values.tolist():
        if np.isfinite(value):
            total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        means.append(total / mass if mass else np.nan)
    return np.array(means)


class LiveLoss(Callback):
    """Shows the loss curve in a notebook and renews it in place; the last picture stays, and is in `picture`.

    Outside a notebook nothing is shown, and `picture` is drawn once at the end.
    """

    def __init__(self, every_seconds: float = 2.0) -> None:
        self.every_seconds = every_seconds
        self.metrics: list[dict[str, Any]] = []
        self.picture: Picture | None = None
        self._handle: Any = None
        self._last = 0.0

    def on_start(self, run: Run) -> None:
        """Forget an earlier run."""
        self.metrics, self.picture, self._handle, self._last = [], None, None, 0.0

    def on_step(self, run: Run, metrics: dict[str, Any]) -> None:
        """Draw when the last drawing is old enough."""
        self.metrics.append(metrics)
        if in_notebook() and time.monotonic() - self._last >= self.every_seconds:
            self._show()
            self._last = time.monotonic()  # after drawing, so that slow drawing never fills the run

    def on_end(self, run: Run) -> None:
        """Draw everything once more."""
        if self.metrics:
            self._show()

    def _show(self) -> None:
        self.picture = loss_curve(self.metrics)
        if not in_notebook():
            return
        from IPython.display import display

        if self._handle is None:
            self._handle = display(self.picture, display_id=True)
        else:
            self._handle.update(self.picture)


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel, which can renew a picture in place."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")
