"""Token ids become text while they come, and never half a character.

    id      bytes         shown
    [...]   E4 BD         nothing: the beginning of a Chinese character
    [...]   A0            你
    [...]   20            nothing: a space that may be the last, and answers are stripped
    [...]   3C 65 6F      nothing: '<eo' may become the stop text '<eoa>'

What was shown, put together, is the answer. Only the newest ids are decoded each time, so a long answer costs no more a
token than a short one. Lesson: notebook 09.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minituner.model.generate import decode

HALF = "\ufffd"  # what a decoder makes of bytes that are no whole character


class TextStream:
    """Ids in, pieces of text out. `put` after each token, `finish` with the whole answer."""

    def __init__(self, tokenizer: Any, stop_texts: Sequence[str]) -> None:
        self.tokenizer, self.stop_texts = tokenizer, tuple(stop_texts)
        self.shown = ""
        self._text = ""  # decoded so far: whole characters only
        self._ids: list[int] = []
        # A tokenizer may drop the space in front of the first id, so new ids are decoded behind a few known ones,
        # and what those give by themselves is taken off.
        self._known, self._done = 0, 0

    def put(self, token: int) -> str:
        """The text that this token makes certain (may be empty)."""
        self._ids.append(token)
        before = decode(self.tokenizer, self._ids[self._known : self._done])
        text = decode(self.tokenizer, self._ids[self._known :])
        if text.endswith(HALF) or not text.startswith(before):
            return ""
        self._text += text[len(before) :]
        self._known, self._done = self._done, len(self._ids)
        return self._show(self._certain())

    def finish(self, answer: str) -> str:
        """The rest of `answer` that was held back."""
        return self._show(answer)

    def _certain(self) -> str:
        text = self._text.lstrip()
        for stop_text in self.stop_texts:
            text = text.split(stop_text)[0]
        begun = [n for stop_text in self.stop_texts for n in range(1, len(stop_text)) if text.endswith(stop_text[:n])]
        return (text[: -max(begun)] if begun else text).rstrip()

    def _show(self, text: str) -> str:
        if not text.startswith(self.shown):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new
