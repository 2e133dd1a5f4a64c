"""A conversation with a model: the history, the prompt built exactly as in training, the rule that ends an answer.

    session = open_session("work_dirs/ada/hf")
    for piece in session.reply("Who are you?"):      # text as it comes; close it, or set `stop`, to end it early
        print(piece, end="", flush=True)

Each turn encodes the conversation anew through `minituner.data.encoding`, so the ids in front of an answer are the ids
that training put there. The stop rule is read off an encoded example; nothing is guessed from names. Where the context
is full, the oldest turns are no longer sent:

    messages   u1 a1 | u2 a2 u3 a3  u4?        `first` = 2: what is left of the bar is kept, shown, saved, and not sent

Lesson: notebook 09.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minituner.chat.answer import Answer
from minituner.chat.loaded import BASE, LoadedModel
from minituner.chat.settings import Settings, checked_names
from minituner.chat.text_stream import TextStream
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import encode_prompt, stop_rule
from minituner.errors import UsageError

Stop = threading.Event | Callable[[], bool]


class Session:
    """One conversation over a model that may be shared with others.

    Args:
        loaded: the model (`open_model`).
        adapter: the voice that answers, one of `loaded.names`; None is the first of them.
        template: instead of the one it was trained with.
        system: instead of the one it was trained with; "" is none.
        settings: of every answer that is not given its own.
        say: told when the oldest turns no longer fit.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        adapter: str | None = None,
        template: str | None = None,
        system: str | None = None,
        settings: Settings | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.loaded, self.settings, self.say = loaded, settings or Settings(), say
        self.messages: list[Message] = []
        self.first = 0  # index of the first message that is still sent
        self._given_template, self._given_system = template, system
        self._busy = threading.Lock()
        self.adapter = loaded.names[0]
        self._voice = loaded.voices[self.adapter]
        self.use(adapter or self.adapter)

    @property
    def model(self) -> Any:
        """The weights (with the adapter that answered last, if there are several)."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the voice that answers."""
        return self._voice.tokenizer

    @property
    def template(self) -> str:
        """The template that prompts are made with."""
        return self._given_template or self._voice.template

    @property
    def system(self) -> str | None:
        """The system text in front of the conversation, if any."""
        return (self._voice.system if self._given_system is None else self._given_system) or None

    @system.setter
    def system(self, text: str | None) -> None:
        self._given_system = text or ""

    def use(self, adapter: str) -> None:
        """Let another adapter (or `base`) answer from here on; the conversation stays.

        Each adapter is asked with the template and system text it was trained with. The base is asked with those of
        the adapter before it: the same prompt, so that the difference is the adapter's.

        Raises:
            UsageError: there is no such adapter, or no such template.
        """
        voice = self.loaded.voices[self.loaded.check(adapter)]
        if adapter != BASE or self.adapter == BASE:
            self._voice = voice
        self.adapter = adapter
        if self.template == "native" and not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                "this model's tokenizer has no chat template",
                why="base models usually come without one",
                fix="name the template to ask with, e.g. --prompt-template default",
                next_command="minituner list-templates",
            )
        self._stop_rule = stop_rule(self.tokenizer, self.template)

    def fork(self, adapter: str | None = None) -> Session:
        """Another conversation that begins as this one is now; `adapter` answers there."""
        other = Session(
            self.loaded,
            adapter=self.adapter if self.adapter != BASE else None,
            template=self._given_template,
            system=self._given_system,
            settings=self.settings,
            say=self.say,
        )
        other._voice, other.adapter = self._voice, self.adapter
        other.use(adapter or self.adapter)
        other.messages, other.first = list(self.messages), self.first
        return other

    def prompt_ids(self, text: str) -> list[int]:
        """The ids that would be sent for `text` as the next user message, if all of them fit."""
        return self._ids(text, self.first)

    def _ids(self, text: str, first: int) -> list[int]:
        head = [Message("system", self.system)] if self.system else []
        turns = [*head, *self.messages[first:], Message("user", text)]
        return encode_prompt(Conversation(turns), self.tokenizer, self.template)

    def _fitted(self, text: str, room: int) -> list[int]:
        """The ids to send, so that `room` tokens are left for the answer; the oldest turns make place.

        Raises:
            UsageError: the message alone is too long.
        """
        first, ids = self.first, self._ids(text, self.first)
        context = self.loaded.context
        while context and len(ids) + room > context:
            if first >= len(self.messages):
                raise UsageError(
                    f"the message ({len(ids)} tokens) and {room} for the answer exceed {context}",
                    fix="write less, or lower --max-new-tokens",
                )
            # A turn is a user message and all that follows it up to the next one.
            first = next(
                (i for i in range(first + 1, len(self.messages)) if self.messages[i].role == "user"),
                len(self.messages),
            )
            ids = self._ids(text, first)
        if first > self.first:
            turns = sum(message.role == "user" for message in self.messages[self.first : first])
            self.first = first
            left = sum(message.role == "user" for message in self.messages[first:])
            self.say(
                f"the context of {context} tokens is full: the oldest {turns} turn{'s are' if turns != 1 else ' is'} no"
                f" longer sent, {left or 'none'} before this message still {'is' if left == 1 else 'are'}"
            )
        return ids

    def reply(self, prompt: str, settings: Settings | None = None, *, stop: Stop | None = None) -> Iterator[str]:
        """The answer in pieces, as they become certain; together they are the answer.

        When it ends, is stopped, or the iterator is closed, the turn is in `messages` with what was shown (nothing
        shown: it is not). Other sessions may answer at the same time; they take turns.

        Args:
            stop: an event, or something to call; set or True ends the answer after the token that is being computed.

        Raises:
            UsageError: the message does not fit into the context, or this session is answering already.
        """
        chosen = settings or self.settings
        if not self._busy.acquire(blocking=False):
            raise UsageError("this session is answering already", fix="wait for it, stop it, or use another session")
        try:
            ids = self._fitted(prompt, chosen.max_new_tokens)
            ended = threading.Event()
            asked = stop.is_set if isinstance(stop, threading.Event) else stop
            stop_ids, texts = self._stop_rule
            rule = stop_ids, [*texts, *chosen.stop_words]
            text = TextStream(self.tokenizer, rule[1])
            job = Answer(
                self.loaded,
                self.adapter,
                self.tokenizer,
                ids,
                rule,
                chosen,
                turns=len(self.messages),
                interrupted=lambda: ended.is_set() or bool(asked and asked()),
            )
            try:
                for token in job:
                    if piece := text.put(token):
                        yield piece
                if piece := text.finish(job.text()):
                    yield piece
            finally:
                ended.set()
                job.join()
                if job.error is None and (text.shown or job.complete):
                    self.messages += [Message("user", prompt), Message("assistant", text.shown)]
        finally:
            self._busy.release()

    def ask(
        self,
        prompt: str,
        stream: Callable[[str], None] | None = None,
        settings: Settings | None = None,
        *,
        stop: Stop | None = None,
    ) -> str:
        """The whole answer, which is then part of the history; `stream` gets the text as it grows.

        Raises:
            UsageError: as `reply`.
        """
        pieces = []
        answer = self.reply(prompt, settings, stop=stop)
        try:
            for piece in answer:
                pieces.append(piece)
                if stream:
                    stream(piece)
        finally:
            answer.close()  # Ctrl-C, or an error of `stream`: the model stops before anybody goes on
        return "".join(pieces)

    def undo(self) -> str | None:
        """Take the last turn back; returns what the user had said, or None if there is no turn."""
        at = next((i for i in reversed(range(len(self.messages))) if self.messages[i].role == "user"), None)
        if at is None:
            return None
        text = self.messages[at].text
        del self.messages[at:]
        self.first = min(self.first, at)
        return text

    def reset(self) -> None:
        """Forget the conversation (the system text stays)."""
        self.messages.clear()
        self.first = 0


