"""A Slurm for one machine, as far as a training job can see: sbatch, srun, scontrol requeue, and pre-emption.

    cluster = FakeSlurm(folder)
    cluster.sbatch(job.sh, job_id=..)            runs the script, and again each time it asks for a requeue
        preempt(lambda: condition)               sends SIGTERM to every rank once, when the condition holds

`srun` and `scontrol` are small programs in a folder that is first in PATH; srun sets the SLURM_* variables of each
task, passes SIGTERM on, and leaves with the highest status of its tasks, as the real one does.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SRUN = """
import os, pathlib, signal, subprocess, sys
command = [a for a in sys.argv[1:]]
while command and command[0].startswith("--"):
    command.pop(0)
tasks = [
    subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
    for rank in range(int(os.environ["SLURM_NTASKS"]))
]
def all_ranks(number, frame):
    for task in tasks:
        if task.poll() is None:
            task.send_signal(number)
signal.signal(signal.SIGTERM, all_ranks)
place = pathlib.Path(os.environ["FAKE_SLURM"])
(place / "srun.pid.part").write_text(str(os.getpid()))
(place / "srun.pid.part").rename(place / "srun.pid")
statuses = [task.wait() for task in tasks]
(place / "srun.pid").unlink()
sys.exit(max(128 - status if status < 0 else status for status in statuses))
"""

SCONTROL = """
import os, pathlib, sys
verb, job = sys.argv[1:]
assert verb == "requeue" and job == os.environ["SLURM_JOB_ID"], sys.argv
(pathlib.Path(os.environ["FAKE_SLURM"]) / "requeue").touch()
"""


class FakeSlurm:
    """One node, one queue, one job at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        self.starts, self.output = 0, ""
        for name, code in (("srun", SRUN), ("scontrol", SCONTROL)):
            file = self.bin / name
            file.write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
            file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def sbatch(
        self, script: Path, cwd: Path, port: int, preempt: Callable[[], bool] = lambda: False, patience: float = 120
    ) -> int:
        """Run the script until it no longer asks to be queued again; its last exit status."""
        options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script.read_text(), re.MULTILINE))
        environment = {
            **os.environ,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "FAKE_SLURM": str(self.folder),
            "SLURM_JOB_ID": str(port - 20000),  # minituner derives the port from the job's number
            "SLURM_JOB_NODELIST": "127.0.0.1",
            "SLURM_NTASKS": str(int(options["nodes"]) * int(options["ntasks-per-node"])),
            "OMP_NUM_THREADS": "1",
            "MINITUNER_HOME": str(cwd / "home"),
        }
        preempted, deadline = False, time.monotonic() + patience
        while True:
            self.starts += 1
            with (self.folder / "job.txt").open("ab") as stream:
                job = subprocess.Popen(["bash", str(script)], cwd=cwd, env=environment, stdout=stream, stderr=stream)
            while job.poll() is None:
                assert time.monotonic() < deadline, (self.folder / "job.txt").read_text()
                if not preempted and preempt():
                    os.kill(int((self.folder / "srun.pid").read_text()), signal.SIGTERM)
                    preempted = True
                time.sleep(0.005)
            self.output = (self.folder / "job.txt").read_text(encoding="utf-8")
            if not (self.folder / "requeue").exists():
                return job.returncode
            (self.folder / "requeue").unlink()
