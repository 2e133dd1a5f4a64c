"""The curves of the bug museum: the clean run and the broken one side by side, over the same axes.

    clean     \\__        packed-leak  \\__         which one is wrong? The curve does not say;
                 \\___                    \\__       the fault's tool does (minituner museum FAULT RECIPE)

Lessons: notebooks 03, 04, 05, 07 and 09.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minituner.errors import UsageError
from minituner.viz.picture import Picture, new_figure
from minituner.viz.style import BAD, BLUE, styled

CLEAN, BROKEN = BLUE, BAD
Metrics = Sequence[Mapping[str, Any]]
FALLS = 0.05  # a curve falls if its last third is below its first by this share


@styled
def museum_curves(clean: Metrics, broken: Mapping[str, Metrics]) -> Picture:
    """Training loss by step: one field for the clean run, one for each fault, all with the same axes.

    Args:
        clean: a run's metrics (`TrainResult.metrics`, or the lines of metrics.jsonl).
        broken: the same of each run with a fault, by the fault's name.

    `data` has `steps` and `loss` (n,) under `clean` and under each fault, and `falls`: name -> does the curve fall.

    Raises:
        UsageError: there are no metrics, or there is no broken run.
    """
    runs: dict[str, Metrics] = {"clean": clean, **broken}
    if not broken or not all(runs.values()):
        raise UsageError("museum_curves needs the metrics of a clean run and of at least one broken one")
    data: dict[str, Any] = {
        name: {"steps": _column(metrics, "step"), "loss": _column(metrics, "loss")} for name, metrics in runs.items()
    }
    data["falls"] = {name: falls(data[name]["loss"]) for name in runs}
    figure = new_figure(min(2.9 * len(runs), 9), 2.5)
    fields = figure.subplots(1, len(runs), sharex=True, sharey=True)
    good = data["clean"]
    for axes, name in zip(fields, runs, strict=True):
        own = name == "clean"
        color, linestyle, marker = (CLEAN, "-", "o") if own else (BROKEN, "--", "X")
        if not own:  # to compare with, thin
            axes.plot(good["steps"], good["loss"], color=CLEAN, linestyle="-", linewidth=0.8, alpha=0.6)
        loss = data[name]["loss"]
        axes.plot(data[name]["steps"], loss, color=color, linestyle=linestyle, marker=marker, markersize=4)
        verdict = "falls" if data["falls"][name] else "does not fall"
        axes.set_title(f"{name}: {verdict}", color=color)
        axes.set_xlabel("optimizer step")
    fields[0].set_ylim(0, 1.05 * max(float(np.max(data[name]["loss"], initial=0.1)) for name in runs))
    fields[0].set_ylabel("loss per trained token")
    last = "; ".join(
        f"{name} {data[name]['loss'][0]:.3f} to {data[name]['loss'][-1]:.3f}"
        f" ({'falls' if data['falls'][name] else 'does not fall'})"
        for name in runs
    )
    return Picture(figure, data, f"training loss: {last}")


def falls(loss: np.ndarray) -> bool:
    """Whether the mean of the last third of `loss` (n,) is clearly below the mean of its first third."""
    third = max(1, len(loss) // 3)
    first, last = float(loss[:third].mean()), float(loss[-third:].mean())
    return last < first * (1 - FALLS)


def _column(metrics: Metrics, key: str) -> np.ndarray:
    return np.array([float(line[key]) for line in metrics if key in line])
