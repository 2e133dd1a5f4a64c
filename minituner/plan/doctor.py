"""The doctor: what this machine has, and what that means for training on it.

    doctor()      a short list, for the first cell of a notebook
    checkup()     everything that `minituner doctor` prints: checks with what each gap disables and the command that
                  mends it (checks.py), and the attention support table (support.py)

Lesson: the first cell of every notebook.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from minituner.plan.checks import Check, all_checks
from minituner.plan.support import Support, as_lines, as_values, attention_support


@dataclass(frozen=True)
class Machine:
    """Facts about this machine; prints as a short list, `facts` holds the same for programs."""

    facts: dict[str, Any]

    def __repr__(self) -> str:
        width = max(map(len, self.facts))
        return "\n".join(f"{key:{width}}  {value}" for key, value in self.facts.items())


@dataclass(frozen=True)
class Checkup:
    """Everything the doctor found; prints as text, `values` holds the same for programs."""

    checks: list[Check]
    attention: list[Support]

    @property
    def can_train(self) -> bool:
        """True if nothing that training always needs is missing, too old or broken."""
        return all(check.status == "ok" for check in self.checks if check.required)

    @property
    def values(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {
            "can_train": self.can_train,
            "checks": [check.as_values() for check in self.checks],
            "attention": as_values(self.attention),
        }

    def __repr__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [line for check in self.checks for line in check.lines(width)]
        table = ["", "attention (* is what model.attention=auto takes for a plain model)", *as_lines(self.attention)]
        return "\n".join([*lines, *table])


def checkup(*, network: bool = False) -> Checkup:
    """Look at everything; with `network`, ask the model hub too (two seconds at most)."""
    return Checkup(list(all_checks(network=network)), attention_support())


def doctor() -> Machine:
    """Look at Python, packages, cores, memory, GPU and disk, and measure which data type is fast here."""
    import psutil
    import torch

    from minituner.home import home
    from minituner.model.loading import device_of_this_machine, fast_dtype

    memory = psutil.virtual_memory()
    device = device_of_this_machine()
    dtype, why = fast_dtype(device)
    place = home()
    while not place.exists():
        place = place.parent
    extras = ("bitsandbytes", "deepspeed", "flash_attn", "gradio")
    here = [name for name in extras if importlib.util.find_spec(name)]
    return Machine(
        {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory": f"{memory.total / 1e9:.0f} GB, {memory.available / 1e9:.0f} free",
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "data type": f"{str(dtype).removeprefix('torch.')} ({why})",
            "disk": f"{psutil.disk_usage(str(place)).free / 1e9:.0f} GB free for the cache",
            "extras": ", ".join(here) or "none of " + ", ".join(extras),
        }
    )
