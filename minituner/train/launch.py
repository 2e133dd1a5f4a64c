"""Launching: how one command becomes several processes, and how each of them learns who it is.

    minituner train R                        one process
    NPROC_PER_NODE=2 minituner train R       torchrun's agent, in this process, starts two ranks with this interpreter
    torchrun --nproc-per-node 2 -m minituner train R
    srun minituner train R --launcher slurm  rank and address from Slurm's variables

                     +-- rank 0     a signal to `minituner` reaches every rank; all ranks save and leave together, and
    minituner -------+              `minituner` leaves with their exit status (torchrun itself turns every one into 1)
                     +-- rank 1

`World` is what a process knows: its rank, how many there are, and its rank on this machine. Lesson: notebook 07.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, get_args

from minituner.errors import MinitunerError, UsageError, nearest

Launcher = Literal["none", "torchrun", "pytorch", "slurm"]
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class World:
    """Who this process is among those that train together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True for the one process that prints and writes what all of them share."""
        return self.rank == 0


def check_launcher(name: str) -> Launcher:
    """The launcher of that name.

    Raises:
        UsageError: there is none.
    """
    known = get_args(Launcher)
    if name not in known:
        raise UsageError(f"--launcher {name}: unknown; {nearest(name, known) or 'known: ' + ', '.join(known)}")
    return name  # type: ignore[return-value]


def world_of(launcher: Launcher = "none", environment: Mapping[str, str] | None = None) -> World:
    """This process's place, from torchrun's or Slurm's variables; alone when there are none.

    Under Slurm it also sets MASTER_ADDR and MASTER_PORT, which torch.distributed reads.

    Raises:
        UsageError: a launcher was named but its variables are missing, or are not numbers that fit together.
    """
    given = os.environ if environment is None else environment
    if launcher == "slurm":
        needed = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        if missing := [name for name in needed if name not in given]:
            raise UsageError(
                f"--launcher slurm: {', '.join(missing)} not set",
                why="the command was not started by srun",
                fix="srun minituner train RECIPE --launcher slurm",
                next_command="minituner launch slurm RECIPE",
            )
        if environment is None:
            os.environ.setdefault("MASTER_ADDR", first_host(given.get("SLURM_JOB_NODELIST", "127.0.0.1")))
            # Two jobs on one node must not meet: the port follows from the job's number.
            os.environ.setdefault("MASTER_PORT", str(20000 + int(given.get("SLURM_JOB_ID", "0")) % 10000))
        return _world(given, needed)
    if "RANK" in given and "WORLD_SIZE" in given:
        return _world({"LOCAL_RANK": "0", **given}, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if launcher in ("torchrun", "pytorch"):
        raise UsageError(
            f"--launcher {launcher}: RANK and WORLD_SIZE are not set",
            why="the command was not started by torchrun",
            fix="NPROC_PER_NODE=2 minituner train RECIPE starts torchrun itself",
        )
    return World()


def _world(given: Mapping[str, str], names: tuple[str, str, str]) -> World:
    numbers = [_whole(given, name, minimum=1 if i == 1 else 0) for i, name in enumerate(names)]
    if numbers[0] >= numbers[1]:
        raise UsageError(f"{names[0]}={numbers[0]} with {names[1]}={numbers[1]}: ranks count from 0")
    return World(*numbers)


def _whole(given: Mapping[str, str], name: str, minimum: int) -> int:
    text = given[name]
    if not text.isdecimal() or int(text) < minimum:
        raise UsageError(f"{name}={text!r} is not a whole number of at least {minimum}")
    return int(text)


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: `gpu[03-05,9]` -> `gpu03`, `a,b` -> `a`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", node_list)
    if not match:
        raise UsageError(f"cannot read the Slurm node list {node_list!r}", fix="set MASTER_ADDR yourself")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")


def torchrun_options(launcher: Launcher = "none", environment: Mapping[str, str] | None = None) -> list[str] | None:
    """What to tell torchrun when NPROC_PER_NODE or NNODES ask for ranks; None when this process should train itself.

    NODE_RANK, ADDR and PORT are read too, as the ancestor's users know them.

    Raises:
        UsageError: they are not numbers, do not fit together, or ADDR is missing.
    """
    given = {"NNODES": "1", "NPROC_PER_NODE": "1", "NODE_RANK": "0", "PORT": "29500"}
    given |= os.environ if environment is None else environment
    if "RANK" in given or launcher == "slurm":  # started by a launcher already
        return None
    nodes, each = _whole(given, "NNODES", 1), _whole(given, "NPROC_PER_NODE", 1)
    if nodes == 1 and each == 1:
        return None
    if nodes == 1:
        return ["--standalone", f"--nproc-per-node={each}"]  # one machine: torchrun picks a free port
    node, port = _whole(given, "NODE_RANK", 0), _whole(given, "PORT", 1)
    if "ADDR" not in given:
        raise UsageError(
            "NNODES is above 1 but ADDR is not set",
            fix="on every machine: NNODES=2 NODE_RANK=<0, 1, ...> ADDR=<first machine> PORT=<port> NPROC_PER_NODE=8",
        )
    if node >= nodes:
        raise UsageError(f"NODE_RANK={node} with NNODES={nodes}: machines count from 0")
    return [
        f"--nnodes={nodes}",
        f"--node-rank={node}",
        f"--master-addr={given['ADDR']}",
        f"--master-port={port}",
        f"--nproc-per-node={each}",
    ]


def ranks_asked(launcher: Launcher = "none", environment: Mapping[str, str] | None = None) -> int | None:
    """How many ranks train together once this command has started them, or has been started as the first of them.

    None on every other rank, so that what does not fit this number is said once.

    Raises:
        UsageError: the launch variables are wrong.
    """
    if torchrun_options(launcher, environment) is None:
        world = world_of(launcher, environment)
        return world.world_size if world.is_main else None
    given = {"NNODES": "1", "NPROC_PER_NODE": "1"} | dict(os.environ if environment is None else environment)
    return _whole(given, "NNODES", 1) * _whole(given, "NPROC_PER_NODE", 1)


def relaunch(arguments: Sequence[str], launcher: Launcher = "none") -> int | None:
    """Start the ranks that the environment asks for and wait; returns their exit status, or None to go on alone.

    Raises:
        UsageError: the launch variables are wrong. MinitunerError: a rank was killed.
    """
    options = torchrun_options(launcher)
    return None if options is None else _start_ranks([*options, "-m", "minituner", *arguments])


def _start_ranks(torchrun_arguments: Sequence[str]) -> int:
    """Be torchrun: start the ranks, pass signals on to them, wait for all; returns the exit status they agree on."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    parsed = parse_args(list(torchrun_arguments))
    if parsed.standalone:  # what torchrun itself does: any free port of this machine
        parsed.rdzv_backend, parsed.rdzv_endpoint, parsed.rdzv_id = "c10d", "localhost:0", str(os.getpid())
    # torchrun would say one thread for each rank; share the cores instead.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(parsed.nproc_per_node))))
    # Its log would call a rank that stopped as asked (75) a failure; what fails is said here, and by the ranks.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config, command, command_arguments = config_from_args(parsed)
    outcome: dict[str, Any] = {}

    def agent() -> None:
        try:
            elastic_launch(config, command)(*command_arguments)
        except ChildFailedError as error:
            outcome["failed"] = error
        except BaseException as error:  # told to the main thread, which raises it
            outcome["error"] = error

    # In a thread, torch's agent leaves signals alone. In the main thread it would kill ranks 30 s after a SIGTERM,
    # however long their checkpoint takes to write.
    thread = threading.Thread(target=agent, name="torchrun")
    before = {number: signal.signal(number, _pass_on) for number in FORWARDED}
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if "error" in outcome:
        raise MinitunerError(f"the ranks could not be started: {outcome['error']}") from outcome["error"]
    return _status_of(outcome["failed"]) if "failed" in outcome else 0


def _pass_on(number: int, _frame: FrameType | None) -> None:
    """Hand a signal to every process that this one started: the ranks (they have terminals' Ctrl-C from here only)."""
    import psutil

    for child in psutil.Process().children():
        try:
            child.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _status_of(failed: Any) -> int:
    """The exit status of the rank that left first; the agent has stopped the others after that."""
    rank, failure = failed.get_first_failure()
    if failure.exitcode > 0:  # that rank has said why
        return failure.exitcode
    raise MinitunerError(
        f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}",
        why="often the machine ran out of memory (dmesg says so)",
        fix="start the same command again with --resume if-any: it goes on from the last checkpoint",
    )
