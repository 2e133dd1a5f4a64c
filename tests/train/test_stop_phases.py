"""A stop asked of one of two ranks, at any phase: both agree, save within a step, and leave with the same status.

The signal is a real one, sent by the rank to itself at the first line of the phase, so that a busy machine cannot move
it into another phase. Preparing, training by SIGTERM and Ctrl-C: see test_ranks.py too.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from minituner.train import checkpoint, evaluation, loop
from minituner.train import run as run_module
from tests.tiny import tiny_recipe, write_chats
from tests.train.processes import Process, command_line, finish_all, rank_environments, run_command

# phase -> the function that is entered in it, and which entry of it is meant: the windows have 2 micro-batches, the
# held-out records are 2 for each rank (4 for one alone), and they are measured before the first step and every second.
PLACES: dict[str, tuple[Any, str, int]] = {
    "preparing": (run_module, "load_tokenizer", 1),
    "training": (loop, "loss_sum", 6),
    "evaluating": (evaluation, "loss_sum", 5),
    "evaluating at the start": (evaluation, "loss_sum", 2),
    "saving": (loop, "save", 1),
}
# The step of the checkpoint that is then left; the one after a save, an evaluation, sees that a stop was asked for.
STEPS = {"training": 3, "evaluating": 4, "saving": 2}


def signalled(arguments: list[str], phase: str, number: int, victim: int) -> None:
    """The command line; rank `victim` sends itself a signal when it enters the phase."""
    module, name, entry = PLACES[phase]
    real, entries = getattr(module, name), 0

    def entered(*given: Any, **named: Any) -> Any:
        nonlocal entries
        entries += 1
        if entries == entry:
            os.kill(os.getpid(), number)
        return real(*given, **named)

    if int(os.environ.get("RANK", "0")) == victim:
        setattr(module, name, entered)
    command_line(arguments)


def start(place: Path, *more: str) -> list[str]:
    return ["train", "r.yaml", "--work-dir", "w", *more]


def stopped(place: Path, phase: str, number: int, victim: int) -> tuple[list[int], str]:
    return finish_all(
        [
            Process(signalled, start(place), phase, number, victim, cwd=place, environment=environment)
            for environment in rank_environments()
        ]
    )


@pytest.fixture
def place(model_folder: Path, tmp_path: Path) -> Path:
    """A folder with r.yaml: 6 steps with dropout, evaluated and saved every second."""
    recipe = tiny_recipe(
        model_folder,
        write_chats(tmp_path / "chats.jsonl", count=20),
        data={"packing": "none", "holdout": 0.2},
        train={"max_steps": 6},
        method={"lora_dropout": 0.3},
        evaluate={"every_steps": 2, "prompts": []},
        save={"every_steps": 2},
    )
    recipe.dump(tmp_path / "r.yaml")
    return tmp_path


CASES = [
    ("preparing", signal.SIGUSR1, 0),
    ("preparing", signal.SIGTERM, 1),
    ("training", signal.SIGTERM, 0),
    ("training", signal.SIGUSR1, 1),
    ("evaluating", signal.SIGTERM, 1),
    ("evaluating", signal.SIGINT, 0),
    ("evaluating at the start", signal.SIGUSR1, 1),
    ("saving", signal.SIGINT, 1),
    ("saving", signal.SIGUSR1, 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "number", "victim"), CASES)
def test_one_rank_is_asked_and_both_stop(phase: str, number: signal.Signals, victim: int, place: Path) -> None:
    status = 130 if number == signal.SIGINT else 75
    statuses, output = stopped(place, phase, number, victim)
    assert statuses == [status, status], output
    assert "Traceback" not in output
    if phase not in STEPS:
        assert output.count("nothing had to be saved") == 1, output
        assert not (place / "w" / "checkpoints").exists()
        return
    assert output.count("stopped after step") == 1, output
    assert f"stopped after step {STEPS[phase]} of 6" in output
    assert checkpoint.state_of(checkpoint.find(place / "w", "auto", print))["step"] == STEPS[phase]


@pytest.mark.slow
def test_stopped_while_evaluating_and_resumed_is_as_if_never_stopped(place: Path) -> None:
    """One process; no save was due at the step that it stops after, so the checkpoint is written on leaving."""
    only_at_the_end = "save.every_steps=null"
    for phase, number, status, step in (("evaluating", signal.SIGTERM, 75, 2), ("training", signal.SIGINT, 130, 5)):
        arguments = start(place, only_at_the_end, "--resume", "if-any")
        process = Process(signalled, arguments, phase, number, 0, cwd=place)
        assert process.finish() == status, process.output
        assert checkpoint.state_of(checkpoint.find(place / "w", "auto", print))["step"] == step
    assert run_command(start(place, only_at_the_end, "--resume", "auto"), place)[0] == 0
    assert run_command(["train", "r.yaml", only_at_the_end, "--work-dir", "straight"], place)[0] == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [place / work_dir / "checkpoints" / "step-000006" / name for work_dir in ("w", "straight")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
