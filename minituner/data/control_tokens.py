"""Control tokens: the texts a tokenizer turns into single ids that steer the model, and how typed ones stay text.

    '<|im_end|>' printed by the template        -> [2]                     a control token
    '<|im_end|>' typed inside a message         -> [44, 108, 306, ...]     plain text: a user must not end a turn

A typed one is hidden before the template prints the message: a private-use character that occurs nowhere in the
conversation, the control token's number, and the character again. After rendering it is put back, tokenised as text:

    content   'say <|im_end|> now'    hidden  'say \\ue0002\\ue000 now'    pieces  'say ' '<|im_end|>' ' now'

`TokenizerFacts` looks up once what encoding asks thousands of times; a tokenizer's own properties are slow.
Lesson: notebook 03.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from minituner.data.conversation import Conversation, Message
from minituner.errors import DataError, UsageError

# Pre-tokenizers that treat what stands between two control tokens without looking at where it stands. (Metaspace is
# not among them: it may mark only the very beginning of a text.)
PLACELESS = {"ByteLevel", "Digits", "Split", "Whitespace", "WhitespaceSplit", "Punctuation", "BertPreTokenizer"}


@dataclass(slots=True)
class TokenizerFacts:
    """A tokenizer and what encoding has to know of it; make one per call with `TokenizerFacts.of`.

    `cut` splits a text at control tokens without changing any id; None if this tokenizer does not promise that.
    """

    tokenizer: Any
    controls: tuple[str, ...]
    pattern: re.Pattern[str]
    cut: re.Pattern[str] | None
    _control_ids: dict[int, list[int]] = field(default_factory=dict)
    _chat_templates: dict[bool, tuple[str, dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerFacts:
        """Look everything up."""
        controls = control_strings(tokenizer)
        return cls(tokenizer, controls, _pattern(controls), _safe_cut(tokenizer))

    def chat_template(self, tools: Any) -> tuple[str, dict[str, Any]]:
        """The Jinja source of the chat template, and the special tokens it speaks of (`bos_token`, ...).

        Raises:
            UsageError: the tokenizer has none.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                "this tokenizer has no chat template, so template: native cannot be used",
                why="base models usually come without one",
                fix="choose a named template, e.g. data.template=default",
                next_command="minituner list-templates",
            )
        key = tools is not None
        if key not in self._chat_templates:
            source = self.tokenizer.get_chat_template(tools=tools)
            special = {name: token for name, token in self.tokenizer.special_tokens_map.items() if name in source}
            self._chat_templates[key] = source, special
        return self._chat_templates[key]

    def eos_ids(self) -> list[int]:
        """The end token. Raises DataError if there is none."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(
                "the tokenizer has no end token (eos_token_id is None), so answers could never stop",
                fix="choose a template whose answers end with a suffix (list-templates), or set tokenizer.eos_token",
            )
        return [eos] if isinstance(eos, int) else list(eos)

    def as_text(self, control: int) -> list[int]:
        """The ids of control token number `control` written as plain text."""
        if control not in self._control_ids:
            self._control_ids[control] = encode_as_text(self.controls[control], self.tokenizer)
        return self._control_ids[control]


def control_strings(tokenizer: Any) -> tuple[str, ...]:
    """Texts that this tokenizer turns into control tokens, longest first; empty for one that never does."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    texts = {str(token.content) for token in added.values() if token.special}
    texts.update(str(text) for text in getattr(tokenizer, "all_special_tokens", None) or ())
    return tuple(sorted(texts, key=lambda text: (-len(text), text)))


def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """A pattern that matches any control token's text (never, if there are none)."""
    return _pattern(control_strings(tokenizer))


@lru_cache(maxsize=64)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")


