"""Ranks: what the processes of one run say to each other.

    sum_tensor, share_tensor   gradients and weights, over gloo (CPU) or nccl (GPUs)
    all_sums, gather, share    a few numbers or a word, over gloo: so that a GPU never waits for a number on the CPU
    main_first, main_only      one does it (prepares data, writes a checkpoint), the others wait and hear how it went

                rank 0   prepare ------> ok? --+--> read
                rank 1   wait ................ +--> read         or both stop, with the same exit status

A rank that fails tells the others before it leaves, and a rank that is killed closes its connections, so nobody waits
for what will never come. Alone, every method answers at once and torch.distributed is not touched. Lesson: notebook 07.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from minituner.errors import MinitunerError, StoppedEarly, UsageError
from minituner.train.launch import World
from minituner.train.preempt import StopRequest

Result = TypeVar("Result")

JOIN = timedelta(minutes=10)
# The others may wait for rank 0 while it prepares a large data set. A rank that dies is noticed at once all the same.
WAIT = timedelta(hours=24)


class Ranks:
    """The ranks of one run, seen from one of them; `join` before use, `leave` at the end."""

    def __init__(self, world: World | None = None, device: str = "cpu", stop: StopRequest | None = None) -> None:
        self.world, self.device, self.stop = world or World(), torch.device(device), stop or StopRequest()
        self._numbers: Any = None
        self.before_leaving: list[Callable[[], object]] = []  # what holds a group, letting go of it

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.world.rank

    @property
    def is_main(self) -> bool:
        """True for the one that prints and writes."""
        return self.world.is_main

    @property
    def together(self) -> bool:
        """True if there is more than one."""
        return self.world.world_size > 1

    def join(self, timeout: timedelta = JOIN) -> Ranks:
        """Meet the other ranks.

        Raises:
            UsageError: more ranks on this machine than GPUs. MinitunerError: the others did not come in time.
        """
        if not self.together:
            return self
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(own_gpu(self.world.local_rank, torch.cuda.device_count(), os.environ))
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                rank=self.world.rank,
                world_size=self.world.world_size,
                timeout=timeout,
            )
            self._numbers = dist.new_group(backend="gloo", timeout=WAIT)
        except (RuntimeError, ValueError) as error:
            place = f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR not set)')}:{os.environ.get('MASTER_PORT', '?')}"
            raise MinitunerError(
                f"rank {self.rank} of {self.world.world_size} could not meet the others at {place}"
                f" within {timeout.total_seconds():.0f} s",
                why=_first_line(error),
                fix="see that every rank was started, with the same address and a port that is free and not blocked",
            ) from None
        return self

    def leave(self) -> None:
        """Close the connections, and let go of every group: the last to do so ends its threads."""
        for forget in self.before_leaving:
            forget()
        self.before_leaving.clear()
        met = dist.is_initialized()
        if self.together and met:
            dist.destroy_process_group()
        self._numbers = None
        if met:
            gc.collect()  # a group may hang in a cycle with the run that used it

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Within: torch's error about a rank that is gone becomes one for the reader.

        Raises:
            MinitunerError: another rank failed or was killed.
        """
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from None

    @contextmanager
    def contact_throughout(self) -> Iterator[None]:
        """The same around everything else: DeepSpeed and attention layers talk to ranks too."""
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
                raise
            raise self._lost(error) from None

    def _lost(self, error: RuntimeError) -> MinitunerError:
        return MinitunerError(
            f"rank {self.rank} of {self.world.world_size} lost contact with another rank",
            why=f"that rank failed or was killed (its own message says more); here: {_first_line(error)}",
            fix="start the same command again with --resume if-any",
        )

    def gather(self, number: float) -> list[float]:
        """The numbers of all ranks, by rank."""
        return [row[0] for row in self._gather(torch.tensor([number], dtype=torch.float64)).tolist()]

    def gather_tensors(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A CPU tensor of each rank, by rank; their shapes must agree."""
        return list(self._gather(tensor))

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.together:
            return tensor[None]
        rows = [torch.empty_like(tensor) for _ in range(self.world.world_size)]
        with self.contact():
            dist.all_gather(rows, tensor, group=self._numbers)
        return torch.stack(rows)

    def all_sums(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over all ranks, in one message of float64."""
        if not self.together:
            return list(numbers)
        row = torch.tensor(numbers, dtype=torch.float64)
        with self.contact():
            dist.all_reduce(row, group=self._numbers)
        return row.tolist()

    def share(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        if not self.together:
            return text
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        with self.contact():
            dist.broadcast(length, 0, group=self._numbers)
            data = data if self.is_main else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(data, 0, group=self._numbers)
        return bytes(data.tolist()).decode()

    def sum_tensor(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over all ranks; bit for bit the same on each."""
        if self.together:
            with self.contact():
                dist.all_reduce(tensor)

    def share_tensor(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by rank 0's."""
        if self.together:
            with self.contact():
                dist.broadcast(tensor, 0)

    def assert_same(self, what: str, text: str) -> None:
        """Stop unless `text` is the same on every rank.

        Raises:
            MinitunerError: it differs; the ranks that differ from rank 0 are named.
        """
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])  # 48 bits, exact in float64
        seen = self.gather(digest)
        if odd := [rank for rank, value in enumerate(seen) if value != seen[0]]:
            raise MinitunerError(
                f"{what}: not the same on every rank (different from rank 0: {', '.join(map(str, odd))})",
                why="other files, package versions or hardware on these machines",
                fix="give every machine the same recipe, data, model and packages",
            )

    def main_only(self, work: Callable[[], Result]) -> Result | None:
        """Rank 0 does it while the others wait; they get None.

        Raises:
            MinitunerError: rank 0 failed; the others stop with the same exit status and leave the message to it.
        """
        return self._turn(work, mine=self.is_main, stoppable=False)

    def main_first(self, work: Callable[[bool], Result]) -> Result:
        """Rank 0 does it, then the first rank of every machine, then all others: `work(is_main)`.

        What rank 0 left in a cache the others find there; where machines share no disk, each has one that works first.
        A stop that any rank was asked for meanwhile stops all of them here.
        """
        world, result = self.world, None
        for mine in (world.is_main, not world.is_main and world.local_rank == 0, world.local_rank != 0):
            done = self._turn(lambda: work(world.is_main), mine=mine, stoppable=True)
            result = done if mine else result
        return result  # type: ignore[return-value]  # exactly one of the three turns was this rank's

    def _turn(self, work: Callable[[], Result], *, mine: bool, stoppable: bool) -> Result | None:
        if not self.together:
            return work() if mine else None
        result, error = None, None
        if mine and not (stoppable and self.stop.exit_code):
            try:
                with self.stop.at_once() if stoppable else nullcontext():
                    result = work()
            except BaseException as caught:  # the others have to know before it goes on its way
                error = caught
        status = _exit_status(error) if error else (self.stop.exit_code if stoppable else 0)
        try:
            seen = [int(code) for code in self.gather(status)]
        except MinitunerError:
            if error is None:
                raise
            raise error from None
        if error:
            raise error
        if any(seen):
            raise self._stopped_with(next(rank for rank, code in enumerate(seen) if code), max(seen))
        return result

    def _stopped_with(self, first: int, status: int) -> MinitunerError:
        """The error of a rank that stops because rank `first` did; only one rank has to say so."""
        if status in (75, 130):
            error: MinitunerError = StoppedEarly(
                "stopped before the first step; nothing had to be saved", fix="start the same command again"
            )
        else:
            error = MinitunerError(f"rank {self.rank} stops because rank {first} failed")
        error.exit_code, error.said_elsewhere = status, not self.is_main or status not in (75, 130)
        return error


def end_process(status: int) -> NoReturn:
    """Leave this process with `status`: exit handlers run, output is flushed, Python is not taken down.

    A thread of gloo's that still frees a message while Python goes down kills a process whose work was done: "terminate
    called without an active exception", exit status 134 (https://github.com/pytorch/pytorch/pull/179291). DeepSpeed's
    hooks keep their group, and so its threads, to the end. Slurm and torchrun go by the status.
    """
    try:
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed, or nobody reads it any more
                stream.flush()
        os._exit(status)


def own_gpu(local_rank: int, gpus: int, environment: Mapping[str, str]) -> int:
    """Which of the GPUs that this process sees is its own.

    Slurm's --gpus-per-task shows each rank one GPU only, under the number 0.

    Raises:
        UsageError: more ranks than GPUs.
    """
    if local_rank < gpus:
        return local_rank
    if gpus == 1 and "SLURM_PROCID" in environment:
        return 0
    raise UsageError(
        f"local rank {local_rank}: this machine shows {gpus} GPU{'s' * (gpus != 1)}, each rank needs one of its own",
        fix="start fewer ranks here (NPROC_PER_NODE, --gpus), or hide the GPUs (CUDA_VISIBLE_DEVICES=) to use CPUs",
    )


def _exit_status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, MinitunerError) else 1


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
