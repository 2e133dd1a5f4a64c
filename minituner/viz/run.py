"""The curves of a run, from its files: while it trains, after it was killed, joined over all its resumptions.

    work_dirs/mine/runs/20261121-101500/metrics.jsonl     steps 1 .. 57    killed
                        20261121-104200/metrics.jsonl     steps 51 .. 120  resumed from the checkpoint of step 50
    one curve                                             1 .. 50 of the first, 51 .. 120 of the second

A later run replaces everything from its first step on, because that is what training went on from. Files are only read;
a last line that is still being written is left for the next look. Lesson: notebook 07.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from minituner.errors import UsageError
from minituner.viz.loss import running_mean
from minituner.viz.picture import Picture, new_figure
from minituner.viz.style import BLUE, GREEN, ORANGE, PINK, READ, SKY, SMALL, VERMILION, styled

# Below the loss: name in metrics.jsonl, label, colour.
CURVES = (
    ("learning_rate", "learning rate", ORANGE),
    ("grad_norm", "gradient norm", PINK),
    ("tokens_per_second", "tokens/s", GREEN),
)
NAMES = ("loss", *(name for name, _, _ in CURVES), "gemm_share")
ENDINGS = (".png", ".svg", ".pdf")


@styled
def run_curves(work_dir: str | Path) -> Picture:
    """Loss, held-out loss, learning rate, gradient norm and tokens/s of a training, by optimizer step.

    `data` has `steps` (n,) and, as long, loss, learning_rate, grad_norm, tokens_per_second and gemm_share (NaN where a
    line has none); eval_steps and eval_loss (m,); `runs`, the folders joined, and `resumed_at`, the first steps of all
    but the first; and `unreadable`, the number of broken lines left out.

    Raises:
        UsageError: the folder has no runs, or none of them has finished a step.
    """
    lines, evaluations, runs, starts, unreadable = read_runs(Path(work_dir))
    steps = sorted(lines)
    data: dict[str, Any] = {"steps": np.array(steps, dtype=np.int64)}
    for name in NAMES:
        data[name] = np.array([float(lines[step].get(name, "nan")) for step in steps])
    data["eval_steps"] = np.array(sorted(evaluations), dtype=np.int64)
    data["eval_loss"] = np.array([evaluations[step] for step in sorted(evaluations)])
    data |= {"runs": runs, "resumed_at": starts[1:], "unreadable": unreadable}
    return Picture(_draw(data), data, _summary(data))


def read_runs(work_dir: Path) -> tuple[dict[int, dict[str, Any]], dict[int, float], list[str], list[int], int]:
    """Lines by step, held-out losses by step, the runs joined, their first steps, and how many lines are broken.

    Raises:
        UsageError: there is nothing to read.
    """
    files = sorted(work_dir.glob("runs/*/metrics.jsonl"), key=lambda file: _stamp(file.parent.name))
    if not files:
        raise UsageError(
            f"{work_dir} holds no run (runs/*/metrics.jsonl)",
            fix="name the --work-dir of a training, e.g. work_dirs/RECIPE",
        )
    lines: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, float] = {}
    runs, starts, unreadable = [], [], 0
    for file in files:
        read, broken = _read(file)
        unreadable += broken
        trained = {line["step"]: line for line in read if "loss" in line}
        if trained:
            first = min(trained)
            lines = {step: line for step, line in lines.items() if step < first} | trained
            evaluations = {step: loss for step, loss in evaluations.items() if step < first}
            runs.append(file.parent.name)
            starts.append(first)
        evaluations |= {line["step"]: float(line["eval_loss"]) for line in read if "eval_loss" in line}
    if not lines:
        raise UsageError(f"no run in {work_dir} has finished a step yet", fix="wait for the first step, then try again")
    return lines, evaluations, runs, starts, unreadable


def _read(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics.jsonl, and how many are broken; the last one may still be being written."""
    lines, broken = [], 0
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            line = json.loads(text)
            if not isinstance(line["step"], int):
                raise TypeError("step")
            lines.append(line)
        except (ValueError, KeyError, TypeError):
            broken += text.endswith("\n")
    return lines, broken


def _stamp(name: str) -> tuple[str, int]:
    """A run's place in time: `20261121-101500-10` is after `20261121-101500-9`."""
    found = re.fullmatch(r"(\d+-\d+)(?:-(\d+))?", name)
    return (found.group(1), int(found.group(2) or 0)) if found else (name, 0)


def _summary(data: dict[str, Any]) -> str:
    steps, loss = data["steps"], data["loss"]
    text = f"step {steps[-1]}: loss {loss[-1]:.4f}"
    if len(data["eval_loss"]):
        best = int(np.nanargmin(data["eval_loss"])) if np.isfinite(data["eval_loss"]).any() else 0
        text += f"; eval_loss {data['eval_loss'][-1]:.4f}"
        text += f", lowest {data['eval_loss'][best]:.4f} at step {data['eval_steps'][best]}"
    if len(data["runs"]) > 1:
        text += f"; {len(data['runs'])} runs joined"
    if lost := int((~np.isfinite(loss)).sum()):
        text += f"; {lost} steps not finite"
    return text + (f"; {data['unreadable']} broken lines left out" if data["unreadable"] else "")


def _draw(data: dict[str, Any]) -> Any:
    figure = new_figure(8, 7)
    steps, mark = data["steps"], "." if len(data["steps"]) < 50 else ""
    top, *rest = figure.subplots(1 + len(CURVES), 1, sharex=True, height_ratios=[4, *[1.3] * len(CURVES)])
    top.plot(steps, data["loss"], color=SKY, linestyle="-", linewidth=0.8, marker=mark, label="loss of each step")
    top.plot(steps, running_mean(data["loss"]), color=BLUE, linestyle="-", linewidth=2, label="running mean")
    if len(data["eval_steps"]):
        held_out = {"color": VERMILION, "linestyle": "--", "marker": "o", "linewidth": 1.5}
        top.plot(data["eval_steps"], data["eval_loss"], label="eval_loss (held out)", **held_out)
    top.set_ylabel("loss per trained token")
    top.legend()
    top.set_title(_summary(data))
    for axes, (name, label, colour) in zip(rest, CURVES, strict=True):
        axes.plot(steps, data[name], color=colour, linestyle="-", linewidth=1.2, marker=mark)
        axes.set(ylabel=label, ylim=(0, None))
    rest[-1].set_xlabel("optimizer step")
    for axes in (top, *rest):
        for step in data["resumed_at"]:
            axes.axvline(step - 0.5, color=READ, linestyle=":", linewidth=1)
        axes.yaxis.label.set_fontsize(SMALL)
    return figure


def plot(work_dir: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Draw the curves into a file (default WORK_DIR/plot.png); the same facts as plain values, NaN as null.

    Raises:
        UsageError: nothing to draw, a kind of file that is not known, or a place that cannot be written.
    """
    path = Path(out) if out is not None else Path(work_dir) / "plot.png"
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(
            f"cannot draw into {path}: its ending says no kind of picture", fix=f"use {', '.join(ENDINGS)}"
        )
    picture = run_curves(work_dir)
    try:
        picture.save(str(path))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", fix="choose another file with -o") from None
    facts = {key: _plain(value) for key, value in picture.data.items()}
    return {"file": str(path), "summary": picture.summary, **facts}


def _plain(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return [None if isinstance(v, float) and not np.isfinite(v) else v for v in value.tolist()]
