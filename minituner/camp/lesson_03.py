"""Exercises of lesson 03: labels, the shift by one, the stop token, per-message loss, the ledger.

What an exercise gives is a constant here, so that notebook and check cannot fall out of step:

    TURNS       [(kind, ids), ...]  ->  03.1 asks for its labels
    TWO         two documents       ->  03.2 asks for the shifted labels of the row they make
    a function                      ->  03.3 asks for the collator that masks padding without losing the stop token

Every right answer is computed with the functions that training uses. Lesson: notebook 03.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minituner.camp.core import Exercise, Wrong
from minituner.data.collate import collate, pad_batch
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import IGNORE, KINDS, Encoded
from minituner.data.ledger import Ledger
from minituner.data.templates import trained_messages

STOP = 2
TURNS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("prompt", (1, 71, 72)),
    ("answer", (81, 82, STOP)),
    ("prompt", (9, 1, 73)),
    ("answer", (83, STOP)),
    ("prompt", (9,)),
)
TWO: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((1, 71, 81, STOP), (IGNORE, IGNORE, 81, STOP)),
    ((82, 83, STOP), (82, 83, STOP)),
)
CHAT = Conversation(
    [
        Message("user", "2 + 2 = ?"),
        Message("assistant", "4"),
        Message("user", "那么 3 + 3 呢？"),
        Message("assistant", "7"),
        Message("user", "再算一次。"),
        Message("assistant", "6"),
    ]
)
LONG = {"bos": 1, "prompt": 22, "answer": 15, "line_break": 1}
MAX_LENGTH = 32


def document() -> Encoded:
    """The document of 03.1, (12,): `TURNS` laid end to end."""
    return _encoded(TURNS)


def long_document() -> Encoded:
    """The document of 03.5, (39,): BOS, prompt, an answer whose last token is the stop token, a line break."""
    kinds = (("bos", LONG["bos"]), ("prompt", LONG["prompt"]), ("answer", LONG["answer"]), ("prompt", 1))
    return _encoded(tuple((kind, tuple(range(10, 10 + count))) for kind, count in kinds))


def _encoded(parts: Sequence[tuple[str, tuple[int, ...]]]) -> Encoded:
    """Parts of one kind each as an Encoded in which answers are trained."""
    lengths = [len(ids) for _, ids in parts]
    return Encoded(
        np.array([i for _, ids in parts for i in ids], dtype=np.int32),
        np.repeat([kind == "answer" for kind, _ in parts], lengths),
        np.repeat(np.array([KINDS.index(kind) for kind, _ in parts], dtype=np.uint8), lengths),
    )


def _numbers(answer: Any, length: int, what: str) -> list[int]:
    """The answer as a flat list of whole numbers, or what is wrong with it."""
    values = np.asarray(answer).reshape(-1).tolist() if not isinstance(answer, str) else []
    if len(values) != length:
        raise Wrong(f"{what} has one number for each of the {length} tokens; yours has {len(values)}")
    return [int(value) for value in values]


def _check_labels(answer: Any) -> None:
    right, kinds = document().labels.tolist(), [kind for kind, ids in TURNS for _ in ids]
    values = _numbers(answer, len(right), "labels")
    if values == [*right[1:], IGNORE]:
        raise Wrong("these labels are shifted already; labels[i] belongs to input_ids[i], the shift comes in collate")
    for i, (mine, expected) in enumerate(zip(values, right, strict=True)):
        if mine == expected:
            continue
        if expected == STOP:
            raise Wrong(f"position {i} is the stop token that ends an answer: unlabelled, it is never learned")
        if expected == IGNORE:
            raise Wrong(f"position {i} is {kinds[i]}: nobody asks the model to produce it, so its label is {IGNORE}")
        raise Wrong(f"position {i} belongs to an answer, so its label is its own id; yours is {mine}")


def _check_shift(answer: Any) -> None:
    row = collate([[(np.array(ids), np.array(labels)) for ids, labels in TWO]])
    right = row.shift_labels[0].tolist()
    values = _numbers(answer, len(right), "shift_labels")
    border = len(TWO[0][0]) - 1
    if values == [label for _, labels in TWO for label in labels]:
        raise Wrong("these are the labels before the shift; position i has to predict the token at i + 1")
    for i, (mine, expected) in enumerate(zip(values, right, strict=True)):
        if mine == expected:
            continue
        if i == border:
            raise Wrong(f"position {i} is the last token of the first document: it must not predict the next document")
        if i == len(right) - 1:
            raise Wrong("nothing comes after the last token of the row, so there is nothing to predict")
        raise Wrong(f"position {i} is wrong: look at the label of position {i + 1}")


def _check_padding(answer: Callable[..., Any]) -> None:
    if not callable(answer):
        raise Wrong("give the function itself: answer = my_labels (no brackets)")
    rows = [(np.array((1, 71, 81, STOP)), np.array((IGNORE, IGNORE, 81, STOP))), (np.array((82, STOP)),) * 2]
    right = pad_batch(rows, pad_id=STOP)
    lengths = [len(ids) for ids, _ in rows]
    given = np.where(right["attention_mask"].numpy() == 1, right["labels"].numpy(), STOP)
    got = np.asarray(answer(given.copy(), list(lengths)))
    expected = right["labels"].numpy()
    if got.shape != expected.shape:
        raise Wrong(f"return labels of the shape you were given, {expected.shape}; yours is {got.shape}")
    for row, length in enumerate(lengths):
        if got[row, length - 1] != STOP:
            raise Wrong(f"row {row}: the stop token at position {length - 1} is real text, and its label is gone")
        if (got[row, length:] != IGNORE).any():
            raise Wrong(f"row {row}: padding begins at position {length} and still has labels")
        if (got[row, :length] != expected[row, :length]).any():
            raise Wrong(f"row {row}: a label before the padding has changed")


def _check_loss_flags(answer: Any) -> None:
    answers = [i for i, message in enumerate(CHAT.messages) if message.role == "assistant"]
    flags = list(answer)
    if len(flags) != len(answers):
        raise Wrong(f"give one flag for each of the {len(answers)} assistant messages; yours has {len(flags)}")
    if any(flag not in (True, False, None) for flag in flags):
        raise Wrong("a flag is True, False or None")
    messages = [Message(m.role, m.content) for m in CHAT.messages]
    for place, flag in zip(answers, flags, strict=True):
        messages[place].loss = flag
    trained = trained_messages(Conversation(messages), "last_assistant")
    for place, wanted in zip(answers, (True, False, True), strict=True):
        if trained[place] != wanted:
            state = "not trained" if wanted else "trained, and it is wrong"
            raise Wrong(f"under loss_on=last_assistant, the answer {CHAT.messages[place].text!r} is {state}")


def _check_ledger(answer: Any) -> None:
    if not isinstance(answer, Mapping):
        raise Wrong("answer with a dictionary: {'trained': ..., 'masked': ..., 'truncated': ...}")
    whole = long_document()
    ledger = Ledger(records=1)
    ledger.keep(whole[:MAX_LENGTH])
    ledger.cut(len(whole) - MAX_LENGTH)
    ledger.check()
    right = {"trained": ledger.trained, "masked": sum(ledger.masked.values()), "truncated": ledger.truncated}
    if missing := [key for key in right if key not in answer]:
        raise Wrong(f"missing: {', '.join(missing)}")
    total = sum(int(answer[key]) for key in right)
    if total != ledger.raw:
        raise Wrong(f"the ledger must add up: the record has {ledger.raw} tokens, yours accounts for {total}")
    for key, value in right.items():
        if int(answer[key]) != value:
            raise Wrong(f"{key} is off by {abs(int(answer[key]) - value)}; cut first, then count what is left")


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        "Write the labels of the document: the id where the model must produce it, -100 elsewhere.",
        _check_labels,
        (
            "Go through TURNS part by part. Which kinds are answers?",
            "A prompt of n tokens gives n times -100. The stop token stands inside its answer part.",
            "labels = []; for kind, ids in TURNS: labels += ids if kind == 'answer' else [-100] * len(ids)",
        ),
    ),
    "2": Exercise(
        "Write shift_labels of the row that the two documents make: what each position is asked to predict.",
        _check_shift,
        (
            "Shift each document alone, then lay the results end to end.",
            "The last position of every document gets -100.",
            "For one document: labels[1:] + [-100].",
        ),
    ),
    "3": Exercise(
        "Write mask_padding(labels, lengths): -100 on the padding, and only there, although pad == stop.",
        _check_padding,
        (
            "Do not look at the ids at all. How many tokens of each row are real?",
            "Row r is padding from position lengths[r] on.",
            "for row, length in enumerate(lengths): labels[row, length:] = -100",
        ),
    ),
    "4": Exercise(
        "With loss_on='last_assistant', give the three answers' loss flags so that 4 and 6 are trained and 7 is not.",
        _check_loss_flags,
        (
            "A message's own loss wins over loss_on; None leaves the matter to loss_on.",
            "loss_on='last_assistant' trains the third answer by itself. What must be said about the first?",
            "The first needs True; the second must not be True; the third must not be False.",
        ),
    ),
    "5": Exercise(
        "Fill in the ledger of a record that is cut at max_length: trained, masked and truncated tokens.",
        _check_ledger,
        (
            "Lay the parts in a line and cut it after max_length tokens. What is behind the cut?",
            "BOS and prompt come first and are masked; the answer gets the places that are left.",
            "trained = max_length - bos - prompt; masked = bos + prompt; truncated = everything - max_length.",
        ),
    ),
}
