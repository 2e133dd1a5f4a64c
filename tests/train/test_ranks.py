"""Several ranks: stopped together, killed one at a time, resumed bit for bit, and never waiting for the dead."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minituner.errors import DataError, MinitunerError, UsageError
from minituner.model import attention
from minituner.model.loss import loss_sum
from minituner.recipe import TrainSection
from minituner.train import checkpoint
from minituner.train.callbacks import Callback
from minituner.train.engines import TorchEngine
from minituner.train.launch import world_of
from minituner.train.ranks import Ranks, own_gpu
from minituner.train.run import Run
from tests.tiny import tiny_model, tiny_recipe, write_chats
from tests.train.processes import Command, Process, finish_all, rank_environments, ranks_of


def on_two_ranks(work: Callable[[Ranks], None], cwd: Path) -> tuple[list[int], str]:
    """Run `work(ranks)` on two ranks; exit statuses and output."""
    processes = [Process(joined, work, cwd=cwd, environment=place) for place in rank_environments()]
    return finish_all(processes)


def joined(work: Callable[[Ranks], None]) -> None:
    ranks = Ranks(world_of()).join()
    work(ranks)
    ranks.leave()


def words(ranks: Ranks) -> None:
    """Every kind of message."""
    me = ranks.rank
    assert ranks.gather(me + 0.5) == [0.5, 1.5]
    assert ranks.all_sums([me, 2.0**40 + me]) == [1.0, 2.0**41 + 1]
    assert ranks.share("检查点 step-000003" if me == 0 else "something else") == "检查点 step-000003"
    assert ranks.share("" if me == 0 else "x") == ""
    assert [t.tolist() for t in ranks.gather_tensors(torch.tensor([me], dtype=torch.uint8))] == [[0], [1]]
    both = torch.full((3,), float(me + 1))
    ranks.sum_tensor(both)
    assert both.tolist() == [3.0] * 3
    ranks.share_tensor(both := torch.full((2,), float(me)))
    assert both.tolist() == [0.0, 0.0]
    assert ranks.main_only(lambda: "done") == ("done" if me == 0 else None)
    order = Path("order.txt")
    seen = ranks.main_first(lambda main: order.open("a").write(f"{me}\n") and order.read_text())
    assert seen.split() == ["0", "1"][: me + 1]
    ranks.assert_same("the weather", "rain")


@pytest.mark.slow
def test_what_ranks_say_to_each_other_arrives(tmp_path: Path) -> None:
    statuses, output = on_two_ranks(words, tmp_path)
    assert statuses == [0, 0], output


def test_alone_every_answer_is_immediate() -> None:
    alone = Ranks().join()
    assert alone.gather(2.0) == [2.0]
    assert alone.all_sums([1, 2]) == [1, 2]
    assert alone.share("a") == "a"
    assert alone.main_only(lambda: 3) == 3
    assert alone.main_first(lambda main: main) is True
    assert not torch.distributed.is_initialized()


def difference(ranks: Ranks) -> None:
    with pytest.raises(MinitunerError, match=r"the weather: not the same .*different from rank 0: 1"):
        ranks.assert_same("the weather", "rain" if ranks.rank == 0 else "snow")


def failure(ranks: Ranks) -> None:
    def work() -> None:
        raise DataError("line 3 is broken")

    with pytest.raises(MinitunerError) as caught:
        ranks.main_only(work)
    assert caught.value.exit_code == 2
    assert ("line 3 is broken" in caught.value.what) == ranks.is_main
    assert caught.value.said_elsewhere is not ranks.is_main


def desertion(ranks: Ranks) -> None:
    if ranks.rank == 1:
        return
    with pytest.raises(MinitunerError, match="rank 0 of 2 lost contact with another rank"):
        ranks.gather(1)


@pytest.mark.slow
@pytest.mark.parametrize("work", [difference, failure, desertion])
def test_a_rank_that_differs_fails_or_leaves_stops_the_others(work: Callable[[Ranks], None], tmp_path: Path) -> None:
    statuses, output = on_two_ranks(work, tmp_path)
    assert statuses == [0, 0], output


def lonely() -> None:
    with pytest.raises(MinitunerError, match=r"rank 1 of 2 could not meet the others at 127.0.0.1:\d+ within 1 s"):
        Ranks(world_of()).join(timedelta(seconds=1))


@pytest.mark.slow
def test_ranks_that_never_come_are_named_with_the_address(tmp_path: Path) -> None:
    process = Process(lonely, cwd=tmp_path, environment=rank_environments()[1])
    assert process.finish() == 0, process.output


def holes(ranks: Ranks) -> None:
    """Gradients that are missing here, there, or on both; parameters that began differently."""
    model = tiny_model(seed=ranks.rank)
    engine = TorchEngine(TrainSection(weight_decay=0.5, max_grad_norm=None), "cpu", ranks)
    engine.prepare(model)
    expected = tiny_model(seed=0)
    for (name, p), q in zip(engine.parameters.items(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name
    nowhere, here, there, both = list(engine.parameters.values())[:4]
    before = nowhere.detach().clone()
    (here if ranks.is_main else there).grad = torch.ones_like(here if ranks.is_main else there)
    both.grad = torch.full_like(both, ranks.rank + 1.0)
    engine._sum_gradients()
    assert nowhere.grad is None
    assert here.grad.unique().tolist() == there.grad.unique().tolist() == [1.0]
    assert both.grad.unique().tolist() == [3.0]
    engine.step(0.1)
    assert torch.equal(nowhere, before), "no weight decay without a gradient, as on one rank"


@pytest.mark.slow
def test_gradients_are_summed_and_a_missing_one_stays_missing(tmp_path: Path) -> None:
    statuses, output = on_two_ranks(holes, tmp_path)
    assert statuses == [0, 0], output


def test_an_empty_micro_batch_is_exactly_zero_and_stays_in_the_graph() -> None:
    from minituner.data.collate import collate

    attention.register()
    model = tiny_model().train()
    model.set_attn_implementation(attention.PER_DOCUMENT_SDPA)
    loss = loss_sum(model, collate([]), attention.PER_DOCUMENT_SDPA)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_each_rank_has_a_gpu_of_its_own() -> None:
    assert [own_gpu(rank, 2, {}) for rank in (0, 1)] == [0, 1]
    assert own_gpu(3, 1, {"SLURM_PROCID": "3"}) == 0, "--gpus-per-task"
    for gpus, environment in ((1, {}), (2, {"SLURM_PROCID": "2"})):
        with pytest.raises(UsageError, match="each rank needs one of its own"):
            own_gpu(2, gpus, environment)


@pytest.fixture
def place(model_folder: Path, tmp_path: Path) -> Path:
    """A folder with r.yaml: 30 steps with dropout, over an odd number of packs."""
    chats = write_chats(tmp_path / "chats.jsonl", count=13)
    recipe = tiny_recipe(
        model_folder,
        chats,
        data={"packing": "none"},
        train={"max_steps": 30},
        method={"lora_dropout": 0.3},
        save={"every_steps": 5},
    )
    recipe.dump(tmp_path / "r.yaml")
    return tmp_path


def files_of(work_dir: Path, step: int) -> list[bytes]:
    folder = work_dir / "checkpoints" / f"step-{step:06d}"
    return [(folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


def straight(place: Path) -> list[bytes]:
    """The last checkpoint of two ranks that nobody disturbed."""
    statuses, output = finish_all(ranks_of(["train", "r.yaml", "--work-dir", "straight"], place))
    assert statuses == [0, 0], output
    return files_of(place / "straight", 30)


def start(place: Path, *more: str) -> list[Command]:
    return ranks_of(["train", "r.yaml", "--work-dir", "w", *more], place)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_ranks_killed_then_resumed_is_bit_identical(victim: int, place: Path) -> None:
    ranks = start(place)
    assert ranks[0].wait_for_step(place / "w", 8), ranks[0].output
    ranks[victim].send(signal.SIGKILL)
    statuses, output = finish_all(ranks)
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] == 1, output
    assert f"rank {1 - victim} of 2 lost contact with another rank" in output
    assert "Traceback" not in output
    statuses, output = finish_all(start(place, "--resume", "if-any"))
    assert statuses == [0, 0], output
    assert output.count("resumed from w/checkpoints/step-") == 1
    assert files_of(place / "w", 30) == straight(place)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_the_second_rank_alone_stops_both_after_the_same_step(
    number: signal.Signals, status: int, place: Path
) -> None:
    ranks = start(place, "save.every_steps=null")
    assert ranks[0].wait_for_step(place / "w", 4), ranks[0].output
    ranks[1].send(number)
    statuses, output = finish_all(ranks)
    assert statuses == [status, status], output
    assert output.count("stopped after step") == 1
    assert "Traceback" not in output
    assert len(list((place / "w" / "checkpoints").iterdir())) == 1
    stopped = checkpoint.find(place / "w", "auto", print)
    assert 4 <= checkpoint.state_of(stopped)["step"] < 30
    assert f"stopped after step {checkpoint.state_of(stopped)['step']} of 30" in output
    statuses, output = finish_all(start(place, "save.every_steps=null", "--resume", "auto"))
    assert statuses == [0, 0], output
    assert files_of(place / "w", 30) == straight(place)


@pytest.mark.slow
def test_a_signal_while_rank_0_prepares_the_data_stops_both(model_folder: Path, tmp_path: Path) -> None:
    big = write_chats(tmp_path / "big.jsonl", count=8_000)
    tiny_recipe(model_folder, big, train={"max_steps": 1}).dump(tmp_path / "r.yaml")
    ranks = ranks_of(["train", "r.yaml", "--work-dir", "w"], tmp_path)
    prepared = tmp_path / "home" / "prepared"
    assert ranks[0].wait_until(lambda: any(prepared.glob(".*/data.arrow"))), ranks[0].output
    for rank in ranks:
        rank.send(signal.SIGTERM)
    statuses, output = finish_all(ranks)
    assert statuses == [75, 75], output
    assert output.count("stopped before the first step; nothing had to be saved") == 1
    assert "Traceback" not in output
    assert list(prepared.iterdir()) == []


@pytest.mark.slow
def test_broken_data_is_said_once_and_both_leave_with_2(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n', encoding="utf-8")
    tiny_recipe(model_folder, tmp_path / "bad.jsonl").dump(tmp_path / "r.yaml")
    statuses, output = finish_all(ranks_of(["train", "r.yaml", "--work-dir", "w"], tmp_path))
    assert statuses == [2, 2], output
    assert output.count("bad.jsonl:1") == 1
    assert "Traceback" not in output


@pytest.mark.slow
def test_every_rank_has_its_own_dropout_and_its_generator_is_saved(place: Path) -> None:
    statuses, output = finish_all(start(place, "train.max_steps=2"))
    assert statuses == [0, 0], output
    saved = load_file(place / "w" / "checkpoints" / "step-000002" / "optimizer.safetensors")
    generators = {name: tensor for name, tensor in saved.items() if name.startswith("random/")}
    assert set(generators) >= {"random/0/torch", "random/1/torch"}
    assert not torch.equal(generators["random/0/torch"], generators["random/1/torch"])


@pytest.mark.slow
def test_another_number_of_ranks_is_refused_by_the_plan(place: Path) -> None:
    statuses, output = finish_all(start(place, "train.max_steps=1"))
    assert statuses == [0, 0], output
    alone = Command(["train", "r.yaml", "--work-dir", "w", "--resume", "auto"], place)
    assert alone.finish() == 2
    assert "world_size: 2 then, 1 now" in alone.output


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_stops_both(place: Path) -> None:
    places = rank_environments()
    ranks = [Command(["train", "r.yaml", "--work-dir", "w"], place, 20_000, environment) for environment in places]
    statuses, output = finish_all(ranks)
    assert statuses == [1, 1], output
    assert output.count("cannot write the checkpoint") == 1
    assert "Traceback" not in output


def test_if_any_starts_from_the_beginning_once_and_is_an_error_when_all_are_damaged(tmp_path: Path) -> None:
    said: list[str] = []
    assert checkpoint.find(tmp_path, "if-any", said.append) is None
    assert "starting from the beginning" in said[0]
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    with pytest.raises(MinitunerError, match="--resume if-any: no whole checkpoint"):
        checkpoint.find(tmp_path, "if-any", said.append)


def groups_alive() -> int:
    """How many of gloo's groups have a thread in this process."""
    return sum((task / "comm").read_text().strip() == "gloo_tcp_loop" for task in Path("/proc/self/task").iterdir())


