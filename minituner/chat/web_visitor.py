"""One person's conversation on the page, apart from everybody else's.

    Host      the model, the line in front of it, what anybody may ask for      one a server
    Visitor   a session, the one beside it while comparing, the turn under way  one a browser tab

What has been said is kept here, on the server's side: a browser sends the new message and its settings, and cannot
put words into an earlier answer. No gradio here. Lesson: notebook 09.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minituner.chat.commands import Talk
from minituner.chat.line import Line
from minituner.chat.loaded import LoadedModel
from minituner.chat.session import Session
from minituner.chat.settings import Settings
from minituner.chat.turn import Turn
from minituner.errors import UsageError

WHOLE = {"max_new_tokens", "top_k", "seed"}
Bubble = dict[str, str]  # {"role": "user" or "assistant", "content": text}


@dataclass
class Host:
    """What all visitors share.

    `settings` are where each begins; `longest_message` is in characters, and a visitor may ask for no more than
    `longest_answer` tokens.
    """

    loaded: LoadedModel
    settings: Settings = field(default_factory=Settings)
    template: str | None = None
    system: str | None = None
    line: Line = field(default_factory=Line)
    longest_message: int = 8000
    longest_answer: int = 1024

    def __post_init__(self) -> None:
        if self.longest_message < 1:
            raise UsageError(f"messages of {self.longest_message} characters", fix="1 or more")
        if self.settings.max_new_tokens > self.longest_answer:
            raise UsageError(
                f"answers begin at {self.settings.max_new_tokens} tokens, and {self.longest_answer} are the most",
                fix="lower --max-new-tokens, or raise --longest-answer",
            )

    def session(self, adapter: str | None = None) -> Session:
        """A conversation that begins now."""
        return Session(self.loaded, adapter=adapter, template=self.template, system=self.system)

    def first_system(self, adapter: str) -> str:
        """The system text that this adapter is asked with unless a visitor writes another."""
        return self.session(adapter).system or ""


class Visitor:
    """One person's conversation.

    Args:
        host: what is shared.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.notes: list[str] = []
        self.talk = Talk(host.session(), say=self.notes.append)
        self.talk.session.say = self.notes.append
        self.turn: Turn | None = None

    def send(
        self,
        text: str,
        *,
        adapter: str | None = None,
        compare: bool = False,
        system: str | None = None,
        **settings: Any,
    ) -> Turn:
        """Begin the answer (or, to `compare`, both) to a message; `settings` are those of `Settings`.

        `system` None leaves the system text as it is.

        Raises:
            UsageError: the message is empty or too long, a setting is out of range, an answer is under way, or
                (LineFull) nobody else can wait now. Nothing was said then.
        """
        chosen = self._checked(text, system, settings)
        self._free()
        self.notes.clear()
        self.arrange(adapter or self.talk.session.adapter, compare)
        if system is not None:
            for side in self.talk.sides:
                side.system = system
        self.turn = Turn(self.talk.sides, text.strip(), chosen, self.host.line)
        return self.turn

    def arrange(self, adapter: str, compare: bool) -> None:
        """Let `adapter` answer, and with `compare` another beside it: the base, or the first adapter beside the base.

        Raises:
            UsageError: there is no such adapter, or nothing to compare.
        """
        talk = self.talk
        if adapter != talk.session.adapter:
            talk.session.use(adapter)
            if talk.beside and talk.beside.adapter != adapter:
                # The base is asked with the prompt of the adapter that it is compared with.
                other = talk.beside.adapter
                talk.beside.use(adapter)
                talk.beside.use(other)
        if not compare or (talk.beside and talk.beside.adapter == adapter):
            talk.beside = None
        if compare and not talk.beside:
            talk.compare()

    def stop(self) -> None:
        """End the answer under way, if there is one; what was shown of it stays."""
        if self.turn:
            self.turn.stop.set()

    def again(self) -> str:
        """Take the last turn back; returns its message.

        Raises:
            UsageError: there is none, or an answer is under way.
        """
        self._free()
        texts = [side.undo() for side in self.talk.sides]
        if texts[-1] is None:
            raise UsageError("there is no answer yet")
        return texts[-1]

    def forget(self) -> None:
        """Begin anew (an answer under way is stopped first)."""
        self.stop()
        if self.turn:
            self.turn.join()
        self.turn = None
        self.notes.clear()
        for side in self.talk.sides:
            side.reset()

    def bubbles(self) -> list[list[Bubble]]:
        """What to show of every side: what was said, and what is being said."""
        turn, shown = self.turn, []
        for side in self.talk.sides:
            said = list(side.messages)
            bubbles = [{"role": message.role, "content": message.text} for message in said]
            if turn and not turn.done and side in turn.sides:
                at = turn.sides.index(side)
                if len(said) == turn.began[at]:
                    bubbles.append({"role": "user", "content": turn.text})
                    if turn.answers[at]:
                        bubbles.append({"role": "assistant", "content": turn.answers[at]})
            shown.append(bubbles)
        return shown

    def _free(self) -> None:
        if self.turn and not self.turn.done:
            raise UsageError("an answer is under way", fix="wait for it, or stop it")

    def _checked(self, text: str, system: str | None, settings: dict[str, Any]) -> Settings:
        """The settings of a message that may be sent."""
        most = self.host.longest_message
        for what, given in (("message", text), ("system text", system or "")):
            if not isinstance(given, str):
                raise UsageError(f"the {what} is no text")
            if len(given) > most:
                raise UsageError(f"the {what} has {len(given)} characters", fix=f"{most} are the most")
        if not text.strip():
            raise UsageError("the message is empty", fix="write something first")
        for name in WHOLE & settings.keys():
            value = settings[name]
            if isinstance(value, str):
                if value.strip() and not value.strip().isdecimal():
                    raise UsageError(f"{name} is {value[:20]!r}", fix="give a whole number, or leave it empty")
                settings[name] = int(value) if value.strip() else None
            elif isinstance(value, float):  # a browser has no other numbers
                if not value.is_integer():
                    raise UsageError(f"{name} is {value}", fix="give a whole number")
                settings[name] = int(value)
        try:
            chosen = self.host.settings.changed(**settings)
        except TypeError:
            raise UsageError("a setting is no number") from None
        if chosen.max_new_tokens > self.host.longest_answer:
            raise UsageError(
                f"max_new_tokens is {chosen.max_new_tokens}", fix=f"{self.host.longest_answer} are the most here"
            )
        return chosen
