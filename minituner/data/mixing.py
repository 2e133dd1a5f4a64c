"""Mixing: how often each source's records are used in one epoch.

    weight 1.0   every record once          [0 1 2 3]
    weight 2.0   every record twice         [0 1 2 3 0 1 2 3]
    weight 0.5   a seeded half              [1 2]
    weight 2.5   twice, and a seeded half   [0 1 2 3 0 1 2 3 0 3]

The mix is an index array over prepared documents, so nothing is tokenised twice and changing a weight re-uses the
cache. The same seed gives the same mix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mix(counts: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """Row numbers (n,) int64 of one epoch, over sources that lie one after the other with `counts` documents each."""
    parts, start = [], 0
    for number, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        whole, rest = int(weight), weight - int(weight)
        rows = np.tile(np.arange(count, dtype=np.int64), whole)
        if rest > 1e-9:
            draw = np.random.default_rng([seed, number])
            some = np.sort(draw.choice(count, size=round(count * rest), replace=False))
            rows = np.concatenate([rows, some])
        parts.append(rows + start)
        start += count
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
