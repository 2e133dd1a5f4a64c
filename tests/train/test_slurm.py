"""Slurm: the script is one that bash and sbatch read, and a job that is pre-empted ends as if it had not been."""

from __future__ import annotations

import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from minituner.errors import UsageError
from minituner.train.slurm import Job, sbatch_script
from tests.tiny import tiny_recipe, write_chats
from tests.train.fake_slurm import FakeSlurm
from tests.train.processes import finish_all, ranks_of, run_command


def script_of(job: Job | None = None, work_dir: Path = Path("work_dirs/tiny")) -> str:
    return sbatch_script("my recipe.yaml", ["train.seed=1", "data.system=你好 吗"], work_dir, job or Job("tiny"))


def test_the_script_asks_for_what_was_asked_and_bash_reads_it() -> None:
    text = script_of(Job("tiny", nodes=2, gpus=8, time="1-12:00:00", partition="a100", cpus=6, account="lab"))
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    for option in (
        *("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "time=1-12:00:00", "partition=a100", "cpus-per-task=6"),
        *("account=lab", "job-name=tiny", "requeue", "signal=TERM@300", "open-mode=append"),
    ):
        assert f"#SBATCH --{option}" in lines
    last_option = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last_option + 1]), "sbatch stops reading at the first command"
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    words = shlex.split(next(line for line in lines if line.startswith("srun")))
    assert words[3:] == [
        *("-m", "minituner", "train", "my recipe.yaml", "train.seed=1", "data.system=你好 吗"),
        *("--work-dir", "work_dirs/tiny", "--launcher", "slurm", "--resume", "if-any"),
    ]


def test_what_was_not_asked_for_is_not_in_the_script() -> None:
    text = script_of(Job("tiny", gpus=0))
    assert "--ntasks-per-node=1" in text
    assert not any(word in text for word in ("gpus", "partition", "cpus-per-task", "account"))
    assert "--work-dir '/a b'" in script_of(work_dir=Path("/a b"))
    assert '#SBATCH --partition="a b"' in script_of(Job("tiny", partition="a b"))


@pytest.mark.parametrize("time", ["tomorrow", "1:00:00\n#SBATCH --exclusive", "", "1-"])
def test_a_time_that_slurm_does_not_read_is_refused(time: str) -> None:
    with pytest.raises(UsageError, match="is not a Slurm time"):
        script_of(Job("tiny", time=time))


def test_a_line_break_cannot_get_into_the_script() -> None:
    with pytest.raises(UsageError, match="--partition: a line break"):
        script_of(Job("tiny", partition="a\nrm -r x"))


@pytest.fixture
def place(model_folder: Path, tmp_path: Path) -> Path:
    """A folder with r.yaml: 40 steps with dropout, a checkpoint only when asked to stop."""
    chats = write_chats(tmp_path / "chats.jsonl", count=13)
    recipe = tiny_recipe(
        model_folder, chats, data={"packing": "none"}, train={"max_steps": 40}, method={"lora_dropout": 0.2}
    )
    recipe.dump(tmp_path / "r.yaml")
    return tmp_path


@pytest.mark.slow
def test_the_command_writes_it_and_wrong_ones_are_exit_2(place: Path) -> None:
    status, output = run_command(["launch", "slurm", "r.yaml", "--nodes", "2", "--gpus", "8"], place)
    assert status == 0, output
    assert "#SBATCH --gpus-per-node=8" in output
    status, written = run_command(["launch", "slurm", "r.yaml", "-o", "job.sh", "train.seed=7"], place)
    assert status == 0, written
    assert "sbatch job.sh" in written
    assert "r.yaml train.seed=7 --work-dir work_dirs/tiny" in (place / "job.sh").read_text()
    for arguments, said in (
        (["r.yaml", "--time", "soon"], "is not a Slurm time"),
        (["r.yaml", "train.seeed=7"], "did you mean 'seed'?"),
        (["r.yaml", "-o", "no/such/job.sh"], "cannot write no/such/job.sh"),
    ):
        status, output = run_command(["launch", "slurm", *arguments], place)
        assert status == 2, output
        assert said in output


def free_port() -> int:
    """A port between 20000 and 29999, where jobs have theirs."""
    for port in range(20000 + hash(str(Path.cwd())) % 5000, 30000, 7):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on_by_itself_and_ends_as_if_it_had_not_been(place: Path) -> None:
    script = place / "job.sh"
    script.write_text(sbatch_script("r.yaml", [], Path("w"), Job("tiny", nodes=2, gpus=0)), encoding="utf-8")
    cluster = FakeSlurm(place / "slurm")

    def trained_a_few_steps() -> bool:
        return any('"step": 5,' in file.read_text() for file in (place / "w").glob("runs/*/metrics.jsonl"))

    status = cluster.sbatch(script, place, free_port(), preempt=trained_a_few_steps)
    assert status == 0, cluster.output
    assert cluster.starts == 2, cluster.output
    assert cluster.output.count("starting from the beginning") == 1
    assert cluster.output.count("stopped after step") == 1
    assert cluster.output.count("resumed from w/checkpoints/step-") == 1
    assert "Traceback" not in cluster.output

    statuses, output = finish_all(ranks_of(["train", "r.yaml", "--work-dir", "straight"], place))
    assert statuses == [0, 0], output
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [place / work_dir / "checkpoints" / "step-000040" / name for work_dir in ("w", "straight")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
