"""The doctor: what this machine has, and what that means for training on it."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any


@dataclass(frozen=True)
class Machine:
    """Facts about this machine; prints as a short list, `facts` holds the same for programs."""

    facts: dict[str, Any]

    def __repr__(self) -> str:
        width = max(map(len, self.facts))
        return "\n".join(f"{key:{width}}  {value}" for key, value in self.facts.items())


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
