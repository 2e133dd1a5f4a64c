"""Trackers: the numbers of metrics.jsonl in TensorBoard or Weights & Biases too (`log.to: [tensorboard, wandb]`).

    {"step": 7, "loss": 2.1, "grad_norm": 0.8}   ->   loss at 7, grad_norm at 7        every number, under its own name

A package that is missing is said before anything is loaded, not after an hour of preparing. Numbers that are not finite
go along (TensorBoard draws them as triangles). Lesson: notebook 07.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from minituner.errors import UsageError

if TYPE_CHECKING:
    from minituner.train.run import Run


class Tracker(Protocol):
    """A place that numbers go to."""

    def log(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        UsageError: with the command that installs them.
    """
    missing = [name for name in dict.fromkeys(names) if not _installed(name)]
    if missing:
        raise UsageError(
            f"log.to names {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            fix="install it, or set log.to=[] (metrics.jsonl is always written; minituner plot draws it)",
            next_command=f"pip install {' '.join(missing)}",
        )


def _installed(name: str) -> bool:
    return sys.modules[name] is not None if name in sys.modules else importlib.util.find_spec(name) is not None


def open_tracker(name: str, run: Run) -> Tracker:
    """The tracker of that name, writing for this run."""
    return TensorBoard(run) if name == "tensorboard" else Wandb(run)


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir work_dirs`."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(run.run_dir))

    def log(self, line: Mapping[str, Any]) -> None:
        """Write a step's numbers."""
        for key, value in _numbers(line).items():
            self.board.add_scalar(key, value, line["step"])

    def close(self) -> None:
        """Write what is still in memory."""
        self.board.close()


class Wandb:
    """A run on Weights & Biases; the runs of one resumed training share a group."""

    def __init__(self, run: Run) -> None:
        import wandb

        self.session = wandb.init(
            project="minituner",
            name=f"{run.recipe.name} {run.run_dir.name}",
            group=run.work_dir.name,
            dir=str(run.run_dir),
            config=run.recipe.model_dump(mode="json"),
        )

    def log(self, line: Mapping[str, Any]) -> None:
        """Send a step's numbers."""
        self.session.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        """Send what is left."""
        self.session.finish()


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key != "step" and isinstance(value, (int, float))}
