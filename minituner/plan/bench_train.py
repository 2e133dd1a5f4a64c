"""`minituner bench train`: how fast this machine trains a recipe, and how near its own limit, as JSON.

    records -> a fresh process takes the steps -> tokens/s, s/step, share of the GEMM rate, peak memory, fill

    "tokens_per_second": 231.0            real tokens; the supervised ones beside it
    "computed_share": 0.85                of them; where a pack's documents begin alike, that is computed once
    "seconds_per_step": 4.43              the median of the steady state, after the first two
    "gemm_share": 0.71                    model FLOP/s by a large matrix product's, measured right before and after
    "limit_tokens_per_second": 325.4      what that product's rate would allow
    "first_step_seconds": 5.1             with what is done once: kernels chosen, regions compiled

Without a recipe it measures the course's own: SmolLM2-135M-Instruct, LoRA r = 16 on all linear layers, float32, packs
of 1,024 tokens of generated Alpaca-like records. The measured process takes one step at a time, when it is told to
(`bench_train_worker.py`), which lets rivals take turns (tests/benchmarks/compare_training.py). Lesson: notebook 07.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from minituner.errors import MinitunerError, UsageError
from minituner.recipe import Recipe

WARM_UP = 2  # steps that are not counted: kernels are chosen, memory is taken from the system
RECORDS = 1_000
Say = Callable[[str], None]


def benchmark_recipe(data: Path) -> Recipe:
    """The recipe that is measured when none is named; one pack of 1,024 tokens a step."""
    return Recipe.from_values(
        {
            "name": "bench",
            "model": {"name_or_path": "smollm2-135m-instruct", "dtype": "float32"},
            "method": {"name": "lora", "lora_rank": 16, "target_modules": "all-linear"},
            "data": {"sources": [{"path": str(data), "format": "alpaca"}], "max_length": 1024, "packing": "best_fit"},
            "train": {"gradient_accumulation_steps": 1, "learning_rate": 1e-4, "num_epochs": 1},
        }
    )


class Worker:
    """A measured process that answers one line of JSON for each command; use as a context manager."""

    def __init__(self, command: Sequence[str], first_line: str, env: dict[str, str] | None = None) -> None:
        # Closed in __exit__, with the process that writes to it.
        self.errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, **(env or {})},
        )
        self.facts = self.ask(first_line)

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and wait for the answer.

        Raises:
            MinitunerError: the process ended instead; its last words are in the message.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended; what it said before is read below
            pass
        answer = self.process.stdout.readline()
        if not answer:
            status = self.process.wait()
            self.errors.seek(0)
            raise MinitunerError(
                f"the measured process ended with exit status {status}",
                why=" | ".join(self.errors.read().strip().splitlines()[-4:]),
                fix="with exit status -9 the memory was not enough: a smaller data.max_length",
            )
        return json.loads(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self.process.kill()
        self.process.communicate()
        self.errors.close()


def own_worker(recipe: Recipe, env: dict[str, str] | None = None) -> Worker:
    """A fresh process that is ready to take steps of this recipe."""
    spec = json.dumps({"recipe": recipe.model_dump(mode="json")})
    return Worker([sys.executable, "-m", "minituner.plan.bench_train_worker"], spec, env)


def bench_train(
    recipe: str | Path | None = None, overrides: Sequence[str] = (), *, steps: int = 8, say: Say = print
) -> dict[str, Any]:
    """Take `steps` steps of a recipe in a fresh process and return machine, settings and figures, ready for JSON.

    Raises:
        UsageError: too few steps, or a wrong recipe. MinitunerError: whatever training itself would have said.
    """
    from minituner.plan.bench_data import make_records
    from minituner.plan.machine import machine_facts

    if steps <= WARM_UP:
        raise UsageError(f"steps={steps}: the first {WARM_UP} only warm up", fix=f"at least {WARM_UP + 1}")
    with tempfile.TemporaryDirectory(prefix="minituner-bench-") as folder:
        if recipe is None:
            data = make_records(Path(folder) / "alpaca.jsonl", RECORDS, seed=42)
            plain = benchmark_recipe(data)
            loaded = Recipe.from_values(plain.model_dump(mode="json"), "the benchmark's recipe", overrides)
        else:
            loaded = Recipe.load(recipe, overrides)
        say(f"{loaded.model.name_or_path}, {loaded.method.name}, packs of {loaded.data.max_length}: loading")
        with own_worker(loaded) as worker:
            before = worker.ask("gemm")
            rows = []
            for number in range(steps):
                rows.append(worker.ask("step"))
                say(f"step {number + 1} of {steps}: {rows[-1]['tokens'] / rows[-1]['seconds']:.1f} tokens/s")
            after = worker.ask("gemm")
    figures = {"machine": machine_facts(), "settings": settings_of(loaded, steps)}
    return figures | summary(worker.facts, rows, [g["gemm_flops_per_second"] for g in (before, after)])


def settings_of(recipe: Recipe, steps: int) -> dict[str, Any]:
    """What decides the figures, without paths of this machine."""
    values = recipe.model_dump(mode="json")
    model = Path(recipe.model.name_or_path)
    return {
        "model": model.name if model.is_dir() else recipe.model.name_or_path,
        "dtype": recipe.model.dtype,
        "method": values["method"],
        "max_length": recipe.data.max_length,
        "packing": recipe.data.packing,
        "train": values["train"],
        "steps": steps,
        "warm_up_steps": WARM_UP,
    }


def summary(facts: dict[str, Any], rows: Sequence[dict[str, Any]], gemm: Sequence[float]) -> dict[str, Any]:
    """The steady state of measured steps; rates are totals over totals, so that long packs count as they should."""
    steady = list(rows[WARM_UP:])
    keys = ("seconds", "tokens", "computed_tokens", "flops")
    seconds, tokens, computed, flops = (sum(row[key] for row in steady) for key in keys)
    best = max(gemm)
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "trained_tokens_per_second": round(sum(row["supervised_tokens"] for row in steady) / seconds, 1),
        "computed_share": round(computed / tokens, 4),
        "seconds_per_step": round(statistics.median(row["seconds"] for row in steady), 4),
        "first_step_seconds": round(rows[0]["seconds"], 4),
        "gemm_share": round(flops / seconds / best, 4),
        "limit_tokens_per_second": round(best / (flops / tokens), 1),
        "gemm_flops_per_second": [round(rate) for rate in gemm],
        "model_flops_per_token": round(flops / tokens),
        "peak_memory_gb": round(max(row["peak_memory_gb"] for row in rows), 3),
        **facts,
        "seconds_of_each_step": [round(row["seconds"], 4) for row in rows],
        "tokens_of_each_step": [row["tokens"] for row in rows],
        "loss_of_each_step": [row["loss"] for row in rows],
    }
