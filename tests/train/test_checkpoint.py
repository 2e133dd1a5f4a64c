"""A checkpoint is complete or it is not there: kills, a full disk, flipped bytes, rotation."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch

from minituner.errors import MinitunerError, UsageError
from minituner.train import checkpoint
from minituner.train.ranks import Ranks
from tests.tiny import tiny_model
from tests.train.processes import Process, run_command

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(3)}
OPTIMIZER = {"a/exp_avg": torch.full((2, 3), 0.5), "a/step": torch.tensor(4.0)}


def write(work_dir: Path, step: int, value: float = 0.0, keep_last: int = 2) -> Path:
    """A small checkpoint whose weights are recognised by `value`."""
    weights = {name: tensor + value for name, tensor in WEIGHTS.items()}
    optimizer = {**OPTIMIZER, **checkpoint.random_states(Ranks())}
    return checkpoint.save(work_dir, step, weights, optimizer, {"plan": {}, "value": value}, keep_last)


def steps(work_dir: Path) -> list[str]:
    return sorted(p.name for p in (work_dir / "checkpoints").iterdir())


def newest(work_dir: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.find(work_dir, "auto", print))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    folder = write(tmp_path, 7, 1.5)
    saved = checkpoint.load(folder)
    assert saved.state == {"plan": {}, "value": 1.5, "step": 7}
    assert all(torch.equal(saved.weights[name], tensor + 1.5) for name, tensor in WEIGHTS.items())
    assert all(torch.equal(saved.optimizer[name], tensor) for name, tensor in OPTIMIZER.items())
    torch.rand(5)
    checkpoint.restore_random_states(saved.optimizer)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_manifest_has_size_and_sha256_of_every_file(tmp_path: Path) -> None:
    import hashlib

    folder = write(tmp_path, 100)
    assert folder == tmp_path / "checkpoints" / "step-000100"
    assert (tmp_path / "latest").read_text().strip() == "step-000100"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    for name, facts in manifest.items():
        content = (folder / name).read_bytes()
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert steps(tmp_path) == ["step-000100"], "no left-overs"


def test_a_flipped_bit_in_any_file_is_found_and_auto_falls_back_aloud(tmp_path: Path) -> None:
    write(tmp_path, 1, 1.0)
    folder = write(tmp_path, 2, 2.0)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        places = range(len(content)) if file.name == "manifest.json" else (0, len(content) // 2, len(content) - 1)
        for place in places:
            broken = bytearray(content)
            broken[place] ^= 1
            file.write_bytes(broken)
            assert checkpoint.problem(folder), f"{file.name} byte {place}"
        said: list[str] = []
        assert checkpoint.find(tmp_path, "auto", said.append).name == "step-000001"
        assert "step-000002" in said[0]
        assert file.name in said[0]
        with pytest.raises(UsageError, match=file.name):
            checkpoint.find(tmp_path, folder, said.append)
        file.write_bytes(content)
    assert checkpoint.problem(folder) is None


def test_a_missing_or_shortened_file_and_an_empty_manifest_are_found(tmp_path: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        folder = write(tmp_path, 1)
        (folder / name).unlink()
        assert checkpoint.problem(folder)
    folder = write(tmp_path, 1)
    os.truncate(folder / "model.safetensors", 100)
    assert "model.safetensors" in (checkpoint.problem(folder) or "")
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_text("{}")
    assert "does not name" in (checkpoint.problem(folder) or "")


def test_auto_with_nothing_whole_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no whole checkpoint"):
        checkpoint.find(tmp_path, "auto", print)
    folder = write(tmp_path, 1)
    (folder / "state.json").unlink()
    with pytest.raises(UsageError, match="no whole checkpoint"):
        checkpoint.find(tmp_path, "auto", print)


def test_a_path_can_be_a_checkpoint_or_a_work_dir(tmp_path: Path) -> None:
    folder = write(tmp_path / "w", 3)
    assert checkpoint.find(tmp_path, folder, print) == folder
    assert checkpoint.find(tmp_path, tmp_path / "w", print) == folder
    with pytest.raises(UsageError, match="there is no such folder") as caught:
        checkpoint.find(tmp_path / "w", folder.with_name("step-000004"), print)
    assert "step-000003" in caught.value.why


def test_rotation_keeps_the_newest_and_never_the_only_whole_one_away(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == ["step-000004", "step-000005"]
    (tmp_path / "checkpoints" / "step-000005" / "state.json").unlink()
    write(tmp_path, 6, keep_last=1)
    assert steps(tmp_path) == ["step-000006"]
    assert checkpoint.problem(tmp_path / "checkpoints" / "step-000006") is None


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    write(tmp_path, 999_999)
    write(tmp_path, 1_000_000)
    write(tmp_path, 1_000_001)
    assert steps(tmp_path) == ["step-1000000", "step-1000001"]
    assert checkpoint.find(tmp_path, "auto", print).name == "step-1000001"


def test_a_new_run_in_an_old_folder_is_resumed_not_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, 300, 3.0)
    write(tmp_path, 100, 1.0)
    assert newest(tmp_path).state["value"] == 1.0
    assert steps(tmp_path) == ["step-000100", "step-000300"], "another run's checkpoints are not deleted"


def test_the_same_step_saved_twice_is_the_later_one(tmp_path: Path) -> None:
    write(tmp_path, 5, 1.0)
    write(tmp_path, 5, 2.0)
    assert newest(tmp_path).state["value"] == 2.0
    assert steps(tmp_path) == ["step-000005"]


def save_and_die(work_dir: str, step: int, value: float, boundary: int) -> None:
    """Save, but SIGKILL this process just before its `boundary`-th touch of the file system (counted from 1)."""
    seen = 0
    touches = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir", "os.scandir")

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in touches and work_dir in str(arguments[0]):
            seen += 1
            if seen == boundary:
                os.kill(os.getpid(), signal.SIGKILL)

    write(Path(work_dir) / "warm-up", 1)  # imports are done before the counting starts
    sys.addaudithook(hook)
    write(Path(work_dir), step, value, keep_last=1)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2], ids=["the same step again", "the next step"])
def test_a_kill_at_any_boundary_leaves_a_whole_checkpoint(tmp_path: Path, step: int) -> None:
    survived = []
    for boundary in range(1, 200):
        work_dir = tmp_path / str(boundary)
        work_dir.mkdir()
        write(work_dir, 1, 1.0)
        process = Process(save_and_die, str(work_dir), step, 2.0, boundary, cwd=work_dir)
        status = process.finish()
        found = newest(work_dir)
        assert found.state["value"] in (1.0, 2.0), f"killed at boundary {boundary}"
        assert torch.equal(found.weights["a"], WEIGHTS["a"] + found.state["value"])
        survived.append(found.state["value"])
        write(work_dir, 9, 9.0, keep_last=1)
        assert newest(work_dir).state["value"] == 9.0
        assert not [name for name in steps(work_dir) if name.startswith(".")], "left-overs are removed by the next save"
        if status == 0:
            break
        assert status == -signal.SIGKILL, process.output
    else:
        raise AssertionError("the save never ran to its end")
    assert boundary > 20, "files were really touched this often"
    assert survived[0] == 1.0
    assert survived[-1] == 2.0
    assert survived == sorted(survived), "from some boundary on the new one counts"


def save_on_a_full_disk(work_dir: str, limit: int) -> None:
    """Files of more than `limit` bytes cannot be written in this process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write(Path(work_dir), 2, 2.0)
    except MinitunerError as error:
        os.write(1, error.text().encode())
        sys.exit(error.exit_code)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 100, 1000])
