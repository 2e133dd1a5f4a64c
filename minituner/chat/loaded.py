"""A model in memory that several conversations share: its weights once, and its voices.

    LoadedModel          names               what answers
      model  --------->  base                the weights without an adapter
      adapters           ada, formal         the same weights with that adapter on
      before             tuned, base         a fully fine-tuned model, and beside it the one it was made from

One answer at a time uses the weights (`using` takes turns), because switching an adapter changes what all see.
What a conversation has said lives in `Session`, so two people never read each other's. Lesson: notebook 09.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minituner.errors import UsageError, nearest

BASE, TUNED = "base", "tuned"


@dataclass(slots=True)
class Voice:
    """How an adapter (or the model itself) was trained to be asked: template, system text, tokenizer."""

    template: str
    system: str | None
    tokenizer: Any
    folder: Path | None = None


@dataclass
class LoadedModel:
    """Weights, and the voices that answer with them.

    `voices` are named, the one to begin with first. `before` is the model that a full fine-tuning started from, if it
    was loaded too. `where` says what was loaded.
    """

    model: Any
    tokenizer: Any
    voices: dict[str, Voice] = field(default_factory=dict)
    before: Any = None
    where: str = ""
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if not self.voices:
            self.voices = {BASE: Voice("native", None, self.tokenizer)}

    @property
    def names(self) -> list[str]:
        """The voices there are, the one to begin with first."""
        return list(self.voices)

    @property
    def context(self) -> int | None:
        """The most tokens of prompt and answer together; None if the model names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def check(self, name: str) -> str:
        """`name`, if there is such a voice.

        Raises:
            UsageError: there is none; the nearest is named.
        """
        if name not in self.voices:
            hint = nearest(name, self.names)
            raise UsageError(f"there is no adapter {name!r} here", fix=hint or f"there are: {', '.join(self.names)}")
        return name

    @contextmanager
    def using(self, name: str, given_up: Callable[[], bool] = lambda: False) -> Iterator[Any]:
        """Within: the model that speaks with this voice, for this thread alone; None if `given_up` while waiting."""
        self.check(name)
        while not self._turn.acquire(timeout=0.05):
            if given_up():
                yield None
                return
        try:
            if name == BASE and self.before is not None:
                yield self.before
            elif not hasattr(self.model, "peft_config"):
                yield self.model
            elif name == BASE:
                try:
                    with self.model.disable_adapter():
                        yield self.model
                finally:
                    self.model.requires_grad_(False)  # peft leaves what it switches on again as if for training
            else:
                if self.model.active_adapter != name:
                    self.model.set_adapter(name, inference_mode=True)
                yield self.model
        finally:
            self._turn.release()
