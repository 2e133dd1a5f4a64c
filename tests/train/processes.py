"""Real processes for the tests that kill: forked from a server that has imported torch once, so each starts in no time.

run = Command(["train", "r.yaml"], cwd)      the command line, in a process of its own
run.wait_for_step(3);  run.send(SIGKILL)     a real signal, whatever the process is doing
run.finish() -> exit status;  run.output     everything it printed
ranks_of(["train", "r.yaml"], cwd)           the same command on two ranks, as torchrun would start them
with forked_ranks(): on_ranks(2, work)       a lesson's ranks, without importing torch anew in each
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.train.preloaded"])
PATIENCE = 90.0  # seconds; a process takes two or three on an idle machine


def _target(
    work: Callable[..., object],
    arguments: tuple[Any, ...],
    cwd: str,
    output: str,
    environment: dict[str, str],
) -> None:
    """In the child: its own folder, output file and cache, then the work."""
    os.chdir(cwd)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    work(*arguments)


def command_line(arguments: list[str], largest_file: int | None = None) -> None:
    """What the console script does; `largest_file` (bytes) makes larger writes fail, as on a full disk."""
    from minituner.cli import main

    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["minituner", *arguments]
    main()


class Process:
    """A function running in a process of its own."""

    def __init__(
        self, work: Callable[..., object], *arguments: Any, cwd: Path, environment: dict[str, str] | None = None
    ) -> None:
        self.log = cwd / f"output-{time.monotonic_ns()}.txt"
        environment = {"MINITUNER_HOME": str(cwd / "home"), **(environment or {})}
        self.process = CONTEXT.Process(target=_target, args=(work, arguments, str(cwd), str(self.log), environment))
        self.process.start()

    @property
    def output(self) -> str:
        """Everything printed so far, on stdout and stderr."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)

    def wait_until(self, happened: Callable[[], bool]) -> bool:
        """Wait until something happened (True), or the process ended without it (False)."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if not self.process.is_alive():
                return happened()
            assert time.monotonic() < deadline, f"nothing happened in {PATIENCE} s; output:\n{self.output}"
            time.sleep(0.002)
        return True

    def wait_for_text(self, text: str) -> bool:
        """Wait until the output holds `text`."""
        return self.wait_until(lambda: text in self.output)

    def finish(self) -> int:
        """Wait for the end; the exit status (negative: the signal that killed it)."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {PATIENCE} s; output:\n{self.output}")
        return int(self.process.exitcode or 0)


class Command(Process):
    """`minituner ARGUMENTS` in a process of its own."""

    def __init__(
        self,
        arguments: list[str],
        cwd: Path,
        largest_file: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.arguments = arguments
        super().__init__(command_line, [str(a) for a in arguments], largest_file, cwd=cwd, environment=environment)

    def wait_for_step(self, work_dir: Path, step: int) -> bool:
        """Wait until the newest run in `work_dir` has logged `step`."""

        def reached() -> bool:
            logs = sorted(work_dir.glob("runs/*/metrics.jsonl"), key=lambda p: p.stat().st_mtime_ns)
            return bool(logs) and f'"step": {step},' in logs[-1].read_text(encoding="utf-8")

        return self.wait_until(reached)


def run_command(arguments: list[str], cwd: Path) -> tuple[int, str]:
    """Run `minituner ARGUMENTS` to its end; exit status and output."""
    command = Command(arguments, cwd)
    status = command.finish()
    return status, command.output


def rank_environments(world_size: int = 2) -> list[dict[str, str]]:
    """What torchrun tells each rank, on a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(world_size)]


def ranks_of(arguments: list[str], cwd: Path, world_size: int = 2) -> list[Command]:
    """`minituner ARGUMENTS` on several ranks of this machine."""
    return [Command(arguments, cwd, environment=environment) for environment in rank_environments(world_size)]


@contextmanager
def forked_ranks() -> Iterator[None]:
    """Let `on_ranks` fork its ranks from the server; all else is its own. They have the server's environment."""
    with mock.patch("minituner.train.spawn.multiprocessing", SimpleNamespace(get_context=lambda method: CONTEXT)):
        yield


def finish_all(ranks: list[Command]) -> tuple[list[int], str]:
    """Wait for all ranks; their exit statuses, and what they printed one after the other."""
    statuses = [rank.finish() for rank in ranks]
    return statuses, "".join(f"--- rank {number}\n{rank.output}" for number, rank in enumerate(ranks))
