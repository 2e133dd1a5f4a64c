"""Exercises of lesson 04: best-fit, positions and borders, the attention mask, what packing costs.

    4.1 best_fit(lengths, room)       -> packs of record numbers
    4.2 positions(seq_lens)           -> position_ids and cu_seqlens of a row
    4.3 mask(seq_lens)                -> which token sees which
    4.4 seq_lens_of(position_ids)     -> the lengths again
    4.5 saving(seq_lens)              -> how many times less attention work it is to keep documents apart

Every right value is computed with the functions that training uses. Lesson: notebook 04.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from minituner.camp.compare import Wrong
from minituner.camp.core import Exercise
from minituner.data.packing import cu_seqlens, pack, position_ids

Packs = list[list[int]]


def isolation_mask(seq_lens: Sequence[int]) -> np.ndarray:
    """Boolean (T, T): row i sees column j if j is not later and stands in the same document."""
    document = np.repeat(np.arange(len(seq_lens)), seq_lens)
    position = position_ids(seq_lens)
    return np.equal.outer(document, document) & np.greater_equal.outer(position, position)


def _lens(draw: Random) -> tuple[list[int]]:
    return ([draw.randint(1, 5) for _ in range(draw.randint(1, 4))],)


def _records(draw: Random) -> tuple[list[int], int]:
    """Records for which it does not matter which of two equally full packs is taken."""
    while True:
        room = draw.randint(8, 14)
        lengths = [draw.randint(1, room) for _ in range(draw.randint(5, 10))]
        ties = (_filled(lengths, room, _longest_first(lengths), choose) for choose in ("fullest", "newest fullest"))
        if len({str(_as_lengths(packs, lengths, room)) for packs in (*ties, _best_fit(lengths, room))}) == 1:
            return lengths, room


def _as_lengths(value: Any, lengths: Sequence[int], room: int) -> Packs:
    """Records of one length are interchangeable, and so are the places of packs: lengths, in a fixed order.

    Raises:
        Wrong: a record is missing or there twice, or a pack is too full.
    """
    packs = [[int(record) for record in bin_] for bin_ in value]
    records = sorted(record for bin_ in packs for record in bin_)
    if records != list(range(len(lengths))):
        twice = sorted({record for record in records if records.count(record) > 1})
        missing = sorted(set(range(len(lengths))) - set(records))
        unknown = sorted(set(records) - set(range(len(lengths))))
        said = {"there twice": twice, "missing": missing, "not a record number": unknown}
        raise Wrong("; ".join(f"{what}: {which}" for what, which in said.items() if which))
    for number, bin_ in enumerate(packs):
        if (tokens := sum(lengths[record] for record in bin_)) > room:
            raise Wrong(f"pack {number} holds {tokens} tokens, and there is room for {room}")
    return sorted(sorted(lengths[record] for record in bin_) for bin_ in packs)


def _best_fit(lengths: Sequence[int], room: int) -> Packs:
    return pack(lengths, room).to_list()


def _filled(lengths: Sequence[int], room: int, order: Sequence[int], choose: str) -> Packs:
    """Greedy packing of records in this order, into the fullest, the first or the newest pack with room."""
    packs: Packs = []
    for record in order:
        filled = [sum(lengths[r] for r in bin_) for bin_ in packs]
        open_ = [i for i, tokens in enumerate(filled) if tokens + lengths[record] <= room]
        if choose == "newest":
            open_ = [i for i in open_ if i == len(packs) - 1]
        if open_:
            ranks = {
                "fullest": [-n for n in filled],
                "newest fullest": [-n * 1000 - i for i, n in enumerate(filled)],
                "emptiest": filled,
            }.get(choose, [0] * len(filled))
            packs[min(open_, key=ranks.__getitem__)].append(record)
        else:
            packs.append([record])
    return packs


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda record: -lengths[record])


def _positions(seq_lens: Sequence[int]) -> dict[str, np.ndarray]:
    return {"position_ids": position_ids(seq_lens), "cu_seqlens": cu_seqlens(seq_lens)}


def _saving(seq_lens: Sequence[int]) -> float:
    return sum(seq_lens) ** 2 / sum(length**2 for length in seq_lens)


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        name="best_fit",
        minutes=10,
        example=([4, 7, 2, 5, 3, 6, 2], 10),
        draw=_records,
        right=_best_fit,
        view=_as_lengths,
        mistakes={
            "Best-fit takes the longest record first; yours takes them in the order of the file": (
                lambda lengths, room: _filled(lengths, room, range(len(lengths)), "fullest")
            ),
            "A record goes into the fullest pack that has room; yours goes into the emptiest": (
                lambda lengths, room: _filled(lengths, room, _longest_first(lengths), "emptiest")
            ),
            "Every open pack is tried, not only the newest one": (
                lambda lengths, room: _filled(lengths, room, _longest_first(lengths), "newest")
            ),
            "The longest record first; yours begins with the shortest": (
                lambda lengths, room: _filled(lengths, room, _longest_first(lengths)[::-1], "fullest")
            ),
        },
        hints=(
            "Sort the records by length first, the longest in front.",
            "Each record goes into the fullest pack that still has room for it; if there is none, open a new pack.",
            "open_ = [pack for pack in packs if tokens(pack) + length <= room]; max(open_, key=tokens).append(record)",
        ),
    ),
    "2": Exercise(
        name="positions",
        minutes=5,
        example=([3, 2, 4],),
        draw=_lens,
        right=_positions,
        mistakes={
            "position_ids run on through the row; every document counts from 0 again": (
                lambda seq_lens: {**_positions(seq_lens), "position_ids": range(sum(seq_lens))}
            ),
            "cu_seqlens has one entry more than there are documents: it begins with 0 and ends with all tokens": (
                lambda seq_lens: {**_positions(seq_lens), "cu_seqlens": cu_seqlens(seq_lens)[1:]}
            ),
            "cu_seqlens ends with the number of all tokens, where the last document ends": (
                lambda seq_lens: {**_positions(seq_lens), "cu_seqlens": cu_seqlens(seq_lens)[:-1]}
            ),
            "position_ids count from 0": (
                lambda seq_lens: {**_positions(seq_lens), "position_ids": position_ids(seq_lens) + 1}
            ),
        },
        hints=(
            "position_ids: count from 0, and from 0 again where a document begins.",
            "cu_seqlens: 0, then the running sum of the lengths.",
            "position_ids has as many entries as tokens, cu_seqlens one more than documents.",
        ),
    ),
    "3": Exercise(
        name="mask",
        minutes=10,
        example=([3, 2, 4],),
        draw=_lens,
        right=isolation_mask,
        mistakes={
            "A leak: tokens see those of other documents, which come earlier in the row": (
                lambda seq_lens: np.tri(sum(seq_lens), dtype=bool)
            ),
            "Tokens see what comes later in their document: j <= i is missing": (
                lambda seq_lens: isolation_mask(seq_lens) | isolation_mask(seq_lens).T
            ),
            "A token sees itself too: j <= i, not j < i": (
                lambda seq_lens: isolation_mask(seq_lens) & ~np.eye(sum(seq_lens), dtype=bool)
            ),
            "Rows and columns are exchanged: mask[i, j] says whether token i sees token j": (
                lambda seq_lens: isolation_mask(seq_lens).T
            ),
        },
        hints=(
            "Two conditions must hold: the same document, and j <= i.",
            "document = np.repeat(range(len(seq_lens)), seq_lens) numbers the documents; compare it with its column.",
            "(document[:, None] == document[None, :]) & np.tri(len(document), dtype=bool)",
        ),
    ),
    "4": Exercise(
        name="seq_lens_of",
        minutes=5,
        example=(position_ids([3, 2, 4]),),
        draw=lambda draw: (position_ids(_lens(draw)[0]),),
        right=lambda positions: np.diff(np.append(np.flatnonzero(np.asarray(positions) == 0), len(positions))),
        mistakes={
            "Those are the positions of the last tokens; a length is one more": (
                lambda positions: [
                    int(p) for i, p in enumerate(positions) if i + 1 == len(positions) or positions[i + 1] == 0
                ]
            ),
            "The last document is missing": (lambda positions: np.diff(np.flatnonzero(np.asarray(positions) == 0))),
            "Those are the places where documents begin; a length is the distance to the next": (
                lambda positions: np.flatnonzero(np.asarray(positions) == 0)
            ),
        },
        hints=(
            "Where does a document begin? What is its position there?",
            "starts = np.flatnonzero(position_ids == 0); a length is the distance to the next start.",
            "np.diff(np.append(starts, len(position_ids)))",
        ),
    ),
    "5": Exercise(
        name="saving",
        minutes=3,
        example=([100, 300, 600],),
        draw=lambda draw: ([draw.randint(10, 900) for _ in range(draw.randint(1, 6))],),
        right=_saving,
        mistakes={
            "That is the share which remains; asked is how many times less work there is": (
                lambda seq_lens: 1 / _saving(seq_lens)
            ),
            "Attention grows with the square of the length, not with the length": lambda seq_lens: len(seq_lens),
            "That is the share saved; asked is how many times less": lambda seq_lens: 1 - 1 / _saving(seq_lens),
        },
        hints=(
            "Attention over n tokens fills an n x n table (causal: half of it, which cancels here).",
            "Together: the square of the sum. Apart: the sum of the squares.",
            "sum(seq_lens) ** 2 / sum(n ** 2 for n in seq_lens)",
        ),
        rel=1e-3,
    ),
}
