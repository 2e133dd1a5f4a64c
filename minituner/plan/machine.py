"""Facts that belong beside every measured number: the machine, the versions, the date, and a process's own memory.

    {"cpu": "...", "cores": 2, "memory_gb": 23.5, "python": "3.11.7", "torch": "2.13.0", ..., "date": "2026-11-21"}

A number without its machine cannot be compared with anything. Lesson: notebook 04 shows them under its timings.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("minituner", "torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy", "trl")


def machine_facts() -> dict[str, Any]:
    """The machine, the installed versions (None where a package is absent) and the date."""
    import psutil

    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        # Above the number of cores, somebody else is computing too and seconds are too long.
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "date": datetime.date.today().isoformat(),
    }


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peak_rss_mb() -> float:
    """The most memory that this process has had resident so far, in MB (10^6 bytes).

    On Linux it is read from /proc: `getrusage` reports the parent's peak for a child that was just started, because
    the kernel carries that number over fork and exec.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
