"""The measured side of `minituner bench train`: one recipe in one fresh process, which takes a step when it is told to.

    parent                                            this process
    {"recipe": {...}}            ------------------>  data, model, adapters: the same set-up as training
                                 <------------------  {"set_up_seconds": 9.1, "fill": 0.984, ...}
    step                         ------------------>  one optimizer step, with the clock on
                                 <------------------  {"seconds": 3.2, "tokens": 1021, ...}
    gemm                         ------------------>  a large matrix product, now
    (end of input)               ------------------>  leave

Between commands it sleeps, so rivals can take turns step by step on one machine: whatever slows the machine down slows
both. One JSON object a line on standard output; what the program says goes to standard error. Lesson: notebook 07.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from minituner.errors import MinitunerError


class Steps:
    """A run of a recipe that takes single steps and measures them; nothing is saved."""

    def __init__(self, values: dict[str, Any], folder: Path, say: Callable[[str], None]) -> None:
        import torch

        from minituner.model.loading import device_of_this_machine
        from minituner.recipe import Recipe
        from minituner.train.launch import world_of
        from minituner.train.metrics import Meter
        from minituner.train.ranks import Ranks
        from minituner.train.run import set_up

        start = time.perf_counter()
        self.device = torch.device(device_of_this_machine())
        self.run = set_up(Recipe.from_values(values), folder, folder, say, Ranks(world_of(), self.device.type))
        self.meter, self.done = Meter(self.run), 0
        self.set_up_seconds = time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """What is known before the first step."""
        import torch

        from minituner.model.adapters import count_parameters

        trained, total = count_parameters(self.run.model)
        return {
            "set_up_seconds": round(self.set_up_seconds, 2),
            "parameters": total,
            "trained_parameters": trained,
            "fill": round(self.run.prepared.packs.fill, 4),
            "steps_per_epoch": self.run.feed.steps_per_epoch,
            "attention": self.run.attention,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
        }

    def step(self) -> dict[str, Any]:
        """One optimizer step: its seconds, tokens, supervised tokens, model FLOPs, loss, and the peak memory so far."""
        import torch

        from minituner.model.loss import loss_sum
        from minituner.train.metrics import peak_memory_gb

        run, engine = self.run, self.run.engine
        start = time.perf_counter()
        window = run.feed.window(self.done, lambda batch: batch.to(engine.device))
        supervised, total = sum(batch.supervised_tokens for batch in window), 0.0
        for batch in window:
            loss = loss_sum(engine.model, batch, run.attention, run.head)
            total += loss.item()
            engine.backward(loss / max(supervised, 1))
        engine.step(run.recipe.train.learning_rate)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.done += 1
        return {
            "seconds": seconds,
            "tokens": sum(batch.tokens for batch in window),
            "computed_tokens": sum(batch.computed_tokens for batch in window),
            "supervised_tokens": supervised,
            "flops": self.meter.window_flops(window),
            "documents": sum(len(batch.seq_lens) for batch in window),
            "loss": total / max(supervised, 1),
            "peak_memory_gb": peak_memory_gb(self.device),
        }

    def gemm(self) -> dict[str, Any]:
        """FLOP/s of a large matrix product at this moment, in the data type the model computes in."""
        from minituner.plan.flops import compute_dtype, measure_gemm_rate

        return {"gemm_flops_per_second": measure_gemm_rate(compute_dtype(self.run.model), self.device.type)}


def serve(commands: TextIO, answers: TextIO, folder: Path) -> None:
    """Read the recipe and commands, one a line, and answer each with one line of JSON.

    Raises:
        MinitunerError: an unknown command, or whatever the recipe's own set-up says.
    """

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        print(line, file=sys.stderr, flush=True)

    steps = Steps(json.loads(commands.readline())["recipe"], folder, say)
    kept = [line for line in said if line.startswith(("fused", "train.compile", "loss:", "tails:", "prefixes:"))]
    answer({**steps.facts(), "notes": kept})
    known = {"step": steps.step, "gemm": steps.gemm}
    for line in commands:
        if line.strip() not in known:
            raise MinitunerError(f"unknown command {line.strip()!r}", fix=f"one of {', '.join(known)}")
        answer(known[line.strip()]())


def main() -> int:
    """Serve standard input until it ends; 0 when that worked."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print must not be taken for an answer
    try:
        with tempfile.TemporaryDirectory(prefix="minituner-bench-") as name:
            serve(sys.stdin, answers, Path(name))
    except MinitunerError as error:
        print(error.text(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
