"""What a line that begins with / does in the terminal; everything else is a message to the model.

    /compare            base and tuned model answer side by side, each with a history of its own
    /adapter formal     another adapter answers from here on
    /etc is a folder    no command: the nearest is named, and a space in front sends it

Lesson: notebook 09.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minituner.chat import transcript
from minituner.chat.loaded import BASE
from minituner.chat.session import Session
from minituner.errors import UsageError, nearest

# XTuner's chat leaves with EXIT and forgets with RESET; both stay words of their own here.
WORDS = {"exit": "/exit", "quit": "/exit", "reset": "/reset"}
HELP = {
    "/reset": "forget the conversation",
    "/system [TEXT]": "show or set the system text (- for none)",
    "/save FILE": "write the conversation; a .jsonl file grows, and can be trained on (format openai)",
    "/load FILE": "go on with the last conversation of a file",
    "/compare": "base and tuned model side by side, on and off",
    "/adapter [NAME]": "show the adapters, or let another one answer (base: none)",
    "/again": "take the last answer back and answer anew",
    "/help": "this list",
    "/exit": "leave (Ctrl-D does too; Ctrl-C stops an answer)",
}


@dataclass
class Talk:
    """The conversation in the terminal, and the one beside it while comparing."""

    session: Session
    say: Callable[[str], None] = print
    beside: Session | None = None
    over: bool = False

    @property
    def sides(self) -> list[Session]:
        """Who answers, in this order."""
        return [self.beside, self.session] if self.beside else [self.session]

    def label(self, side: Session) -> str:
        """What stands in front of an answer."""
        return side.adapter if self.beside or len(side.loaded.names) > 2 else "assistant"

    def command(self, line: str) -> str | None:
        """Do what `line` says; returns a message for the model if it is one (or /again).

        Raises:
            UsageError: no such command, or it cannot be done.
        """
        line = WORDS.get(line.strip().lower(), line)
        if not line.startswith("/"):
            return line.strip() or None
        word, _, rest = line.partition(" ")
        known = {entry.split()[0]: entry for entry in HELP}
        do = getattr(self, "_" + word[1:].lower(), None) if word.lower() in known else None
        if word.lower() == "/quit":
            do = self._exit
        if do is None:
            hint = nearest(word, list(known))
            raise UsageError(
                f"there is no command {word}",
                fix=f"{hint + ' ' if hint else ''}/help lists all; a space in front sends the line as a message",
            )
        return do(rest.strip())

    def compare(self) -> None:
        """Let the base answer beside the adapter (or the first adapter beside the base).

        Raises:
            UsageError: there is only one model here.
        """
        others = [name for name in self.session.loaded.names if name != self.session.adapter]
        if not others:
            raise UsageError("there is nothing to compare with: no adapter", fix="start with --adapter FOLDER")
        self.beside = self.session.fork(BASE if BASE in others else others[0])

    def _compare(self, _: str) -> None:
        if self.beside:
            self.say(f"({self.session.adapter} goes on alone)")
            self.beside = None
        else:
            self.compare()
            self.say(f"({' and '.join(side.adapter for side in self.sides)} answer, each with a history of its own)")

    def _reset(self, _: str) -> None:
        for side in self.sides:
            side.reset()
        self.say("(forgotten)")

    def _system(self, text: str) -> None:
        if text:
            for side in self.sides:
                side.system = "" if text == "-" else text
        self.say(f"(system: {self.session.system or 'none'})")

    def _save(self, path: str) -> None:
        file = transcript.save(self.session, _file(path, "/save"))
        self.say(f"({file}: {self.session.adapter + chr(39) + 's conversation, ' if self.beside else ''}format openai)")

    def _load(self, path: str) -> None:
        for side in self.sides:
            turns = transcript.load(side, _file(path, "/load"))
        self.say(f"({turns} turn{'s' if turns != 1 else ''}; system: {self.session.system or 'none'})")

    def _adapter(self, name: str) -> None:
        if name:
            self.session.use(name)
            if self.beside and self.beside.adapter == name:
                self.beside = None
        self.say("  ".join(f"[{n}]" if n == self.session.adapter else n for n in self.session.loaded.names))

    def _again(self, _: str) -> str | None:
        texts = [side.undo() for side in self.sides]
        if texts[-1] is None:
            raise UsageError("there is no answer yet")
        return texts[-1]

    def _help(self, _: str) -> None:
        width = max(map(len, HELP))
        self.say("\n".join(f"{command:<{width}}  {what}" for command, what in HELP.items()))

    def _exit(self, _: str) -> None:
        self.over = True


def _file(path: str, command: str) -> str:
    if not path:
        raise UsageError(f"{command} needs a file's name", fix=f"{command} chats.jsonl")
    return path
