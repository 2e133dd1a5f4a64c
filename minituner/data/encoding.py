"""Encoding: text segments become input_ids and labels.

    segments    prompt 'user: Hi ... assistant:'   answer 'Hello!<stop>'   prompt '\\n'
    input_ids   [ 1  4093  198 ...  520   9531 ]   [ 19556   17     2 ]    [ 198 ]
    labels      [-100 -100 -100 ... -100  -100 ]   [ 19556   17     2 ]    [-100 ]

Three rules are kept here and tested: at most one BOS stands in front; every trained answer ends with a trained stop
token; and the ids of a prompt are the same in training and in chat, because prompts and answers are tokenised apart
and both sides call this module. A control token that a user typed (`<|im_end|>` inside a message) stays plain text.

`labels[i]` belongs to `input_ids[i]`; the shift by one happens in `collate.py`, inside each document.
Lesson: notebook 03.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from minituner.data.conversation import Conversation
from minituner.data.native import control_pattern, control_strings
from minituner.data.templates import LossOn, Segment, render
from minituner.errors import DataError

IGNORE = -100
KINDS = ("prompt", "answer", "text", "eos", "bos")
BosPolicy = Literal["once", "xtuner"]


@dataclass(slots=True)
class Encoded:
    """One tokenised document: `input_ids` (n,) int32, `trained` (n,) bool, `kinds` (n,) uint8 (index into KINDS)."""

    input_ids: np.ndarray
    trained: np.ndarray
    kinds: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """(n,) int32: the id where it is trained, -100 elsewhere."""
        return np.where(self.trained, self.input_ids, IGNORE).astype(np.int32)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, part: slice) -> Encoded:
        return Encoded(self.input_ids[part], self.trained[part], self.kinds[part])


@dataclass(slots=True)
class _Piece:
    """A piece of one document on its way to ids: text still to tokenise, or ids that are known already."""

    kind: str
    trained: bool
    text: str = ""
    ids: Sequence[int] | None = None


def encode(
    conversation: Conversation,
    tokenizer: Any,
    template: str | None = "native",
    max_length: int = 2048,
    bos_policy: BosPolicy = "once",
    *,
    loss_on: LossOn = "assistant",
    allow_control_tokens: bool = False,
) -> dict[str, list[int]]:
    """One conversation as `{"input_ids": [...], "labels": [...]}`, cut on the right at `max_length` tokens.

    Args:
        template: `native`, a catalog key, or None under `bos_policy="xtuner"` for turns that are templated already.
        bos_policy: `once` (ours), or `xtuner` for its class-name rules, one BOS after every end token.

    Raises:
        DataError: the conversation does not fit the template.
    """
    document = encode_many(
        [conversation], tokenizer, template, bos_policy, loss_on=loss_on, allow_control_tokens=allow_control_tokens
    )[0][:max_length]
    return {"input_ids": document.input_ids.tolist(), "labels": document.labels.tolist()}


def encode_many(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    template: str | None = "native",
    bos_policy: BosPolicy = "once",
    *,
    loss_on: LossOn = "assistant",
    allow_control_tokens: bool = False,
    on_error: Callable[[int, DataError], None] | None = None,
) -> list[Encoded]:
    """Tokenise many conversations in one call of the tokenizer (which is what makes it fast); nothing is cut.

    `on_error(index, error)` is told about conversations that do not fit; they come back empty. Without it, raises.
    """
    pieces: list[list[_Piece]] = []
    for index, conversation in enumerate(conversations):
        try:
            if bos_policy == "xtuner":
                from minituner.data.xtuner_encoding import xtuner_pieces

                pieces.append([_Piece(*piece) for piece in xtuner_pieces(conversation, tokenizer, template)])
            else:
                pieces.append(_pieces(conversation, tokenizer, template, loss_on, allow_control_tokens, False))
        except DataError as error:
            if on_error is None:
                raise
            on_error(index, error)
            pieces.append([])
    _tokenise([p for document in pieces for p in document if p.ids is None], tokenizer)
    bos = own_bos(tokenizer) if bos_policy == "once" else None
    return [_assemble(document, bos if template != "native" or _is_text(document) else None) for document in pieces]


def encode_prompt(
    conversation: Conversation,
    tokenizer: Any,
    template: str = "native",
    *,
    allow_control_tokens: bool = False,
) -> list[int]:
    """The ids that open the next answer: exactly the ids that training puts in front of that answer."""
    pieces = _pieces(conversation, tokenizer, template, "assistant", allow_control_tokens, True)
    _tokenise([p for p in pieces if p.ids is None], tokenizer)
    return _assemble(pieces, None if template == "native" else own_bos(tokenizer)).input_ids.tolist()


def stop_rule(tokenizer: Any, template: str = "native") -> tuple[list[int], list[str]]:
    """What ends an answer: token ids (the trained stop token first), and texts where the stop is no single token.

    It is read off an encoded example, so chat stops on what training trains.
    """
    from minituner.data.conversation import Message
    from minituner.data.templates import NamedTemplate

    probe = Conversation([Message("user", "a"), Message("assistant", "b")])
    document = encode_many([probe], tokenizer, template)[0]
    ids = [int(document.input_ids[document.trained][-1])]
    texts: list[str] = []
    if template != "native":
        named = NamedTemplate.find(template)
        for text in dict.fromkeys((*named.stop_words, *([named.suffix] if named.suffix_as_eos else []))):
            token = list(tokenizer.encode(text, add_special_tokens=False))
            if len(token) == 1:
                ids.append(token[0])
            else:
                texts.append(text)
                ids = [i for i in ids if not named.suffix_as_eos or i != token[-1]]
    eos = tokenizer.eos_token_id
    ids += [eos] if isinstance(eos, int) else list(eos or ())
    return list(dict.fromkeys(ids)), texts


def own_bos(tokenizer: Any) -> int | None:
    """The BOS id if this tokenizer puts one in front by itself, else None (then the model was not trained with one)."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if not isinstance(bos, int):
        return None
    return bos if list(tokenizer.encode("a", add_special_tokens=True))[:1] == [bos] else None


