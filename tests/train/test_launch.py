"""Launching: who am I, whom do I start, and does what happens to one process reach the others."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from minituner.errors import UsageError
from minituner.train import checkpoint
from minituner.train.launch import World, check_launcher, first_host, ranks_asked, torchrun_options, world_of
from tests.tiny import tiny_recipe, write_chats
from tests.train.processes import Command, finish_all, rank_environments, run_command

SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def test_the_place_is_read_from_the_launchers_variables() -> None:
    assert world_of("none", {}) == World(0, 1, 0)
    assert (
        world_of("none", TORCHRUN) == world_of("torchrun", TORCHRUN) == world_of("pytorch", TORCHRUN) == World(1, 2, 1)
    )
    assert world_of("slurm", SLURM) == World(3, 4, 1)
    assert world_of("none", SLURM) == World(0, 1, 0), "an interactive shell of Slurm has these variables too"
    assert world_of("none", {"RANK": "0", "WORLD_SIZE": "1"}).is_main


def test_slurms_address_and_port_follow_from_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SLURM, "SLURM_JOB_NODELIST": "gpu[07-09],cpu1", "SLURM_JOB_ID": "1234567"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")  # so that what world_of sets is taken back after the test
        monkeypatch.delenv(name)
    assert world_of("slurm") == World(3, 4, 1)
    import os

    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu07", "24567")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    world_of("slurm")
    assert os.environ["MASTER_ADDR"] == "10.0.0.1", "an address that was set is kept"


WRONG_PLACES = {
    "not srun": ("slurm", {}, "SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID not set"),
    "not torchrun": ("torchrun", {}, "RANK and WORLD_SIZE are not set"),
    "not pytorch": ("pytorch", {"RANK": "0"}, "RANK and WORLD_SIZE are not set"),
    "no number": ("none", {"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' is not a whole number"),
    "too high": ("none", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2"),
    "no ranks": ("none", {"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
}


@pytest.mark.parametrize(("launcher", "given", "said"), WRONG_PLACES.values(), ids=WRONG_PLACES.keys())
def test_a_place_that_cannot_be_is_exit_2(launcher: str, given: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        world_of(check_launcher(launcher), given)
    assert said in caught.value.what


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu[03-05,9]", "gpu03"),
        ("a,b", "a"),
        ("n[7,9]-ib", "n7-ib"),
        ("gpu-a[1-2],gpu-b3", "gpu-a1"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_node_list_that_cannot_be_read_says_what_to_set() -> None:
    with pytest.raises(UsageError, match="set MASTER_ADDR"):
        first_host("")


def test_torchrun_is_started_only_when_asked_for() -> None:
    assert torchrun_options("none", {}) is None
    assert torchrun_options("none", {"NPROC_PER_NODE": "1", "NNODES": "1"}) is None
    assert torchrun_options("none", {"NPROC_PER_NODE": "2", **TORCHRUN}) is None, "this is one of the ranks"
    assert torchrun_options("slurm", {"NPROC_PER_NODE": "2"}) is None
    assert torchrun_options("pytorch", {"NPROC_PER_NODE": "2"}) == ["--standalone", "--nproc-per-node=2"]
    assert torchrun_options("none", {"NNODES": "2", "ADDR": "10.0.0.1", "NODE_RANK": "1", "NPROC_PER_NODE": "8"}) == [
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=10.0.0.1",
        "--master-port=29500",
        "--nproc-per-node=8",
    ]
    options = torchrun_options("none", {"NNODES": "2", "ADDR": "a", "PORT": "1234"})
    assert options is not None
    assert "--master-port=1234" in options


WRONG_COUNTS = {
    "no number": ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE='two' is not a whole number"),
    "none": ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE='0'"),
    "no address": ({"NNODES": "2"}, "ADDR is not set"),
    "machines count from 0": ({"NNODES": "2", "NODE_RANK": "2", "ADDR": "a"}, "NODE_RANK=2 with NNODES=2"),
    "port": ({"NNODES": "2", "ADDR": "a", "PORT": ""}, "PORT=''"),
}


@pytest.mark.parametrize(("given", "said"), WRONG_COUNTS.values(), ids=WRONG_COUNTS.keys())
def test_wrong_launch_variables_are_named(given: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        torchrun_options("none", given)
    assert said in caught.value.what


@pytest.fixture
def place(model_folder: Path, tmp_path: Path) -> Path:
    """A folder with r.yaml: enough steps to be stopped in."""
    chats = write_chats(tmp_path / "chats.jsonl", count=13)
    tiny_recipe(model_folder, chats, data={"packing": "none"}, train={"max_steps": 400}).dump(tmp_path / "r.yaml")
    return tmp_path


WRONG_COMMANDS = {
    "unknown launcher": (["--launcher", "slrum"], {}, "did you mean 'slurm'?"),
    "slurm without srun": (["--launcher", "slurm"], {}, "minituner launch slurm RECIPE"),
    "pytorch alone": (["--launcher", "pytorch"], {}, "NPROC_PER_NODE=2 minituner train RECIPE"),
    "no number": ([], {"NPROC_PER_NODE": "2x"}, "NPROC_PER_NODE='2x'"),
    "a wrong recipe is said once": (["train.seeed=1"], {"NPROC_PER_NODE": "2"}, "train.seeed"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("more", "environment", "said"), WRONG_COMMANDS.values(), ids=WRONG_COMMANDS.keys())
def test_wrong_launches_are_exit_2(more: list[str], environment: dict[str, str], said: str, place: Path) -> None:
    command = Command(["train", "r.yaml", *more], place, environment=environment)
    assert command.finish() == 2
    assert command.output.count(said) == 1
    assert "Traceback" not in command.output


def two_ranks(place: Path, *more: str) -> Command:
    return Command(["train", "r.yaml", "--work-dir", "w", *more], place, environment={"NPROC_PER_NODE": "2"})


def ranks_under(command: Command) -> list[psutil.Process]:
    """The rank processes that the command has started."""
    return sorted(psutil.Process(command.process.pid).children(), key=lambda p: int(p.environ()["RANK"]))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_the_parent_reaches_the_ranks_and_their_status_comes_back(
    number: signal.Signals, status: int, place: Path
) -> None:
    command = two_ranks(place)
    assert command.wait_for_step(place / "w", 3), command.output
    assert len(ranks_under(command)) == 2
    command.send(number)
    assert command.finish() == status, command.output
    assert command.output.count("stopped after step") == 1
    assert not any(word in command.output for word in ("Traceback", "torchelastic", "torch/distributed"))
    if number == signal.SIGTERM:
        a_resumed_run_whose_rank_is_killed_ends_with_1_and_names_it(place)


def a_resumed_run_whose_rank_is_killed_ends_with_1_and_names_it(place: Path) -> None:
    """The second half of the test above: starting two ranks anew takes seconds."""
    step = checkpoint.state_of(checkpoint.find(place / "w", "auto", print))["step"]
    again = two_ranks(place, "--resume", "if-any")
    assert again.wait_for_step(place / "w", step + 2), again.output
    assert "resumed from w/checkpoints" in again.output
    ranks_under(again)[1].kill()
    assert again.finish() == 1, again.output
    assert "rank 1 was killed by SIGKILL" in again.output
    assert "Traceback" not in again.output


@pytest.mark.slow
def test_two_machines_find_each_other_by_address_and_port(place: Path) -> None:
    meeting = rank_environments()[0]
    machines = [
        Command(
            ["train", "r.yaml", "--work-dir", "w", "train.max_steps=2"],
            place,
            environment={
                **{"NNODES": "2", "NODE_RANK": node, "ADDR": meeting["MASTER_ADDR"], "PORT": meeting["MASTER_PORT"]},
                "NPROC_PER_NODE": "1",
            },
        )
        for node in ("0", "1")
    ]
    statuses, output = finish_all(machines)
    assert statuses == [0, 0], output
    assert output.count("done: 2 steps") == 1
    assert checkpoint.state_of(checkpoint.find(place / "w", "auto", print))["plan"]["world_size"] == 2


@pytest.mark.slow
def test_an_error_of_the_ranks_comes_back_with_its_status(place: Path) -> None:
    status, output = run_command(["train", "r.yaml", "--work-dir", "w", "train.max_steps=1"], place)
    assert status == 0, output
    command = two_ranks(place, "--resume", "auto")
    assert command.finish() == 2, command.output
    assert "world_size: 1 then, 2 now" in command.output
    assert "Traceback" not in command.output


def test_the_number_of_ranks_is_known_before_they_start_and_told_by_the_first_alone() -> None:
    assert ranks_asked("none", {}) == 1
    assert ranks_asked("none", {"NPROC_PER_NODE": "4"}) == 4
    assert ranks_asked("none", {"NPROC_PER_NODE": "4", "NNODES": "2", "ADDR": "first"}) == 8
    assert [ranks_asked("none", {"RANK": rank, "WORLD_SIZE": "2"}) for rank in "01"] == [2, None]
    with pytest.raises(UsageError, match="NPROC_PER_NODE"):
        ranks_asked("none", {"NPROC_PER_NODE": "many"})
