"""A line of people in front of one model: first come, first served, and a full line says so at once.

    capacity 3     ada (answering)  bo (1 before)  cy (2 before)      dan: LineFull, "try again in a moment"

Without a bound, thirty people behind a slow model would each wait for half an hour without knowing it.
Lesson: notebook 09.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from minituner.errors import UsageError


class LineFull(UsageError):
    """Nobody else can wait now."""


class Line:
    """Places in front of a model, the one who uses it included.

    Args:
        capacity: how many may be in the line, 1 or more.
    """

    def __init__(self, capacity: int = 16) -> None:
        if capacity < 1:
            raise UsageError(f"a line for {capacity} people", fix="1 or more")
        self.capacity = capacity
        self._places: list[Place] = []
        self._moved = threading.Condition()

    def __len__(self) -> int:
        return len(self._places)

    def enter(self) -> Place:
        """A place at the end; leave it (`Place.leave`) in any case.

        Raises:
            LineFull: as many as may are waiting.
        """
        with self._moved:
            if len(self._places) >= self.capacity:
                raise LineFull(
                    "the model is busy, please wait",
                    why=f"{len(self._places)} messages are being answered or waiting",
                    fix="send it again in a moment",
                )
            place = Place(self)
            self._places.append(place)
            return place


class Place:
    """One place in a line."""

    def __init__(self, line: Line) -> None:
        self._line = line

    @property
    def before(self) -> int:
        """How many are served before this one; 0 when it is its turn, or it has left."""
        with self._line._moved:
            return self._line._places.index(self) if self in self._line._places else 0

    def wait(self, given_up: Callable[[], bool] = lambda: False, moved: Callable[[int], None] | None = None) -> bool:
        """Wait for the turn; False if `given_up` while waiting. `moved` is told how many are before, when it changes.

        `given_up` is asked about five times a second.
        """
        told = 0
        while not given_up():
            before = self.before
            if before == 0:
                return True
            if moved and before != told:
                moved(before)
                told = before
            with self._line._moved:
                if self._line._places.index(self):
                    self._line._moved.wait(timeout=0.2)
        return False

    def leave(self) -> None:
        """Let the next one move up (again does nothing)."""
        with self._line._moved:
            if self in self._line._places:
                self._line._places.remove(self)
                self._line._moved.notify_all()
