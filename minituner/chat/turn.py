"""One message and the answers to it, generated in a thread while a page or a notebook looks on.

    thread    waiting (2 before) | base: It i | base: It is. tuned: I | base: It is. tuned: I am Ada. done
    reader          ^                  ^                                            ^      (a slow one skips)

The reader always sees the newest state and never holds the model: if it leaves, the answers stop after the token that
is being computed, and the next in line is served. Lesson: notebook 09.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from minituner.chat.line import Line
from minituner.chat.session import Session
from minituner.chat.settings import Settings
from minituner.errors import MinitunerError


class Turn:
    """A message to one or several sessions over one model, which answer one after the other.

    Args:
        sides: who answers.
        text: the message.
        settings: of every answer.
        line: who else uses the model.

    Raises:
        LineFull: nobody else can wait now.
    """

    def __init__(self, sides: Sequence[Session], text: str, settings: Settings, line: Line) -> None:
        self.sides, self.text, self.settings = list(sides), text, settings
        self.answers = [""] * len(self.sides)  # what has come so far
        self.began = [len(side.messages) for side in self.sides]  # a side with more messages has kept its answer
        self.before = 0  # how many are served first
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.done = self._stopped = False
        self._version, self._changed = 0, threading.Condition()
        self._place = line.enter()
        self._thread = threading.Thread(target=self._work, name="turn", daemon=True)
        self._thread.start()

    @property
    def refusal(self) -> MinitunerError | None:
        """What the person who asked can do something about, if that is what went wrong."""
        return self.error if isinstance(self.error, MinitunerError) else None

    @property
    def stopped(self) -> bool:
        """Whether it ended because somebody wanted it to."""
        return self._stopped

    def updates(self, longest: float = 1.0) -> Iterator[None]:
        """Go on whenever there is something new to show, at least every `longest` seconds, until all is said.

        Closing it stops the answers.

        Raises:
            Exception: what the model raised, unless it is a `refusal`.
        """
        seen = -1
        try:
            while True:
                with self._changed:
                    if self._version == seen and not self.done:
                        self._changed.wait(timeout=longest)
                    seen, done = self._version, self.done
                yield
                if done:
                    break
            if self.error and not self.refusal:
                raise self.error
        finally:
            self.stop.set()

    def join(self) -> None:
        """Wait until the model is free of this turn."""
        self._thread.join()

    def _work(self) -> None:
        try:
            if self._place.wait(self.stop.is_set, self._moved):
                self._moved(0)
                for number, side in enumerate(self.sides):
                    for piece in side.reply(self.text, self.settings, stop=self.stop):
                        with self._changed:
                            self.answers[number] += piece
                            self._new()
        except BaseException as error:  # raised, or shown, where the answers are read
            self.error = error
        finally:
            self._place.leave()
            with self._changed:
                self._stopped, self.done = self.stop.is_set(), True
                self._new()

    def _moved(self, before: int) -> None:
        with self._changed:
            self.before = before
            self._new()

    def _new(self) -> None:
        self._version += 1
        self._changed.notify_all()
