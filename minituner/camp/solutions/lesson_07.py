"""Solutions of lesson 07. Each function's head and docstring are the learner's stub."""

from __future__ import annotations

import numpy as np


# EXERCISE 7.1 (5 min)
def gigabytes(parameters, ranks):
    """How many GB (1e9 bytes) each rank holds of a model at ZeRO stage 2, mixed precision, without activations.

    >>> gigabytes(1_000_000_000, 2)
    9.0
    """
    return parameters * (2 + 2 / ranks + 12 / ranks) / 1e9


# EXERCISE 7.2 (10 min)
def smallest_stages(parameters, ranks, rooms):
    """The smallest ZeRO stage (0 to 3) that fits into each room, in GB; mixed precision, without activations.

    >>> smallest_stages(1_000_000_000, 2, [20, 10])
    [0, 1]
    """
    stages = []
    for room in rooms:
        for stage in range(4):
            bytes_each = 2 / (ranks if stage == 3 else 1) + 2 / (ranks if stage >= 2 else 1)
            bytes_each += 12 / (ranks if stage >= 1 else 1)
            if parameters * bytes_each / 1e9 <= room:
                stages.append(stage)
                break
    return stages


# EXERCISE 7.3 (10 min)
def factors(supervised):
    """What each rank must multiply its loss by, so that every token weighs the same: a list.

    supervised: the supervised tokens of each rank. A rank takes the mean over its own; gradients are then averaged
    over ranks.
    >>> factors([30, 10])
    [1.5, 0.5]
    """
    return [len(supervised) * tokens / sum(supervised) for tokens in supervised]


# EXERCISE 7.4 (5 min)
def reduce_scatter(rows, rank):
    """What rank `rank` holds after a reduce-scatter (sum) of the rows of all ranks; rows: a list of arrays.

    >>> reduce_scatter([np.array([1.0, 2.0]), np.array([10.0, 20.0])], 0).tolist()
    [11.0]
    """
    return np.split(sum(rows), len(rows))[rank]


# EXERCISE 7.5 (5 min)
def times_more(micro_batches):
    """How many times more bytes ZeRO stage 3 sends than stage 1, in a step of so many micro-batches.

    >>> times_more(2)
    3.0
    """
    return 3 * micro_batches / 2


# EXERCISE 7.6 (5 min)
def shapes(tokens, heads, group):
    """What one rank holds outside and inside attention: {"outside": (tokens, heads), "inside": (tokens, heads)}.

    A row of `tokens`, a model with `heads`, and `group` ranks that share the row by sequence parallel.
    >>> shapes(8, 2, 2)["outside"]
    (4, 2)
    """
    return {"outside": (tokens // group, heads), "inside": (tokens, heads // group)}
