"""A tiny model behind the chat page, that answers in letters and can be held in the middle of an answer."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minituner.chat.line import Line
from minituner.chat.loaded import LoadedModel, Voice
from minituner.chat.session import Session
from minituner.chat.settings import Settings
from minituner.chat.web import Server, serve
from minituner.chat.web_visitor import Host
from tests.tiny import tiny_model, tiny_tokenizer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOKENS = 24
PATIENCE = 120  # seconds until a test that waits gives up; nothing depends on it otherwise


class Gate:
    """Holds a model: `hold(n)` lets n more tokens through, `open` all."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left: float = float("inf")
        self.held = False

    def hold(self, tokens: int = 0) -> None:
        with self._changed:
            self._left, self.held = tokens, False

    def open(self) -> None:
        with self._changed:
            self._left = float("inf")
            self._changed.notify_all()

    def wait_until_held(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.held, PATIENCE)

    def __call__(self, *_: Any) -> None:
        with self._changed:
            self.held = self._left <= 0
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._left > 0, PATIENCE), "nobody opened the gate"
            self._left -= 1


def in_letters(model: Any) -> Any:
    """The model, whose answers are lower-case letters and go on until the length is reached."""
    letters = torch.full((259,), float("-inf"))
    letters[tiny_tokenizer().convert_tokens_to_ids([chr(c) for c in range(97, 123)])] = 0

    def only_letters(_: Any, __: Any, output: Any) -> Any:
        output.logits = output.logits + letters
        return output

    model.register_forward_hook(only_letters)
    return model


class House:
    """A model with two voices (`tuned` and `base`), and what it answers when nobody else is there."""

    def __init__(self, capacity: int = 4, **options: Any) -> None:
        self.gate, tokenizer = Gate(), tiny_tokenizer()
        model, before = in_letters(tiny_model(0)), in_letters(tiny_model(1))
        for one in (model, before):
            one.register_forward_pre_hook(self.gate)
        voice = Voice("native", None, tokenizer)
        self.loaded = LoadedModel(model, tokenizer, {"tuned": voice, "base": voice}, before=before, where="tiny")
        self.host = Host(self.loaded, Settings(max_new_tokens=TOKENS), line=Line(capacity), **options)

    def alone(self, *messages: str, adapter: str = "tuned", tokens: int = TOKENS) -> list[str]:
        """The greedy answers of one conversation in a plain session."""
        session = Session(self.loaded, adapter=adapter, settings=Settings(max_new_tokens=tokens))
        return [session.ask(message) for message in messages]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def served(house: House, **options: Any) -> Iterator[Server]:
    """The page of a house, on a free port, with its gate open again at the end."""
    server = serve(house.host, port=free_port(), say=lambda line: None, **options)
    try:
        yield server
    finally:
        house.gate.open()
        server.close()


def dialogue(messages: tuple[str, ...] | list[str], answers: list[str]) -> list[dict[str, str]]:
    """What the page is to show."""
    turns = zip(messages, answers, strict=True)
    return [{"role": r, "content": c} for q, a in turns for r, c in (("user", q), ("assistant", a))]
