"""Records that are token ids already: InternEvo's signed ids, or input_ids with labels.

    {"tokens": [-1, -4093, 19556, 2]}                          negative: the same token, not trained
    {"input_ids": [1, 4093, 19556, 2], "labels": [-100, -100, 19556, 2]}
        -> Conversation([Message("text", loss=False, ids=[1, 4093]), Message("text", loss=True, ids=[19556, 2])])

Nothing is rendered, no BOS and no end token is added: what the file says is what is trained. `labels[i]` belongs to
`input_ids[i]`; labels that were shifted by whoever wrote the file are refused, because training shifts them again.
A folder of `.bin` files (`tokenized.py`) gives the same rows. Lesson: notebook 04.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np

from minituner.data.conversation import Conversation, Message
from minituner.data.tokenized import IGNORE_INDEX, MAX_TOKEN_ID
from minituner.errors import DataError


def tokenized(record: Mapping[str, Any]) -> Conversation:
    """The ids of a record as messages: one for each run of trained, or untrained, tokens.

    Raises:
        DataError: no whole numbers, ids and labels of different lengths, or labels that are not those of the ids.
    """
    if record.get("tokens") is not None:
        signed = _ids(record, "tokens")
        ids, trained = np.abs(signed), signed > 0
        zeros = _ids(record, "zero_trained") if record.get("zero_trained") is not None else np.empty(0, np.int64)
        if wrong := [int(at) for at in zeros if not 0 <= at < len(ids) or ids[at]]:
            raise DataError(f"zero_trained: {wrong[0]} is not the place of a token 0 in this record")
        trained[zeros] = True
    else:
        ids = _ids(record, "input_ids")
        if len(ids) and ids.min() < 0:
            raise DataError(f"input_ids: {int(ids.min())} is no token", fix="signed ids belong in a column `tokens`")
        trained = _trained(ids, _ids(record, "labels")) if record.get("labels") is not None else np.ones(len(ids), bool)
        if record.get("attention_mask") is not None and not np.all(_ids(record, "attention_mask")):
            raise DataError(
                "attention_mask: this row is padded", fix="write rows without padding: packing does the rest"
            )
    messages, at = [], 0
    for is_trained, run in groupby(trained.tolist()):
        length = sum(1 for _ in run)
        messages.append(Message("text", loss=is_trained, ids=ids[at : at + length].tolist()))
        at += length
    return Conversation(messages)


def _trained(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if len(labels) != len(ids):
        raise DataError(f"labels: {len(labels)} for {len(ids)} input_ids")
    trained = labels != IGNORE_INDEX
    if (wrong := np.flatnonzero(trained & (labels != ids))).size:
        shifted = len(ids) > 1 and np.array_equal(labels[:-1][trained[:-1]], ids[1:][trained[:-1]])
        why = "they are shifted by one, and training shifts them again" if shifted else "training predicts the ids"
        raise DataError(
            f"labels[{wrong[0]}]: {int(labels[wrong[0]])}, and input_ids[{wrong[0]}] is {int(ids[wrong[0]])}",
            why=why,
            fix="labels[i] is input_ids[i], or -100 where nothing is learned",
        )
    return trained


def _ids(record: Mapping[str, Any], column: str) -> np.ndarray:
    value = record.get(column)
    if not isinstance(value, list | np.ndarray):
        raise DataError(f"{column}: expected a list of token ids, found {type(value).__name__}")
    try:
        array = np.asarray(value) if len(value) else np.empty(0, np.int64)
    except ValueError:  # lists of different lengths inside
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{column}: expected a list of whole numbers")
    if len(array) and max(-int(array.min()), int(array.max())) > MAX_TOKEN_ID:
        raise DataError(f"{column}: a number beyond {MAX_TOKEN_ID} is no token id")
    return array.astype(np.int64)


def check_vocabulary(conversation: Conversation, size: int) -> None:
    """Refuse ids that the model's tokenizer does not have.

    Raises:
        DataError: the file was written with another tokenizer.
    """
    largest = max((max(message.ids) for message in conversation.messages if message.ids), default=0)
    if largest >= size:
        raise DataError(
            f"token id {largest}, and this model's tokenizer has {size:,} ids",
            why="the file was tokenised with another tokenizer",
            fix="tokenise the text again with this model's tokenizer",
            next_command="minituner tokenize RECIPE --out FOLDER",
        )