def test_a_disk_that_is_full_keeps_the_previous_checkpoint(tmp_path: Path, limit: int) -> None:
    write(tmp_path, 1, 1.0)
    process = Process(save_on_a_full_disk, str(tmp_path), limit, cwd=tmp_path.parent)
    assert process.finish() == 1, process.output
    assert newest(tmp_path).state["value"] == 1.0
    assert steps(tmp_path) == ["step-000001"], "nothing half-written stays"


def test_no_space_left_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 1.0)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MinitunerError, match="No space left on device") as caught:
        write(tmp_path, 2, 2.0)
    assert caught.value.exit_code == 1
    assert "GB are free" in caught.value.why
    assert "--resume auto" in caught.value.next_command
    assert newest(tmp_path).state["value"] == 1.0


@pytest.mark.slow
def test_a_full_disk_in_a_run_exits_1_and_the_run_can_go_on(tmp_path: Path, model_folder: Path, chats: Path) -> None:
    from tests.tiny import tiny_recipe
    from tests.train.processes import Command

    tiny_recipe(model_folder, chats, save={"every_steps": 2}).dump(tmp_path / "r.yaml")
    first = ["train", "r.yaml", "--work-dir", "w", "train.max_steps=2"]
    status, output = run_command(first, tmp_path)
    assert status == 0, output
    more = ["train", "r.yaml", "--work-dir", "w", "--resume", "auto", "train.max_steps=4"]
    full = Command(more, tmp_path, largest_file=20_000)
    assert full.finish() == 1
    assert "cannot write the checkpoint" in full.output
    assert "Traceback" not in full.output
    assert newest(tmp_path / "w").state["step"] == 2
    assert run_command(more, tmp_path)[0] == 0
    assert newest(tmp_path / "w").state["step"] == 4


def test_weights_of_another_recipe_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(UsageError, match="other trainable parameters"):
        checkpoint.load_weights(model, {"a": torch.ones(1)})
