"""Exercises of lesson 03: labels, the shift by one, padding, per-message loss, the ledger.

    3.1 labels_of(turns)                  [(kind, ids), ...] -> labels
    3.2 shift_labels(documents)           labels of each document -> what each position of the row predicts
    3.3 mask_padding(labels, lengths)     pad and stop have one id, and only the padding loses its label
    3.4 trained(messages, loss_on)        which messages are trained
    3.5 ledger(parts, max_length)         where every token of a record went that is cut

Every right value is computed with the functions that training uses. Lesson: notebook 03.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from minituner.camp.core import Exercise
from minituner.data.collate import collate, pad_batch
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import IGNORE, KINDS, Encoded
from minituner.data.ledger import Ledger
from minituner.data.templates import trained_messages

STOP = 2
Part = tuple[str, Sequence[int]]
TURNS = [("prompt", [1, 71, 72]), ("answer", [81, 82, STOP]), ("prompt", [9, 1, 73]), ("answer", [83, STOP])]
DOCUMENTS = [[IGNORE, IGNORE, 81, STOP], [82, 83, STOP]]
MESSAGES = [("user", None), ("assistant", True), ("user", None), ("assistant", None), ("user", None)]
MESSAGES += [("assistant", None)]
PARTS = [("prompt", 23), ("answer", 15), ("prompt", 1)]


def encoded(parts: Sequence[Part]) -> Encoded:
    """Parts of one kind each, laid end to end as an Encoded in which answers are trained."""
    lengths = [len(ids) for _, ids in parts]
    return Encoded(
        np.array([i for _, ids in parts for i in ids], dtype=np.int32),
        np.repeat([kind == "answer" for kind, _ in parts], lengths),
        np.repeat(np.array([KINDS.index(kind) for kind, _ in parts], dtype=np.uint8), lengths),
    )


def _turns(draw: Random) -> tuple[list[Part]]:
    turns: list[Part] = []
    for _ in range(draw.randint(1, 3)):
        turns.append(("prompt", [draw.randint(3, 99) for _ in range(draw.randint(1, 4))]))
        turns.append(("answer", [*(draw.randint(3, 99) for _ in range(draw.randint(0, 4))), STOP]))
    return (turns + [("prompt", [9])] * draw.randint(0, 1),)


def _labels(turns: Sequence[Part]) -> list[int]:
    return encoded(turns).labels.tolist()


def _shifted(documents: Sequence[Sequence[int]]) -> list[int]:
    rows = [(np.array([abs(label) for label in labels]), np.array(labels)) for labels in documents]
    return collate([rows]).shift_labels[0].tolist()


def _documents(draw: Random) -> tuple[list[list[int]]]:
    def labels() -> list[int]:
        answer = [draw.randint(3, 99) for _ in range(draw.randint(1, 3))]
        return [IGNORE] * draw.randint(0, 3) + [*answer, STOP] + [IGNORE] * draw.randint(0, 1)

    return ([labels() for _ in range(draw.randint(1, 4))],)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, list[int]]:
    """A batch from a careless collator: labels filled up with the id of pad, which is that of the stop token."""
    width = max(map(len, rows))
    return np.array([[*row, *[STOP] * (width - len(row))] for row in rows]), [len(row) for row in rows]


def _masked(labels: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    rows = [(row[:length], row[:length]) for row, length in zip(labels, lengths, strict=True)]
    return pad_batch(rows, pad_id=STOP)["labels"].numpy()


def _by_id(labels: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    return np.where(labels == STOP, IGNORE, labels)


def _trained(messages: Sequence[tuple[str, bool | None]], loss_on: str) -> list[bool]:
    return trained_messages(Conversation([Message(role, "...", loss=loss) for role, loss in messages]), loss_on)


def _messages(draw: Random) -> tuple[list[tuple[str, bool | None]], str]:
    messages: list[tuple[str, bool | None]] = [("system", None)] * draw.randint(0, 1)
    for _ in range(draw.randint(1, 3)):
        messages += [("user", None), ("assistant", draw.choice([None, None, True, False]))]
    return messages, draw.choice(["assistant", "last_assistant"])


def _flags_ignored(messages: Sequence[tuple[str, bool | None]], loss_on: str) -> list[bool]:
    return _trained([(role, None) for role, _ in messages], loss_on)


def _flags_alone(messages: Sequence[tuple[str, bool | None]], loss_on: str) -> list[bool]:
    return [bool(loss) for _, loss in messages]


def _ledger(parts: Sequence[tuple[str, int]], max_length: int) -> dict[str, int]:
    whole = encoded([(kind, range(10, 10 + count)) for kind, count in parts])
    ledger = Ledger(records=1)
    ledger.keep(whole[:max_length])
    ledger.cut(max(0, len(whole) - max_length))
    ledger.check()
    return {"trained": ledger.trained, "masked": sum(ledger.masked.values()), "truncated": ledger.truncated}


def _not_cut(parts: Sequence[tuple[str, int]], max_length: int) -> dict[str, int]:
    return {**_ledger(parts, 10**6), "truncated": _ledger(parts, max_length)["truncated"]}


def _cut_in_front(parts: Sequence[tuple[str, int]], max_length: int) -> dict[str, int]:
    return _ledger([("prompt", 0), *parts[::-1]], max_length)


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        name="labels_of",
        minutes=5,
        example=(TURNS,),
        draw=_turns,
        right=_labels,
        mistakes={
            "These labels are shifted already; labels[i] belongs to input_ids[i], the shift comes in collate": (
                lambda turns: [*_labels(turns)[1:], IGNORE]
            ),
            "The stop token that ends an answer has no label: unlabelled, it is never learned": (
                lambda turns: [IGNORE if label == STOP else label for label in _labels(turns)]
            ),
            f"Nobody asks the model to produce a prompt: its labels are {IGNORE}": (
                lambda turns: encoded(turns).input_ids
            ),
            "Now the prompts are trained, and the answers are not": (
                lambda turns: np.where(encoded(turns).trained, IGNORE, encoded(turns).input_ids)
            ),
        },
        hints=(
            "Go through the turns one by one. Which kinds are answers?",
            f"A prompt of n tokens gives n times {IGNORE}. The stop token stands inside its answer.",
            "labels = []; for kind, ids in turns: labels += list(ids) if kind == 'answer' else [-100] * len(ids)",
        ),
    ),
    "2": Exercise(
        name="shift_labels",
        minutes=5,
        example=(DOCUMENTS,),
        draw=_documents,
        right=_shifted,
        mistakes={
            "These are the labels before the shift; position i has to predict the token at i + 1": (
                lambda documents: [label for labels in documents for label in labels]
            ),
            "The last token of a document must not predict the first of the next document": (
                lambda documents: [*[label for labels in documents for label in labels][1:], IGNORE]
            ),
            "Shifted the wrong way: position i predicts what comes after it, not what was before": (
                lambda documents: [label for labels in documents for label in [IGNORE, *labels[:-1]]]
            ),
        },
        hints=(
            "Shift each document alone, then lay the results end to end.",
            f"The last position of every document gets {IGNORE}.",
            "For one document: labels[1:] + [-100].",
        ),
    ),
    "3": Exercise(
        name="mask_padding",
        minutes=5,
        example=_padded([[IGNORE, IGNORE, 81, STOP], [82, STOP]]),
        draw=lambda draw: _padded([_documents(draw)[0][0] for _ in range(draw.randint(2, 4))]),
        right=_masked,
        mistakes={
            "A stop token is real text, and its label is gone: look at the lengths, not at the ids": _by_id,
            "The padding still has labels": lambda labels, lengths: labels,
            "The last real token of each row is masked too: padding begins at position lengths[row]": (
                lambda labels, lengths: _masked(labels, [max(length - 1, 0) for length in lengths])
            ),
        },
        hints=(
            "Do not look at the ids at all. How many tokens of each row are real?",
            "Row r is padding from position lengths[r] on.",
            "for row, length in enumerate(lengths): labels[row, length:] = -100",
        ),
    ),
    "4": Exercise(
        name="trained",
        minutes=10,
        example=(MESSAGES, "last_assistant"),
        draw=_messages,
        right=_trained,
        mistakes={
            "A message's own loss flag wins over loss_on; yours looks at loss_on alone": _flags_ignored,
            "A flag of None leaves the matter to loss_on; yours takes it for False": _flags_alone,
            "With loss_on='last_assistant' only the last answer is trained, unless a flag says otherwise": (
                lambda messages, loss_on: _trained(messages, "assistant")
            ),
            "With loss_on='assistant' every answer is trained, unless a flag says otherwise": (
                lambda messages, loss_on: _trained(messages, "last_assistant")
            ),
        },
        hints=(
            "Only messages of the assistant are ever trained. Ask first whether the message has a flag of its own.",
            "Without a flag: 'assistant' trains each answer, 'last_assistant' the last message of that role only.",
            "last = max(i for i, (role, _) in enumerate(messages) if role == 'assistant')",
        ),
    ),
    "5": Exercise(
        name="ledger",
        minutes=5,
        example=(PARTS, 32),
        draw=lambda draw: (
            [("prompt", draw.randint(2, 30)), ("answer", draw.randint(2, 20)), ("prompt", 1)],
            draw.randint(8, 56),
        ),
        right=_ledger,
        mistakes={
            "Cut first, then count what is left: yours counts tokens as trained that are cut off": _not_cut,
            "A record is cut on the right; yours loses its beginning": _cut_in_front,
            "A record that is short enough loses nothing: truncated is never below 0": (
                lambda parts, max_length: {
                    **_ledger(parts, max_length),
                    "truncated": sum(count for _, count in parts) - max_length,
                }
            ),
        },
        hints=(
            "Lay the parts in a line and cut it after max_length tokens. What is behind the cut?",
            "Go through the parts and keep min(count, what is left of max_length) of each.",
            "room = max_length; for kind, count in parts: kept = min(count, room); room -= kept",
        ),
    ),
}
