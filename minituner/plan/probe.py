"""The probe: a few real optimizer steps in processes of their own, timed and weighed.

    real_steps(recipe)    ->  Probe(seconds of 3 steps, their FLOPs, the peak memory of the whole and its parts)

A plan on paper knows how many operations there are, not how fast this machine does them: kernels, threads, memory and
other programs decide that. Three steps tell, the first left out because it warms up. It is the same set-up and the same
engine as training; only checkpoints and answers are missing. What a rank holds is what the system says of its process
(resident memory; on a GPU what torch had allocated), and the peak is forgotten between set-up and steps, so that
neither hides the other. Lesson: notebook 08.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minituner.errors import UsageError
from minituner.recipe import Recipe

STEPS = 3


@dataclass(frozen=True)
class Probe:
    """What a few real steps took. Bytes are of the rank with the most; seconds those of a whole step on all ranks."""

    seconds: tuple[float, ...]
    flops: tuple[float, ...]
    """Model FLOPs of each step, all ranks together."""
    tokens: tuple[int, ...]
    program_bytes: int
    """Resident before anything of the recipe was touched: Python and its libraries."""
    set_up_peak_bytes: int
    """The most while data and model were loaded and the engine was built."""
    steps_peak_bytes: int
    """The most during the steps."""

    @property
    def flops_per_second(self) -> float:
        """The median rate of the steps after the first."""
        rates = [done / took for done, took in zip(self.flops, self.seconds, strict=True)]
        return statistics.median(rates[1:] or rates)

    @property
    def peak_bytes(self) -> int:
        """The most at any time."""
        return max(self.set_up_peak_bytes, self.steps_peak_bytes)


def real_steps(recipe: Recipe, steps: int = STEPS, world_size: int = 1, *, quiet: bool = True) -> Probe:
    """Run the recipe's first `steps` optimizer steps on this machine and measure them; nothing is kept of them.

    `world_size` ranks compute over gloo on this machine's CPU; one rank alone takes the GPU if there is one.

    Raises:
        UsageError: fewer than one step. MinitunerError: whatever training itself would have said.
    """
    from minituner.train.spawn import on_ranks

    if steps < 1:
        raise UsageError(f"steps={steps}: a probe needs at least one step")
    values = recipe.model_dump(mode="json")
    seen = on_ranks(world_size, _measure, values, steps, quiet=quiet)
    return Probe(
        seconds=tuple(max(rank["seconds"][i] for rank in seen) for i in range(steps)),
        flops=tuple(seen[0]["flops"]),
        tokens=tuple(int(n) for n in seen[0]["tokens"]),
        program_bytes=max(rank["program"] for rank in seen),
        set_up_peak_bytes=max(rank["set_up_peak"] for rank in seen),
        steps_peak_bytes=max(rank["steps_peak"] for rank in seen),
    )


def _measure(ranks: Any, values: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """On one rank: set up, take the steps, say what they took."""
    import torch

    from minituner.model.loading import device_of_this_machine
    from minituner.model.loss import loss_sum
    from minituner.train.launch import world_of
    from minituner.train.metrics import Meter
    from minituner.train.ranks import Ranks
    from minituner.train.run import set_up

    device = torch.device(device_of_this_machine() if ranks.world.world_size == 1 else "cpu")
    if device.type == "cuda":
        ranks = Ranks(world_of(), "cuda")
    recipe = Recipe.from_values(dict(values))
    program = _held(device)
    with tempfile.TemporaryDirectory() as place:
        run = set_up(recipe, Path(place), Path(place), lambda line: None, ranks)
        meter, engine = Meter(run), run.engine
        set_up_peak = _peak(device)
        _forget_peak(device)
        seconds, flops, tokens = [], [], []
        try:
            for step in range(steps):
                start = time.perf_counter()
                window = run.feed.window(step, lambda batch: batch.to(engine.device))
                here = [sum(b.supervised_tokens for b in window), sum(b.tokens for b in window)]
                supervised, read, operations = engine.all_sums([*here, meter.window_flops(window)])
                for batch in window:
                    loss = loss_sum(engine.model, batch, run.attention, run.head)
                    engine.backward(loss / max(supervised, 1))
                engine.step(recipe.train.learning_rate)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
                flops.append(operations)
                tokens.append(read)
            peak = _peak(device)
        finally:
            engine.close()
    return {
        "seconds": seconds,
        "flops": flops,
        "tokens": tokens,
        "program": program,
        "set_up_peak": set_up_peak,
        "steps_peak": peak,
    }


def _held(device: Any) -> int:
    """Bytes in use now: of this process, or on the GPU by torch."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def _peak(device: Any) -> int:
    """The most bytes since the start, or since `_forget_peak`."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    from minituner.plan.machine import peak_rss_mb

    return int(peak_rss_mb() * 1e6)


def _forget_peak(device: Any) -> None:
    """Let the peak begin anew, where the system can (Linux); elsewhere the two peaks are one, the larger."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")  # resets VmHWM, see proc(5)
