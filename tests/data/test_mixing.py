"""Mixing: weights are exact, seeded, and never lose or repeat more than they say."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minituner.data.mixing import mix

WEIGHTS = st.one_of(st.integers(1, 4).map(float), st.floats(0.01, 4, allow_nan=False))


@given(st.lists(st.tuples(st.integers(0, 40), WEIGHTS), min_size=1, max_size=4), st.integers(0, 5))
def test_every_record_as_often_as_its_weight_says(sources: list[tuple[int, float]], seed: int) -> None:
    counts, weights = zip(*sources, strict=True)
    rows = mix(counts, weights, seed)
    used, start = Counter(rows.tolist()), 0
    for count, weight in sources:
        times = [used[row] for row in range(start, start + count)]
        assert set(times) <= {int(weight), int(weight) + 1}
        assert sum(times) == int(weight) * count + round((weight - int(weight)) * count)
        start += count
    assert len(rows) == sum(used.values())
    assert rows.dtype == np.int64
    assert not len(rows) or rows.max() < sum(counts)


def test_the_drawings_of_the_docstring() -> None:
    assert mix([4], [1.0], 0).tolist() == [0, 1, 2, 3]
    assert mix([4], [2.0], 0).tolist() == [0, 1, 2, 3] * 2
    assert len(mix([4], [0.5], 0)) == 2
    assert mix([4], [2.5], 0).tolist()[:8] == [0, 1, 2, 3] * 2
    assert mix([2, 3], [1.0, 1.0], 0).tolist() == [0, 1, 2, 3, 4]
    assert mix([], [], 0).tolist() == []


def test_the_seed_decides() -> None:
    assert mix([50], [0.5], 1).tolist() == mix([50], [0.5], 1).tolist()
    assert mix([50], [0.5], 1).tolist() != mix([50], [0.5], 2).tolist()
    halves = mix([50, 50], [0.5, 0.5], 1)
    assert halves[:25].tolist() != (halves[25:] - 50).tolist()  # sources are drawn independently


def test_counts_and_weights_belong_together() -> None:
    with pytest.raises(ValueError, match="zip"):
        mix([1, 2], [1.0], 0)
