"""Errors for the person reading them: what is wrong, why, the fix, the next command.

Every error that a user can cause is a `MinitunerError`. The command line prints it as a message (never as a
traceback, unless `--debug`) and exits with its `exit_code`:

    1   failed (a download, the disk, a broken model folder)
    2   wrong recipe, wrong data or wrong usage
    75  stopped early on request with a checkpoint saved; resume it
    130 interrupted from the keyboard, checkpoint saved
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class MinitunerError(Exception):
    """Something failed; the text says what, why and what to do next. Exit code 1."""

    exit_code = 1
    said_elsewhere = False  # with several ranks: another one prints this, so the message is not repeated

    def __init__(self, what: str, *, why: str = "", fix: str = "", next_command: str = "") -> None:
        self.what, self.why, self.fix, self.next_command = what, why, fix, next_command
        super().__init__(self.text())

    def text(self) -> str:
        """The whole message, one line for each part that is known."""
        parts = [self.what]
        if self.why:
            parts.append(f"  why:  {self.why}")
        if self.fix:
            parts.append(f"  fix:  {self.fix}")
        if self.next_command:
            parts.append(f"  next: {self.next_command}")
        return "\n".join(parts)


class UsageError(MinitunerError):
    """The command, the recipe or the data is wrong. Exit code 2."""

    exit_code = 2


class DataError(UsageError):
    """A record or a data file cannot be used. Exit code 2."""


class SourceError(MinitunerError):
    """A model could not be fetched, or what was fetched is not what was promised. Exit code 1."""


class StoppedEarly(MinitunerError):
    """Training was asked to stop; what was trained is in a checkpoint. Exit code 75 (or 130 for Ctrl-C)."""

    exit_code = 75


def nearest(word: str, known: Sequence[str]) -> str:
    """A question naming the closest known word (`did you mean 'lora_rank'?`), or an empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""