class SeesThreads(Callback):
    def on_start(self, run: Run) -> None:
        assert groups_alive(), "the threads have another name now: this test sees nothing"


def trains_and_leaves(recipe: str) -> None:
    from minituner.train.loop import train

    train(recipe, "w", callbacks=[SeesThreads()])
    assert groups_alive() == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in /proc on Linux only")
def test_no_connection_outlives_its_run(model_folder: Path, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", count=8)
    tiny_recipe(model_folder, chats, train={"max_steps": 1}).dump(tmp_path / "r.yaml")
    ranks = [
        Process(trains_and_leaves, "r.yaml", cwd=tmp_path, environment=environment)
        for environment in rank_environments()
    ]
    statuses, output = finish_all(ranks)
    assert statuses == [0, 0], output


LEAVES = """
import atexit, sys, threading
from minituner.train.ranks import end_process
class Last:
    def __del__(self): print("python was taken down")
last = Last()
atexit.register(print, "exit handler")
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("without a line end", end="")
end_process(75)
"""


@pytest.mark.slow
def test_a_rank_leaves_with_its_status_and_its_output_but_not_through_pythons_end() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (75, "without a line endexit handler\n"), done


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "status"), [(["r.yaml"], 0), (["r.yaml", "--resume", "auto"], 2)])
def test_the_command_leaves_through_it(arguments: list[str], status: int, model_folder: Path, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", count=8)
    tiny_recipe(model_folder, chats, train={"max_steps": 1}).dump(tmp_path / "r.yaml")
    script = """
import minituner.train.ranks as ranks
leave = ranks.end_process
ranks.end_process = lambda status: (print("left", status), leave(status))
from minituner.cli import console
console()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, "train", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == status, done
    assert done.stdout.splitlines()[-1] == f"left {status}"
