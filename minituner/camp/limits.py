"""A time limit for one call, so that a learner's endless loop ends with a sentence.

    with time_limit(30):
        answer(case)         # after 30 seconds: TooLong

A timer's signal interrupts Python code, in the main thread of a Unix process (a notebook's cells run there). Where
there is no such timer (Windows, another thread) the call has no limit, and one long call inside C is not interrupted
either; `minituner camp report` therefore runs answers in processes that it can kill.

Lesson: every notebook's exercises.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TooLong(BaseException):
    """A call took too long. Not an Exception: `except Exception` inside the learner's loop must not swallow it."""


def can_limit() -> bool:
    """Whether a time limit can be had here."""
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong inside the block after `seconds`, where that is possible; the old handler comes back afterwards."""
    if not can_limit():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again each second: a bare `except` may have caught the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