def _is_text(document: list[_Piece]) -> bool:
    return any(piece.kind == "text" for piece in document)


def _pieces(
    conversation: Conversation,
    tokenizer: Any,
    template: str | None,
    loss_on: LossOn,
    allow_control_tokens: bool,
    add_generation_prompt: bool,
) -> list[_Piece]:
    if template is None:
        raise DataError("a template is needed", fix="template='native', or a key of minituner list-templates")
    mark = None if allow_control_tokens else _free_mark(conversation, tokenizer)
    if mark:
        conversation = _hide_control_tokens(conversation, mark, tokenizer)
    segments = render(conversation, template, tokenizer, loss_on=loss_on, add_generation_prompt=add_generation_prompt)
    pieces: list[_Piece] = []
    for segment in _joined(segments):
        if segment.kind == "eos":
            pieces.append(_Piece("eos", segment.trained, ids=_eos_ids(tokenizer)))
        elif not mark:
            pieces.append(_Piece(segment.kind, segment.trained, segment.text))
        else:
            controls = control_strings(tokenizer)
            for i, text in enumerate(re.split(f"{mark}(\\d+){mark}", segment.text)):
                if i % 2:
                    ids = encode_as_text(controls[int(text)], tokenizer)
                    pieces.append(_Piece(segment.kind, segment.trained, ids=ids))
                elif text:
                    pieces.append(_Piece(segment.kind, segment.trained, text))
    return pieces


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbouring prompts as one, so that merges across their border happen as they do in chat."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and last.kind == segment.kind == "prompt" and last.trained == segment.trained:
            joined[-1] = replace(last, text=last.text + segment.text)
        elif segment.text or segment.kind == "eos":
            joined.append(segment)
    return joined


def _eos_ids(tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            "the tokenizer has no end token (eos_token_id is None), so answers could never stop",
            fix="choose a template whose answers end with a suffix (list-templates), or set tokenizer.eos_token",
        )
    return [eos] if isinstance(eos, int) else list(eos)


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
        if not isinstance(m.content, str) or m.tool_calls or m.name or m.reasoning_content:
            texts += _strings([m.content, m.tool_calls, m.name, m.reasoning_content])
    return texts + (_strings(conversation.tools) if conversation.tools else [])


def _free_mark(conversation: Conversation, tokenizer: Any) -> str | None:
    """A private-use character that no message contains, or None when no message holds a control token's text."""
    pattern, texts = control_pattern(tokenizer), _all_texts(conversation)
    if not any(pattern.search(text) for text in texts):
        return None
    used = set().union(*map(set, texts))
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)


def _hide_control_tokens(conversation: Conversation, mark: str, tokenizer: Any) -> Conversation:
    pattern = control_pattern(tokenizer)
    number = {text: i for i, text in enumerate(control_strings(tokenizer))}

    def hide(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: f"{mark}{number[match.group()]}{mark}", value)
        if isinstance(value, dict):
            return {hide(key): hide(item) for key, item in value.items()}
        return [hide(item) for item in value] if isinstance(value, (list, tuple)) else value

    messages = [
        replace(
            m,
            content=hide(m.content),
            tool_calls=hide(m.tool_calls),
            name=hide(m.name),
            reasoning_content=hide(m.reasoning_content),
        )
        for m in conversation.messages
    ]
    return Conversation(messages, hide(conversation.tools))


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


def _tokenise(pieces: list[_Piece], tokenizer: Any) -> None:
    """Fill in `ids`, all pieces in one call where the tokenizer has a fast backend."""
    texts = [piece.text for piece in pieces]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        for piece in pieces:
            piece.ids = list(tokenizer.encode(piece.text, add_special_tokens=False))
        return
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    backend.encode_special_tokens = False
    for piece, encoding in zip(pieces, backend.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        piece.ids = encoding.ids


def _assemble(document: list[_Piece], bos: int | None) -> Encoded:
    if bos is not None and document and list(document[0].ids or ())[:1] != [bos]:
        document = [_Piece("bos", False, ids=[bos]), *document]
    lengths = [len(piece.ids or ()) for piece in document]
    ids = np.fromiter((i for piece in document for i in piece.ids or ()), dtype=np.int32, count=sum(lengths))
    trained = np.repeat(np.array([piece.trained for piece in document], dtype=bool), lengths)
    kinds = np.repeat(np.array([KINDS.index(piece.kind) for piece in document], dtype=np.uint8), lengths)
    return Encoded(ids, trained, kinds)
