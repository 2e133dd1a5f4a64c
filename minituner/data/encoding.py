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

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np

from minituner.data.control_tokens import TokenizerFacts, free_mark, hide_control_tokens, reveal
from minituner.data.conversation import Conversation
from minituner.data.templates import LossOn, Segment, render
from minituner.errors import DataError, UsageError

IGNORE = -100
KINDS = ("prompt", "answer", "text", "eos", "bos")
BLOCK = 250  # conversations that are rendered while the tokenizer works on as many
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
    """A piece of one document on its way to ids: text, or a typed control token's number, or ids known already."""

    kind: str
    trained: bool
    text: str = ""
    ids: Sequence[int] | None = None
    typed: int | None = None


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

    Raises:
        DataError: a conversation does not fit the template (only without `on_error`).
        UsageError: no such template, or `loss_on` under XTuner's rules, which know only the assistant.
    """
    if bos_policy == "xtuner" and loss_on != "assistant":
        raise UsageError(
            f"bos_policy xtuner trains every answer, and loss_on is {loss_on!r}",
            fix="data.loss_on=assistant, or data.bos_policy=once",
        )
    facts = TokenizerFacts.of(tokenizer)
    bos = own_bos(tokenizer) if bos_policy == "once" else None

    def pieces(index: int) -> list[_Piece]:
        try:
            if conversations[index].is_tokenized:
                return _known_pieces(conversations[index], tokenizer)
            if bos_policy == "xtuner":
                from minituner.data.xtuner_encoding import xtuner_pieces

                return [_Piece(*piece) for piece in xtuner_pieces(conversations[index], tokenizer, template)]
            document = _pieces(conversations[index], facts, template, loss_on, allow_control_tokens, False)
        except DataError as error:
            if on_error is None:
                raise
            on_error(index, error)
            return []
        return _with_bos(document, bos) if template != "native" or _is_text(document) else document

    # The tokenizer works outside the interpreter lock: while it is busy with one block, the next is being rendered.
    # Only the one thread touches it, because its settings belong to it and not to a call.
    blocks = [range(at, min(at + BLOCK, len(conversations))) for at in range(0, len(conversations), BLOCK)]
    if len(blocks) < 2:
        return _finish([pieces(index) for block in blocks for index in block], facts)
    with ThreadPoolExecutor(max_workers=1) as tokenising:
        jobs = [tokenising.submit(_finish, [pieces(index) for index in block], facts) for block in blocks]
        return [document for job in jobs for document in job.result()]


def encode_prompt(
    conversation: Conversation,
    tokenizer: Any,
    template: str = "native",
    *,
    allow_control_tokens: bool = False,
) -> list[int]:
    """The ids that open the next answer: exactly the ids that training puts in front of that answer."""
    facts = TokenizerFacts.of(tokenizer)
    pieces = _pieces(conversation, facts, template, "assistant", allow_control_tokens, True)
    bos = None if template == "native" else own_bos(tokenizer)
    return _finish([_with_bos(pieces, bos)], facts)[0].input_ids.tolist()


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


def _known_pieces(conversation: Conversation, tokenizer: Any) -> list[_Piece]:
    """A document that came as ids: nothing is added to it."""
    from minituner.data.formats_tokenized import check_vocabulary

    check_vocabulary(conversation, len(tokenizer))
    return [_Piece("text" if m.loss else "prompt", bool(m.loss), ids=m.ids) for m in conversation.messages]


def _is_text(document: list[_Piece]) -> bool:
    return any(piece.kind == "text" for piece in document)


def _pieces(
    conversation: Conversation,
    facts: TokenizerFacts,
    template: str | None,
    loss_on: LossOn,
    allow_control_tokens: bool,
    add_generation_prompt: bool,
) -> list[_Piece]:
    if template is None:
        raise DataError("a template is needed", fix="template='native', or a key of minituner list-templates")
    mark = None if allow_control_tokens else free_mark(conversation, facts)
    if mark:
        conversation = hide_control_tokens(conversation, mark, facts)
    segments = render(
        conversation,
        template,
        facts.tokenizer,
        loss_on=loss_on,
        add_generation_prompt=add_generation_prompt,
        facts=facts,
    )
    pieces: list[_Piece] = []
    for segment in _joined(segments):
        if segment.kind == "eos":
            pieces.append(_Piece("eos", segment.trained, ids=facts.eos_ids()))
        elif not mark:
            pieces.append(_Piece(segment.kind, segment.trained, segment.text))
        else:
            for part in reveal(segment.text, mark):
                text, typed = (part, None) if isinstance(part, str) else ("", part)
                pieces.append(_Piece(segment.kind, segment.trained, text, typed=typed))
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


def _finish(documents: list[list[_Piece]], facts: TokenizerFacts) -> list[Encoded]:
    """Pieces become documents: everything that needs the tokenizer itself."""
    for piece in chain.from_iterable(documents):
        if piece.typed is not None:
            piece.ids = facts.as_text(piece.typed)
    _tokenise([piece for piece in chain.from_iterable(documents) if piece.ids is None], facts)
    return _assemble(documents)


def _tokenise(pieces: list[_Piece], facts: TokenizerFacts) -> None:
    """Fill in `ids`, all pieces in one call where the tokenizer has a fast backend, and equal texts only once."""
    backend = getattr(facts.tokenizer, "backend_tokenizer", None)
    if backend is None:
        for piece in pieces:
            piece.ids = list(facts.tokenizer.encode(piece.text, add_special_tokens=False))
        return
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    backend.encode_special_tokens = False
    # Cut at control tokens, what a template prints around every message is the same few texts over and over.
    parts = [facts.cut.split(piece.text) if facts.cut else [piece.text] for piece in pieces]
    texts = list(dict.fromkeys(chain.from_iterable(parts)))
    ids = {
        text: encoding.ids
        for text, encoding in zip(texts, backend.encode_batch_fast(texts, add_special_tokens=False), strict=True)
    }
    for piece, part in zip(pieces, parts, strict=True):
        piece.ids = ids[part[0]] if len(part) == 1 else list(chain.from_iterable(ids[text] for text in part))


def _with_bos(document: list[_Piece], bos: int | None) -> list[_Piece]:
    """The document with BOS in front, unless it stands there already or there is none."""
    if bos is None or not document or list(document[0].ids or ())[:1] == [bos]:
        return document
    return [_Piece("bos", False, ids=[bos]), *document]


def _assemble(documents: list[list[_Piece]]) -> list[Encoded]:
    """Documents of pieces as arrays: one large array is made and sliced, which costs less than many small ones."""
    pieces = [piece for document in documents for piece in document]
    lengths = np.array([len(piece.ids or ()) for piece in pieces], dtype=np.int64)
    ids = np.fromiter(chain.from_iterable(piece.ids or () for piece in pieces), dtype=np.int32, count=lengths.sum())
    trained = np.repeat(np.array([piece.trained for piece in pieces], dtype=bool), lengths)
    kinds = np.repeat(np.array([KINDS.index(piece.kind) for piece in pieces], dtype=np.uint8), lengths)
    ends = np.concatenate([[0], np.cumsum(lengths)])[np.cumsum([0, *map(len, documents)])]
    return [
        Encoded(ids[start:end], trained[start:end], kinds[start:end])
        for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]