def open_session(
    model: str | Path,
    *,
    adapter: str | Path | list[str | Path] | None = None,
    template: str | None = None,
    system: str | None = None,
    say: Callable[[str], None] = print,
    dtype: str = "auto",
    bits: int | None = None,
    compare: bool = False,
    trust_remote_code: bool = False,
    other_base: bool = False,
    **settings: Any,
) -> Session:
    """Load a model and begin a conversation; `settings` are those of `Settings`, the rest as in `open_model`.

    Raises:
        UsageError: a setting or template that does not exist, or an adapter that does not fit. MinitunerError: the
            model cannot be loaded.
    """
    from minituner.chat.opening import open_model
    from minituner.data.templates import NamedTemplate

    chosen = Settings(**checked_names(settings))
    if template not in (None, "native"):
        NamedTemplate.find(template)  # a misspelt name is said before minutes of loading
    adapters = [] if adapter is None else adapter if isinstance(adapter, list) else [adapter]
    loaded = open_model(
        model,
        adapters,
        dtype=dtype,
        bits=bits,
        compare=compare,
        trust_remote_code=trust_remote_code,
        other_base=other_base,
        say=say,
    )
    return Session(loaded, template=template, system=system, settings=chosen, say=say)


def chat(model: str | Path, prompt: str, **options: Any) -> str:
    """One answer of a model folder or catalog name to one prompt; options as in `open_session`."""
    return open_session(model, **options).ask(prompt)
