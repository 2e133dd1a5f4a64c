"""Stopping on request: a signal only raises a flag; the loop finishes its step, saves, and leaves.

Ctrl-C (SIGINT)     checkpoint, exit 130; a second Ctrl-C leaves at once
SIGTERM, SIGUSR1    checkpoint, exit 75 (what a scheduler sends before it takes the machine)
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}


class StopRequest:
    """Within a `with` block, `signal` holds the signal that asked for a stop, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread only; elsewhere (a notebook's worker) the caller interrupts.
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        # Straight to the terminal: a handler that interrupts a print must not print (Python refuses to re-enter it).
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving a checkpoint (Ctrl-C leaves now)\n"
        os.write(2, text.encode())

    @property
    def exit_code(self) -> int:
        """The exit status for the signal that arrived."""
        return EXIT_CODES[signal.Signals(self.signal)] if self.signal is not None else 0
