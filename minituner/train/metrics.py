"""Metrics: one line a step, from which everything else that watches a run is made.

    {"step": 7, "epoch": 0.3, "loss": 2.1, "learning_rate": 1e-4, "grad_norm": 0.8,     what was learned
     "supervised_tokens": 310, "tokens": 980, "computed_tokens": 910,                   in this step
     "trained_tokens": 2170,                                                            in all of training
     "tokens_per_second": 350.0, "model_flops_per_second": 1.1e11, "gemm_share": 0.62,  how fast, and how near the limit
     "peak_memory_gb": 1.9,                                                             this process, so far
     "seconds": 2.8, "seconds_data": 0.01, "seconds_model": 2.6, ...}                   where the time went

`computed_tokens` are fewer than `tokens` where documents of a pack begin alike (data/prefixes.py). `gemm_share` is the
model's FLOP/s (plan/flops.py; of computed tokens, recomputation not counted) as a share of what this machine reaches in
a large matrix product, measured once at the start, all ranks together. `seconds_*` are since the line before, so saving
and evaluation after step 7 are in line 8, and they add up to the wall clock. At the end their shares are said and kept
in `summary.json`. Lesson: notebook 07.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minituner.plan.flops import causal_pairs, compute_dtype, gemm_rate, model_flops
from minituner.plan.machine import peak_rss_mb
from minituner.train.stopwatch import Stopwatch

if TYPE_CHECKING:
    import torch

    from minituner.data.collate import Batch
    from minituner.train.run import Run

BETWEEN_STEPS = ("saving", "evaluation", "answers", "callbacks")


class Meter:
    """Makes the line of each step; `clock` is the run's stopwatch."""

    def __init__(self, run: Run) -> None:
        recipe, device = run.recipe, run.engine.device.type
        recompute = recipe.train.activation_checkpointing and recipe.method.name != "full"
        self.flops = model_flops(run.model, flows_to_embedding=recompute)
        self.gemm_rate = run.engine.all_sums([gemm_rate(compute_dtype(run.model), device)])[0]
        self.run, self.clock, self.began = run, Stopwatch(device), time.monotonic()
        self.parts, self.done = run.feed.parts, 0.0

    def window_flops(self, window: Sequence[Batch]) -> float:
        """This rank's operations for one window; ranks that share a row share its attention."""
        return sum(
            self.flops.of(batch.computed_tokens, batch.supervised_tokens, causal_pairs(batch.seq_lens) / self.parts)
            for batch in window
        )

    def window_counts(self, window: Sequence[Batch]) -> list[float]:
        """This rank's supervised, all and computed tokens, and operations, of one window."""
        tokens = [(batch.supervised_tokens, batch.tokens, batch.computed_tokens) for batch in window]
        return [*map(sum, zip(*tokens, strict=True)), self.window_flops(window)]

    def line(self, loss: float, rate: float, norm: float, sums: Sequence[float]) -> dict[str, Any]:
        """The metrics of the step that was just made; `sums` are the `window_counts` of all ranks."""
        run, (supervised, tokens, computed, flops) = self.run, sums
        lap = self.clock.lap()
        seconds = sum(lap.values()) - sum(lap[part] for part in BETWEEN_STEPS)
        self.done += flops
        steps = run.step - run.first_step
        return {
            "step": run.step,
            "epoch": run.step / run.feed.steps_per_epoch,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "supervised_tokens": int(supervised),
            "tokens": int(tokens),
            "computed_tokens": int(computed),
            "trained_tokens": run.trained_tokens,
            "supervised_tokens_per_second": supervised / seconds,
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": flops / seconds,
            "gemm_share": flops / seconds / self.gemm_rate,
            "peak_memory_gb": peak_memory_gb(run.engine.device),
            "seconds": seconds,
            **{f"seconds_{part}": value for part, value in lap.items()},
            "eta_seconds": (time.monotonic() - self.began) / steps * (run.total_steps - run.step),
            **self._mark(),
        }

    def summary(self) -> dict[str, Any]:
        """Totals of this call: seconds by part, their shares, tokens, rates."""
        self.clock.lap()
        totals, lines = self.clock.totals, self.run.metrics
        computing = sum(totals.values()) - sum(totals[part] for part in BETWEEN_STEPS)
        tokens = sum(line["tokens"] for line in lines)
        return {
            "steps": len(lines),
            "tokens": tokens,
            "computed_tokens": sum(line["computed_tokens"] for line in lines),
            "supervised_tokens": sum(line["supervised_tokens"] for line in lines),
            "seconds": sum(totals.values()),
            "seconds_by_part": dict(totals),
            "shares": self.clock.shares(),
            "tokens_per_second": tokens / computing if computing else 0.0,
            "model_flops": self.done,
            "model_flops_per_second": self.done / computing if computing else 0.0,
            "gemm_flops_per_second": self.gemm_rate,
            "gemm_share": self.done / computing / self.gemm_rate if computing else 0.0,
            "peak_memory_gb": peak_memory_gb(self.run.engine.device),
            **self._mark(),
        }

    def _mark(self) -> dict[str, str]:
        return {"injected": self.run.injected} if self.run.injected else {}


def summary_line(summary: Mapping[str, Any]) -> str:
    """The shares of a summary as one line, largest first, parts that took nothing left out."""
    shares = dict(summary["shares"])
    overhead = shares.pop("overhead")
    parts = sorted((item for item in shares.items() if item[1] >= 0.0005), key=lambda item: -item[1])
    text = ", ".join(f"{part} {share:.1%}" for part, share in parts)
    rate = f"{summary['gemm_share']:.0%} of the GEMM rate"
    return f"time: {text}; overhead (data, callbacks, loop) {overhead:.1%}; {rate}"


def peak_memory_gb(device: torch.device) -> float:
    """The most memory so far, in GB (10^9 bytes): allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_rss_mb() / 1e3
