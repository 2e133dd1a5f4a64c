"""Slurm: a script that trains, survives pre-emption and time limits, and needs nobody to start it again.

    sbatch job.sh -> srun -> ranks ... SIGTERM to every rank (300 s before the end, or on pre-emption)
                                       -> agreed, checkpoint, exit 75 -> scontrol requeue -> the same script
                                                                         --resume if-any: from that checkpoint

`--signal=TERM@300` has no `B:` in front, so that Slurm signals the ranks; with it only the batch shell would hear of
it. `--resume if-any` and not `auto`: the first start has nothing to resume. `--wait=60` and not `--kill-on-bad-exit`:
the latter kills the other ranks as soon as the first has left with 75, and the job's status would be the kill's.
Lesson: notebook 07.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minituner.errors import UsageError

TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm; `gpus` and `cpus` are per machine and per rank."""

    name: str
    nodes: int = 1
    gpus: int = 1
    time: str = "24:00:00"
    partition: str | None = None
    cpus: int | None = None
    account: str | None = None


def sbatch_script(recipe: str, overrides: Sequence[str], work_dir: Path, job: Job) -> str:
    """The text of an sbatch script for a recipe.

    Raises:
        UsageError: a time that Slurm does not read, or a name with a line break in it.
    """
    if not TIME.fullmatch(job.time):
        raise UsageError(f"--time {job.time!r} is not a Slurm time", fix="hours:minutes:seconds, or days-hours:minutes")
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": max(job.gpus, 1),
        "gpus-per-node": job.gpus or None,
        "cpus-per-task": job.cpus,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "output": "%x-%j.txt",  # beside the script: Slurm loses the output if it cannot open the file at the start
        "open-mode": "append",
        "signal": "TERM@300",
    }
    if wrong := [key for key, value in options.items() if "\n" in str(value)]:
        raise UsageError(f"--{wrong[0]}: a line break is not possible in an sbatch script")
    lines = [f"#SBATCH --{key}={_quoted(str(value))}" for key, value in options.items() if value is not None]
    command = shlex.join(
        [
            *("srun", "--wait=60", sys.executable, "-m", "minituner", "train", recipe, *overrides),
            *("--work-dir", str(work_dir), "--launcher", "slurm", "--resume", "if-any"),
        ]
    )
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            "",
            "# The ranks hear SIGTERM (time limit, pre-emption), save, and leave with 75; the job then queues again.",
            "trap : TERM",
            command,
            "status=$?",
            'if [ "$status" -eq 75 ]; then',
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$status"',
            "",
        ]
    )


def _quoted(value: str) -> str:
    """A value as sbatch reads it: in double quotes where there is a space."""
    return f'"{value}"' if re.search(r"\s", value) else value
