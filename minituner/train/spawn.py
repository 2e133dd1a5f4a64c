"""Ranks for a lesson: one function, run by several processes of this machine, from a notebook.

    results = on_ranks(2, work, 10)                     rank 0   work(ranks, 10) -> results[0]
                                                        rank 1   work(ranks, 10) -> results[1]

`work` lives in a module, because a new process imports it by name (a function typed into a notebook cell cannot be
found there), and returns plain values. Training itself is started by torchrun or srun (launch.py); here the caller
waits and gets what the ranks return. Lesson: notebook 07.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from minituner.collection import collect_seldom
from minituner.errors import MinitunerError, UsageError

PATIENCE = 10.0  # seconds for the other ranks to be heard after one has failed


def on_ranks(world_size: int, work: Callable[..., Any], *arguments: Any, quiet: bool = False) -> list[Any]:
    """Run `work(ranks, *arguments)` on `world_size` ranks over gloo and return what each returned, by rank.

    `quiet` drops what the ranks print. When one fails, the others are stopped.

    Raises:
        UsageError: `work` was typed into a notebook or a script. MinitunerError: a rank failed or was killed.
    """
    if work.__module__ == "__main__":
        raise UsageError(
            f"{work.__qualname__} cannot be sent to other processes: it is defined in the notebook itself",
            fix="put the function into a module (a .py file) and import it",
        )
    import torch.distributed as dist

    # The caller keeps the address book, as torchrun's agent does: it takes a free port, and no rank has to guess one.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world_size)),
    }
    context = multiprocessing.get_context("spawn")
    processes, ends = [], []
    try:
        for rank in range(world_size):
            end, theirs = context.Pipe(duplex=False)
            place = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_rank, args=(theirs, place, quiet, work, arguments), daemon=True)
            process.start()
            theirs.close()  # held by the rank alone: its death is then read as the end of the pipe
            processes.append(process)
            ends.append(end)
        return _collect(processes, ends)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()


def _collect(processes: list[Any], ends: list[Connection]) -> list[Any]:
    """What each rank returns.

    When one fails, the ranks that were waiting for it fail too, and may be heard first: they get a moment, and the
    one that did not just lose contact is raised.
    """
    results: dict[int, Any] = {}
    failures: list[tuple[bool, str]] = []
    waiting = {end: rank for rank, end in enumerate(ends)}
    while waiting and (ready := wait(list(waiting), timeout=PATIENCE if failures else None)):
        for end in ready:
            rank = waiting.pop(end)
            try:
                good, value = end.recv()
            except EOFError:
                processes[rank].join()
                failures.append((False, _killed(rank, processes[rank].exitcode)))
                continue
            if good:
                results[rank] = value
            else:
                lost, text = value
                failures.append((lost, f"rank {rank} failed: {text}"))
    if failures:
        raise MinitunerError(min(failures)[1])
    return [results[rank] for rank in range(len(ends))]


def _killed(rank: int, status: int) -> str:
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"left with exit status {status}"
    return f"rank {rank} {how} before it returned anything"


def _rank(end: Connection, place: dict[str, str], quiet: bool, work: Callable[..., Any], arguments: tuple) -> None:
    """In the new process: know its place, meet the others, work, and send back what came out."""
    os.environ.update(place)
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    collect_seldom()
    import torch

    from minituner.train.launch import world_of
    from minituner.train.ranks import Ranks

    torch.set_num_threads(int(place["OMP_NUM_THREADS"]))
    ranks = Ranks(world_of())
    try:
        ranks.join()
        answer = (True, work(ranks, *arguments))
    except MinitunerError as error:
        answer = (False, ("lost contact" in error.what, error.text()))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place_of = f"line {last.lineno} of {os.path.basename(last.filename)}"
        answer = (False, (False, f"{type(error).__name__}: {error} ({place_of})"))
    with suppress(BrokenPipeError):  # the caller has stopped listening: another rank failed first
        end.send(answer)
    ranks.leave()
