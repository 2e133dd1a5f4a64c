"""Launching: how one command becomes several processes, and how each of them learns who it is.

    minituner train R                        one process
    NPROC_PER_NODE=2 minituner train R       starts torchrun with the running interpreter, two processes here
    torchrun --nproc-per-node 2 -m minituner train R
    srun minituner train R --launcher slurm  rank and address from Slurm's variables

`World` is what a process knows: its rank, how many there are, and its rank on this machine. Lesson: notebook 07.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from minituner.errors import UsageError

Launcher = Literal["none", "torchrun", "pytorch", "slurm"]


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


def world_of(launcher: Launcher = "none", environment: Mapping[str, str] | None = None) -> World:
    """This process's place, from torchrun's or Slurm's variables; alone when there are none.

    Under Slurm it also sets MASTER_ADDR and MASTER_PORT, which torch.distributed reads.

    Raises:
        UsageError: a launcher was named but its variables are missing.
    """
    given = os.environ if environment is None else environment
    if launcher == "slurm":
        needed = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        if missing := [name for name in needed if name not in given]:
            raise UsageError(
                f"--launcher slurm: {', '.join(missing)} not set",
                why="the command was not started by srun",
                fix="srun minituner train RECIPE --launcher slurm",
            )
        if environment is None:
            os.environ.setdefault("MASTER_ADDR", first_host(given.get("SLURM_JOB_NODELIST", "127.0.0.1")))
            # Two jobs on one node must not meet: the port follows from the job's number.
            os.environ.setdefault("MASTER_PORT", str(20000 + int(given.get("SLURM_JOB_ID", "0")) % 10000))
        return World(*(int(given[name]) for name in needed))
    if "RANK" in given and "WORLD_SIZE" in given:
        return World(int(given["RANK"]), int(given["WORLD_SIZE"]), int(given.get("LOCAL_RANK", "0")))
    if launcher in ("torchrun", "pytorch"):
        raise UsageError(
            f"--launcher {launcher}: RANK and WORLD_SIZE are not set",
            why="the command was not started by torchrun",
            fix="NPROC_PER_NODE=2 minituner train RECIPE starts torchrun itself",
        )
    return World()


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: `gpu[03-05,9]` -> `gpu03`, `a,b` -> `a`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", node_list)
    if not match:
        raise UsageError(f"cannot read the Slurm node list {node_list!r}", fix="set MASTER_ADDR yourself")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")


def torchrun_command(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str] | None:
    """The torchrun command that NPROC_PER_NODE or NNODES ask for, or None when this process should train itself.

    NODE_RANK, ADDR and PORT are read too, as the ancestor's users know them.
    """
    given = os.environ if environment is None else environment
    if "RANK" in given or "slurm" in arguments:  # started by a launcher already
        return None
    try:
        nodes, each = int(given.get("NNODES", "1")), int(given.get("NPROC_PER_NODE", "1"))
    except ValueError:
        raise UsageError("NNODES and NPROC_PER_NODE must be whole numbers") from None
    if nodes == 1 and each == 1:
        return None
    place = ["--standalone"]  # one machine: torchrun picks a free port
    if nodes > 1:
        if "ADDR" not in given:
            raise UsageError(
                "NNODES is above 1 but ADDR is not set", fix="ADDR=<first machine> PORT=<port> NODE_RANK=<n>"
            )
        place = [
            f"--nnodes={nodes}",
            f"--node-rank={given.get('NODE_RANK', '0')}",
            f"--master-addr={given['ADDR']}",
            f"--master-port={given.get('PORT', '29500')}",
        ]
    return [
        sys.executable, "-m", "torch.distributed.run", *place, f"--nproc-per-node={each}", "-m", "minituner", *arguments,
    ]  # fmt: skip


def relaunch(arguments: Sequence[str]) -> int | None:
    """Start torchrun if the environment asks for it; returns its exit status, or None to go on in this process."""
    command = torchrun_command(arguments)
    return None if command is None else subprocess.run(command, check=False).returncode
