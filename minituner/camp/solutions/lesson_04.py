"""Solutions of lesson 04. Each function's head and docstring are the learner's stub."""

from __future__ import annotations

import numpy as np


# EXERCISE 4.1 (10 min)
def best_fit(lengths, room):
    """Packs of at most `room` tokens by best-fit: the longest record first, each into the fullest pack with room.

    lengths: tokens of each record; returned are lists of record numbers, one list a pack.
    >>> best_fit([3, 9, 6], 10)
    [[1], [2, 0]]
    """
    packs = []
    for record in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        tokens = [sum(lengths[r] for r in one) for one in packs]
        fitting = [i for i in range(len(packs)) if tokens[i] + lengths[record] <= room]
        if fitting:
            packs[max(fitting, key=lambda i: tokens[i])].append(record)
        else:
            packs.append([record])
    return packs


# EXERCISE 4.2 (5 min)
def positions(seq_lens):
    """What a row of packed documents needs besides its ids: {"position_ids": ..., "cu_seqlens": ...}.

    seq_lens: the lengths of its documents.
    >>> positions([2, 1])
    {'position_ids': [0, 1, 0], 'cu_seqlens': [0, 2, 3]}
    """
    position_ids, borders = [], [0]
    for length in seq_lens:
        position_ids += range(length)
        borders.append(borders[-1] + length)
    return {"position_ids": position_ids, "cu_seqlens": borders}


# EXERCISE 4.3 (10 min)
def mask(seq_lens):
    """The boolean attention mask of a row, (T, T): mask[i, j] says whether token i sees token j.

    seq_lens: the lengths of its documents, which must not see each other; nobody sees what comes later.
    >>> mask([1, 2]).astype(int).tolist()
    [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    """
    document = np.repeat(np.arange(len(seq_lens)), seq_lens)
    return (document[:, None] == document[None, :]) & np.tri(len(document), dtype=bool)


# EXERCISE 4.4 (5 min)
def seq_lens_of(position_ids):
    """The lengths of a row's documents, found from the positions alone. position_ids: array (T,).

    >>> list(map(int, seq_lens_of(np.array([0, 1, 2, 0, 1]))))
    [3, 2]
    """
    starts = np.flatnonzero(position_ids == 0)
    return np.diff(np.append(starts, len(position_ids)))


# EXERCISE 4.5 (3 min)
def saving(seq_lens):
    """How many times less attention work it is to keep documents apart than to let them see each other.

    >>> saving([10, 10])
    2.0
    """
    return sum(seq_lens) ** 2 / sum(length**2 for length in seq_lens)
