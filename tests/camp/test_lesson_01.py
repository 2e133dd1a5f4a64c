"""The weight of exercise 1.5 is the one that mixing makes half an epoch of."""

from __future__ import annotations

from random import Random

from minituner.camp import lesson_01 as given
from minituner.data.mixing import mix


def test_the_right_weight_takes_as_many_records_from_both_sources() -> None:
    draw = Random(3)
    for _ in range(5):
        big, small = given.EXERCISES["5"].draw(draw)
        rows = mix((big, small), [1.0, given.EXERCISES["5"].right(big, small)], seed=42)
        assert abs(int((rows >= big).sum()) - big) <= 1
