"""One step at a time: records walk to documents, and each keeps what happened to it.

    record -> conversation -> document          Walked(record, conversation, document)
    record -> cannot be used                    Walked(record, problem=("train.jsonl:7", "output", "missing"))

`prepare` walks the same way for speed and writes to disk; `inspect` and `check` walk here, so that they can point at
the record behind every number. A test holds both to the same ledger. Lesson: notebook 01.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import Encoded, encode_many
from minituner.data.formats import to_conversation
from minituner.data.ledger import Ledger
from minituner.data.prepare import fit
from minituner.data.records import Record
from minituner.errors import DataError
from minituner.recipe import DataSection

CHUNK = 100  # records tokenised in one call: enough for speed, few enough for an answer at once
Problem = tuple[str, str, str]  # where, field, why


@dataclass(slots=True)
class Walked:
    """A record and how far it came.

    `problem` says why it cannot be used. `document` is whole; `parts` are what training keeps of it under the recipe's
    max_length, and `ledger` says where its tokens went.
    """

    record: Record
    conversation: Conversation | None = None
    document: Encoded | None = None
    parts: tuple[Encoded, ...] = ()
    ledger: Ledger | None = None
    problem: Problem | None = None


def walk(records: Iterable[tuple[Record, str]], data: DataSection, tokenizer: Any) -> Iterator[Walked]:
    """Walk `(record, format)` pairs to documents, in order, a chunk at a time.

    Raises:
        UsageError: a setting that no record can be walked with, such as an unknown template.
    """
    iterator = iter(records)
    while chunk := list(islice(iterator, CHUNK)):
        yield from _walk_chunk(chunk, data, tokenizer)


def unreadable() -> Ledger:
    """What `prepare` enters for a record that could not be read from its file."""
    ledger = Ledger(records=1)
    ledger.drop("cannot be read (listed)")
    return ledger


def _walk_chunk(chunk: list[tuple[Record, str]], data: DataSection, tokenizer: Any) -> list[Walked]:
    walked = [_to_conversation(record, layout, data) for record, layout in chunk]
    usable = [item for item in walked if item.conversation is not None and item.conversation.messages]

    def misfit(index: int, error: DataError) -> None:
        usable[index].problem = (usable[index].record.where, "", _one_line(error, ""))

    documents = encode_many(
        [item.conversation for item in usable if item.conversation is not None],
        tokenizer,
        data.template,
        data.bos_policy,
        loss_on=data.loss_on,
        allow_control_tokens=data.allow_control_tokens,
        on_error=misfit,
    )
    for item, document in zip(usable, documents, strict=True):
        if item.problem is None and item.conversation is not None:
            item.document, item.ledger = document, Ledger(records=1)
            item.parts = tuple(fit(document, data, item.conversation.is_text, item.ledger))
    for item in walked:
        if item.ledger is None:
            item.ledger = Ledger(records=1)
            item.ledger.drop("cannot be used (listed)" if item.problem else "no answer in the record")
    return walked


def _to_conversation(record: Record, layout: str, data: DataSection) -> Walked:
    try:
        conversation = to_conversation(record, layout)
    except DataError as error:
        field, _, why = _one_line(error, record.where).partition(": ")
        return Walked(record, problem=(record.where, field if why else "", why or field))
    has_system = not conversation.messages or conversation.messages[0].role == "system"
    if data.system and not conversation.is_text and not has_system:
        conversation.messages.insert(0, Message("system", data.system))
    return Walked(record, conversation)


def _one_line(error: DataError, where: str) -> str:
    """What is wrong and why, without the place."""
    what = error.what.removeprefix(f"{where}: ") if where else error.what
    return " ".join(f"{what} ({error.why})".split()) if error.why else " ".join(what.split())