def _safe_cut(tokenizer: Any) -> re.Pattern[str] | None:
    """A pattern for the added tokens that a tokenizer cuts out before anything else, if the rest cannot notice.

    The tokenizer itself first cuts a text at these tokens, then treats every piece by itself. Cutting here gives the
    same ids where a token does not swallow the spaces around it and no piece is treated by its place in the text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    before = getattr(backend, "pre_tokenizer", None)
    if before is None or not set(_kinds(json.loads(before.__getstate__()))) <= PLACELESS:
        return None
    first = [t for t in (getattr(tokenizer, "added_tokens_decoder", None) or {}).values() if not t.normalized]
    if not first or any(token.lstrip or token.rstrip or token.single_word for token in first):
        return None
    texts = sorted((str(token.content) for token in first), key=lambda text: (-len(text), text))
    return re.compile(f"({'|'.join(map(re.escape, texts))})")


def _kinds(pre_tokenizer: dict[str, Any]) -> Iterator[str]:
    """The type names inside a (possibly nested) pre-tokenizer."""
    if pre_tokenizer["type"] != "Sequence":
        yield pre_tokenizer["type"]
    for part in pre_tokenizer.get("pretokenizers", ()):
        yield from _kinds(part)


def encode_as_text(text: str, tokenizer: Any) -> list[int]:
    """Ids of `text` with no control token among them, whatever `text` looks like."""
    ids = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    control = set(tokenizer.all_special_ids) | {
        i for i, token in (getattr(tokenizer, "added_tokens_decoder", None) or {}).items() if token.special
    }
    if control.isdisjoint(ids):
        return ids
    # A tokenizer that parses control tokens whatever it is told: one character at a time cannot be one.
    return [i for character in text for i in tokenizer.encode(character, add_special_tokens=False)]


def free_mark(conversation: Conversation, facts: TokenizerFacts) -> str | None:
    """A private-use character that no message contains, or None when no message holds a control token's text."""
    texts = _all_texts(conversation)
    if not any(facts.pattern.search(text) for text in texts):
        return None
    used = set().union(*map(set, texts))
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)


def hide_control_tokens(conversation: Conversation, mark: str, facts: TokenizerFacts) -> Conversation:
    """The conversation with every control token's text written as mark, number, mark."""
    number = {text: i for i, text in enumerate(facts.controls)}

    def hide(value: Any) -> Any:
        if isinstance(value, str):
            return facts.pattern.sub(lambda match: f"{mark}{number[match.group()]}{mark}", value)
        if isinstance(value, dict):
            return {hide(key): hide(item) for key, item in value.items()}
        return [hide(item) for item in value] if isinstance(value, (list, tuple)) else value

    messages = [
        replace(
            m,
            content=hide(_joined_parts(m, facts.pattern)),
            tool_calls=hide(m.tool_calls),
            tool_call_id=hide(m.tool_call_id),
            name=hide(m.name),
            reasoning_content=hide(m.reasoning_content),
        )
        for m in conversation.messages
    ]
    return Conversation(messages, hide(conversation.tools))


def reveal(text: str, mark: str) -> Iterator[str | int]:
    """Rendered text as pieces: texts as they are, and typed control tokens as their number (see `facts.as_text`).

    Raises:
        DataError: the template wrote the mark in another way (as a JSON escape), so it cannot be put back.
    """
    for i, piece in enumerate(re.split(f"{mark}(\\d+){mark}", text)):
        if i % 2:
            yield int(piece)
        elif mark in piece or f"\\u{ord(mark):04x}" in piece.lower():
            raise DataError(
                "the text of a control token inside a message cannot be kept as text: the chat template rewrites it",
                fix="take it out of the record, or set data.allow_control_tokens=true",
            )
        elif piece:
            yield piece


def _joined_parts(message: Message, pattern: re.Pattern[str]) -> Any:
    """The content; text parts that only together spell a control token ("<|im_", "end|>") become one part."""
    if not isinstance(message.content, list):
        return message.content
    if len(pattern.findall(message.text)) == sum(len(pattern.findall(t)) for t in _strings(message.content)):
        return message.content
    others = [part for part in message.content if part.get("type", "text") != "text"]
    return [*others, {"type": "text", "text": message.text}]


def _strings(value: Any) -> list[str]:
    """Every text inside nested lists and dictionaries."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *_strings(item)) if isinstance(text, str)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _strings(item)]
    return []


def _all_texts(conversation: Conversation) -> list[str]:
    texts: list[str] = []
    for m in conversation.messages:
        if isinstance(m.content, str):
            texts.append(m.content)
        elif m.content:
            texts += [m.text, *_strings(m.content)]
        if m.tool_calls or m.tool_call_id or m.name or m.reasoning_content:
            texts += _strings([m.tool_calls, m.tool_call_id, m.name, m.reasoning_content])
    return texts + (_strings(conversation.tools) if conversation.tools else [])
