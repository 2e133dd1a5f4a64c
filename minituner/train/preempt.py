"""Stopping on request: a signal only raises a flag; the loop finishes its step, saves, and leaves.

Ctrl-C (SIGINT)     checkpoint, exit 130; a second Ctrl-C leaves at once
SIGTERM, SIGUSR1    checkpoint, exit 75 (what a scheduler sends before it takes the machine)

Before the first step there is nothing to save: within `at_once` a signal ends the work right away, with the same exit
status. Several ranks must leave after the same step, but a signal may reach one of them first, or only one. So nobody
acts on the flag itself: each rank casts `votes`, they are summed with the loss that all ranks sum anyway, and every
rank acts on the same sums:

    rank 0   votes 0 0  --+
                          +--  sums 0 1: both save after this step and exit 75
    rank 1   votes 0 1  --+

Lesson: notebook 07.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from minituner.errors import StoppedEarly

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}


class StopRequest:
    """Within a `with` block, `signal` holds the signal that asked for a stop, or None."""

    def __init__(self, *, quiet: bool = False, keep: bool = False) -> None:
        """`quiet`: print nothing when a signal comes. `keep`: after a stop, ignore further signals to the very end.

        With several ranks the launcher asks all others to leave as soon as the first has left. They are leaving.
        """
        self.signal: int | None = None
        self.quiet, self.keep, self._at_once = quiet, keep, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread only; elsewhere (a notebook's worker) the caller interrupts.
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        leaving = self.keep and kind is not None and issubclass(kind, (StoppedEarly, KeyboardInterrupt))
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if leaving else handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within: a signal does not wait for a step to finish, because there is none."""
        before, self._at_once = self._at_once, True
        try:
            yield
        finally:
            self._at_once = before

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self._at_once or self.signal is not None):
            raise KeyboardInterrupt
        self.signal = number
        if self._at_once:
            raise StoppedEarly(
                f"{signal.Signals(number).name}: stopped before the first step; nothing had to be saved",
                fix="start the same command again",
            )
        # Straight to the terminal: a handler that interrupts a print must not print (Python refuses to re-enter it).
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving a checkpoint (Ctrl-C leaves now)\n"
        if not self.quiet:
            os.write(2, text.encode())

    @property
    def exit_code(self) -> int:
        """The exit status for the signal that arrived here, or 0."""
        return EXIT_CODES[signal.Signals(self.signal)] if self.signal is not None else 0

    def votes(self) -> tuple[int, int]:
        """This rank's votes for stopping: by Ctrl-C, and by a scheduler's signal."""
        return int(self.exit_code == 130), int(self.exit_code == 75)

    @staticmethod
    def decide(sums: Sequence[float]) -> int:
        """The exit status that all ranks take from the sums of their votes; 0 is to go on."""
        return 130 if sums[0] else 75 if sums[1] else 0
