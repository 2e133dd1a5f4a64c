"""The stopwatch: where the seconds of a run go, so that its own metrics can be held against what was promised.

    with clock("data"):      window = feed.window(step)          data        0.002 s
    with clock("model"):     forward, backward                   model       1.310 s
    ...                      everything else                     loop        0.001 s
    clock.lap()                                                  and a new lap begins

The parts of a lap and `loop`, what no part claimed, add up to the wall clock: no second is lost. A GPU works behind the
program's back, so each part waits for it to finish, or the backward pass would be booked on whoever asks for the next
number. Lesson: notebook 07.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PARTS = ("data", "model", "optimizer", "waiting", "saving", "evaluation", "answers", "callbacks", "loop")
# What is neither the model's nor the optimizer's work, and was not asked for by a setting of its own.
OVERHEAD = ("data", "callbacks", "loop")


class Stopwatch:
    """Seconds by part, for the present lap and in all."""

    def __init__(self, device: str = "cpu", now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._on_gpu = now, device == "cuda"
        self.totals = dict.fromkeys(PARTS, 0.0)
        self.restart()

    def restart(self) -> None:
        """Begin a lap now; what was measured since the last one is forgotten."""
        self._lap, self._began = dict.fromkeys(PARTS, 0.0), self._now()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Within: seconds are booked on `part`, also when it raises. Parts do not nest."""
        start = self._now()
        try:
            yield
        finally:
            if self._on_gpu:
                import torch

                torch.cuda.synchronize()
            self._lap[part] += self._now() - start

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last lap (they add up to its wall clock); a new one begins."""
        now = self._now()
        done, self._lap = self._lap, dict.fromkeys(PARTS, 0.0)
        done["loop"] = now - self._began - sum(done.values())
        self._began = now
        for part, seconds in done.items():
            self.totals[part] += seconds
        return done

    def shares(self) -> dict[str, float]:
        """The share of each part in all laps so far, and of `overhead`; all 0 before the first lap."""
        whole = sum(self.totals.values()) or 1.0
        shares = {part: seconds / whole for part, seconds in self.totals.items()}
        return {**shares, "overhead": sum(shares[part] for part in OVERHEAD)}
