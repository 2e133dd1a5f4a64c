"""Exercises of lesson 04: best-fit, positions and borders, the attention mask, what packing costs.

What an exercise gives is a constant here, so that notebook and check cannot fall out of step:

    LENGTHS, ROOM    ->  04.1 packs them by hand        [[...], [...], ...]
    ROW              ->  04.2 position_ids, 04.3 the mask, 04.5 what attention costs

Every right answer is computed with the functions that training uses. Lesson: notebook 04.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minituner.camp.core import Exercise, Wrong
from minituner.data.packing import cu_seqlens, pack, position_ids

LENGTHS = (4, 7, 2, 5, 3, 6, 2)
ROOM = 10
ROW = (3, 2, 4)
COST = (100, 300, 600)


def isolation_mask(seq_lens: tuple[int, ...] = ROW) -> np.ndarray:
    """Boolean (T, T): row i sees column j if j is not later and stands in the same document."""
    document = np.repeat(np.arange(len(seq_lens)), seq_lens)
    position = position_ids(seq_lens)
    return np.equal.outer(document, document) & np.greater_equal.outer(position, position)


def _check_best_fit(answer: Any) -> None:
    packs = [[int(record) for record in bin_] for bin_ in answer]
    records = sorted(record for bin_ in packs for record in bin_)
    if records != list(range(len(LENGTHS))):
        twice = sorted({r for r in records if records.count(r) > 1})
        missing = sorted(set(range(len(LENGTHS))) - set(records))
        unknown = sorted(set(records) - set(range(len(LENGTHS))))
        said = {"twice": twice, "missing": missing, "not a record number": unknown}
        raise Wrong("; ".join(f"{what}: {which}" for what, which in said.items() if which))
    for number, bin_ in enumerate(packs):
        if (tokens := sum(LENGTHS[record] for record in bin_)) > ROOM:
            raise Wrong(f"pack {number} holds {tokens} tokens, and there is room for {ROOM}")
    right = pack(LENGTHS, ROOM)
    if len(packs) != len(right):
        raise Wrong(f"{len(packs)} packs; best-fit needs {'fewer' if len(packs) > len(right) else 'more'}")
    # Records of one length are interchangeable, and so are the places of the packs: compare lengths, in any order.
    if _as_lengths(packs) != _as_lengths(right.to_list()):
        raise Wrong("every record fits, but these are not the packs of best-fit: largest record first, fullest pack")


def _as_lengths(packs: list[list[int]]) -> list[list[int]]:
    return sorted(sorted(LENGTHS[record] for record in bin_) for bin_ in packs)


def _check_positions(answer: Any) -> None:
    if not isinstance(answer, dict) or not {"position_ids", "cu_seqlens"} <= set(answer):
        raise Wrong("answer with a dictionary: {'position_ids': [...], 'cu_seqlens': [...]}")
    positions, borders = list(answer["position_ids"]), list(answer["cu_seqlens"])
    if positions == list(range(sum(ROW))):
        raise Wrong("position_ids run on through the row; every document counts from 0 again")
    if positions != (right := position_ids(ROW).tolist()):
        raise Wrong(f"position_ids: {_difference(positions, right)}")
    if len(borders) == len(ROW):
        raise Wrong("cu_seqlens has one entry more than there are documents: it begins with 0 and ends with all tokens")
    if borders != (right := cu_seqlens(ROW).tolist()):
        raise Wrong(f"cu_seqlens: {_difference(borders, right)}")


def _difference(mine: list[int], right: list[int]) -> str:
    if len(mine) != len(right):
        return f"{len(right)} numbers are needed, yours has {len(mine)}"
    return f"entry {next(i for i, (a, b) in enumerate(zip(mine, right, strict=True)) if a != b)} is wrong"


def _check_mask(answer: Any) -> None:
    right = isolation_mask()
    mine = np.asarray(answer).astype(bool)
    if mine.shape != right.shape:
        raise Wrong(f"the mask of {sum(ROW)} tokens has the shape {right.shape}; yours has {mine.shape}")
    document = np.repeat(np.arange(len(ROW)), ROW)
    for i, j in np.argwhere(mine != right).tolist():
        if not mine[i, j]:
            raise Wrong(f"token {i} may see token {j} (same document, not later), and your mask hides it")
        if document[i] != document[j]:
            raise Wrong(f"token {i} (document {document[i]}) sees token {j} (document {document[j]}): a leak")
        raise Wrong(f"token {i} sees token {j}, which comes later")


def _check_seq_lens(answer: Callable[..., Any]) -> None:
    if not callable(answer):
        raise Wrong("give the function itself: answer = my_seq_lens (no brackets)")
    for lens in ((5,), ROW, (1, 1, 3), (2, 1)):
        positions = position_ids(lens)
        got = [int(n) for n in answer(positions.copy())]
        if got != list(lens):
            raise Wrong(f"position_ids {positions.tolist()} come from seq_lens {list(lens)}; yours gives {got}")


def _check_cost(answer: Any) -> None:
    together, apart = sum(COST) ** 2, sum(length**2 for length in COST)
    value = float(answer)
    if abs(value - apart / together) < 0.005:
        raise Wrong("that is the share which remains; asked is how many times less work there is")
    if abs(value - together / apart) > 0.01:
        raise Wrong(f"{value:.3g} is not the square of the sum over the sum of the squares")


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        "Pack the records of LENGTHS into packs of at most ROOM tokens by best-fit; answer with record numbers.",
        _check_best_fit,
        (
            "Sort the records by length first, the longest in front.",
            "Each record goes into the fullest pack that still has room for it; if there is none, open a new pack.",
            "The longest record opens pack 0, and of those after it the record of 3 tokens fills pack 0 to the brim.",
        ),
    ),
    "2": Exercise(
        "Write position_ids and cu_seqlens of a row whose documents have the lengths in ROW.",
        _check_positions,
        (
            "position_ids: count from 0, and from 0 again where a document begins.",
            "cu_seqlens: 0, then the running sum of the lengths.",
            "position_ids has as many entries as tokens, cu_seqlens one more than documents.",
        ),
    ),
    "3": Exercise(
        "Build the boolean attention mask of the documents in ROW: mask[i, j] says whether token i sees token j.",
        _check_mask,
        (
            "Two conditions must hold: the same document, and j <= i.",
            "document = np.repeat(range(len(ROW)), ROW) numbers the documents; compare it with itself, turned.",
            "(document[:, None] == document[None, :]) & np.tri(len(document), dtype=bool)",
        ),
    ),
    "4": Exercise(
        "Write seq_lens_of(position_ids): find the document lengths again from the positions alone.",
        _check_seq_lens,
        (
            "Where does a document begin? What is its position there?",
            "starts = np.flatnonzero(position_ids == 0); a length is the distance to the next start.",
            "np.diff(np.append(starts, len(position_ids)))",
        ),
    ),
    "5": Exercise(
        "How many times less attention work is it to keep the documents of COST apart than to let them see each other?",
        _check_cost,
        (
            "Attention over n tokens fills an n x n table (causal: half of it, which cancels here).",
            "Together: the square of the sum. Apart: the sum of the squares.",
            "sum(COST) ** 2 / sum(n ** 2 for n in COST)",
        ),
    ),
}
