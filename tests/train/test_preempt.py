"""Asked to stop, a run saves and says how to go on; interrupted earlier, it leaves nothing that looks finished."""

from __future__ import annotations

import shlex
import signal
import threading
from pathlib import Path

import pytest

from minituner.errors import StoppedEarly
from minituner.train import checkpoint
from minituner.train.preempt import StopRequest
from tests.tiny import tiny_recipe, write_chats
from tests.train.processes import Command, run_command


@pytest.fixture
def place(model_folder: Path, chats: Path, tmp_path: Path) -> Path:
    """A folder with r.yaml: 60 steps, a checkpoint only at the end."""
    tiny_recipe(model_folder, chats, train={"max_steps": 60}, method={"lora_dropout": 0.1}).dump(tmp_path / "r.yaml")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_stop_saves_a_checkpoint_and_the_run_goes_on_as_if_nothing_had_happened(
    number: signal.Signals, status: int, place: Path
) -> None:
    command = Command(["train", "r.yaml", "--work-dir", "my run"], place)
    assert command.wait_for_step(place / "my run", 4), command.output
    command.send(number)
    assert command.finish() == status, command.output
    assert f"{number.name}: finishing this step" in command.output
    assert "Traceback" not in command.output
    stopped = checkpoint.find(place / "my run", "auto", print)
    step = checkpoint.state_of(stopped)["step"]
    assert 4 <= step < 60
    assert f"stopped after step {step} of 60" in command.output
    assert not (place / "my run" / "hf").exists()

    said = next(line for line in command.output.splitlines() if line.startswith("  next: "))
    words = shlex.split(said.removeprefix("  next: "))
    assert words[0] == "minituner"
    code, output = run_command(words[1:], place)
    assert code == 0, output
    code, output = run_command(["train", "r.yaml", "--work-dir", "straight"], place)
    assert code == 0, output
    files = ["model.safetensors", "optimizer.safetensors"]
    stopped, straight = (place / name / "checkpoints" / "step-000060" for name in ("my run", "straight"))
    assert [(stopped / f).read_bytes() for f in files] == [(straight / f).read_bytes() for f in files]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "SIGTERM: stopped before the first step")],
)
def test_a_stop_while_data_is_prepared_leaves_nothing_half_done(
    number: signal.Signals, status: int, said: str, model_folder: Path, tmp_path: Path
) -> None:
    big = write_chats(tmp_path / "big.jsonl", count=24_000)  # long enough to be stopped in on a busy machine
    recipe = tiny_recipe(model_folder, big, train={"max_steps": 1})
    recipe.dump(tmp_path / "r.yaml")
    command = Command(["train", "r.yaml", "--work-dir", "w"], tmp_path)
    prepared = tmp_path / "home" / "prepared"
    assert command.wait_until(lambda: any(prepared.glob(".*/data.arrow"))), command.output
    command.send(number)
    assert command.finish() == status, command.output
    assert said in command.output
    assert "Traceback" not in command.output
    assert list(prepared.iterdir()) == []
    status, output = run_command(["train", "r.yaml", "--work-dir", "w"], tmp_path)
    assert status == 0, output
    assert "found in the cache" not in output
    assert "24,000 records" in output


@pytest.mark.slow
def test_a_kill_while_data_is_prepared_is_not_taken_for_prepared_data(model_folder: Path, tmp_path: Path) -> None:
    big = write_chats(tmp_path / "big.jsonl", count=8_000)
    tiny_recipe(model_folder, big, train={"max_steps": 1}).dump(tmp_path / "r.yaml")
    command = Command(["train", "r.yaml", "--work-dir", "w"], tmp_path)
    prepared = tmp_path / "home" / "prepared"
    assert command.wait_until(lambda: any(prepared.glob(".*/data.arrow"))), command.output
    command.send(signal.SIGKILL)
    assert command.finish() == -signal.SIGKILL
    status, output = run_command(["train", "r.yaml", "--work-dir", "w"], tmp_path)
    assert status == 0, output
    assert "found in the cache" not in output


@pytest.mark.slow
def test_ctrl_c_while_the_model_loads_is_130_and_the_next_run_is_whole(place: Path) -> None:
    command = Command(["train", "r.yaml", "--work-dir", "w"], place)
    assert command.wait_for_text("packs of at most"), command.output
    command.send(signal.SIGINT)
    assert command.finish() == 130, command.output
    assert "Traceback" not in command.output
    assert run_command(["train", "r.yaml", "--work-dir", "w", "train.max_steps=2"], place)[0] == 0


def test_within_the_block_a_signal_is_a_flag_and_a_second_ctrl_c_leaves(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.signal is None
        assert stop.exit_code == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.exit_code == 75
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "SIGTERM: finishing this step" in capfd.readouterr().err


def test_before_the_first_step_a_signal_stops_at_once() -> None:
    with StopRequest() as stop, stop.at_once(), pytest.raises(StoppedEarly, match="nothing had to be saved"):
        signal.raise_signal(signal.SIGUSR1)
    assert stop.exit_code == 75
    with StopRequest() as stop, stop.at_once(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_one_vote_stops_all_and_ctrl_c_counts_more() -> None:
    assert [StopRequest.decide(sums) for sums in ([0, 0], [0, 3], [1, 0], [1, 1])] == [0, 75, 130, 130]
    with StopRequest(quiet=True) as stop:
        assert stop.votes() == (0, 0)
        signal.raise_signal(signal.SIGTERM)
        assert stop.votes() == (0, 1)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    seen = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append(stop.signal)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
    assert signal.getsignal(signal.SIGINT) is before
