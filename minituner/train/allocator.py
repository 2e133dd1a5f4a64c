"""The memory of a step is kept for the next one: the C library hands none back to the system in between.

    as it comes    a layer's 6 MB is asked of the system, and its pages arrive zeroed, one fault each   33,000 a step
    kept           the same pages again                                                                 a few

Measured in turns on 2 cores, packs of 1,024: 2 to 5% of a step's time, and the same peak, since every step has the same
(assets/benchmarks/README.md). For glibc, on Linux; elsewhere, and where MALLOC_TRIM_THRESHOLD_ or
MALLOC_MMAP_THRESHOLD_ are set by hand, nothing is changed. Lesson: notebook 08.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
LARGEST = 2**25  # bytes; glibc takes no larger threshold, so 32 MB and more still go straight back to the system


def keep_memory() -> bool:
    """Tell the C library for the rest of this process; False where it is another one, or told by hand already."""
    if any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP")):
        return False
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS and musl have no mallopt, and Windows no CDLL(None)
        return False
    return bool(tell(M_MMAP_THRESHOLD, LARGEST) and tell(M_TRIM_THRESHOLD, -1))
