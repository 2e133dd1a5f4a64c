"""What lesson 06's exercises are judged by: calls that leak and calls that do not, states of blocks, tiles."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from minituner.camp import lesson_06 as given


def test_calls_that_leak_leak_by_far_and_the_others_not_at_all() -> None:
    moved = {name: given.movement(call) for name, call in given.calls(given.tiny_llama()).items()}
    assert all(moved.pop(letter) > 0.1 for letter in "BCD")
    assert moved.pop("the one that hears ahead") > 0.01
    assert set(moved) == set("AEF")
    assert max(moved.values()) < 1e-5
    assert moved["E"] == 0.0


def test_what_the_attention_lets_through() -> None:
    back = np.subtract.outer(np.arange(6), np.arange(6))
    assert (given.visible(6, None) == (back >= 0)).all()
    assert (given.visible(6, 3) == ((back >= 0) & (back < 3))).all()


@pytest.mark.parametrize("offset", [0.0, 50.0, -50.0, 2000.0])
def test_merged_states_are_those_of_all_scores_together(offset: float) -> None:
    draw = np.random.default_rng(0)
    scores, values = draw.normal(size=7), draw.normal(size=(7, 2))
    scores[3:] += offset
    merged = given.EXERCISES["1"].right(given.state(scores[:3], values[:3]), given.state(scores[3:], values[3:]))
    for mine, whole in zip(merged, given.state(scores, values), strict=True):
        assert np.allclose(mine, whole)


def test_tiles_are_those_that_the_picture_counts() -> None:
    viz = pytest.importorskip("minituner.viz.cost")
    drawn = [given.EXERCISES["4"].draw(Random(seed)) for seed in range(20)]
    small = [(documents, block) for documents, block in drawn if sum(documents) <= 512]  # the most that a picture shows
    assert len(small) >= 4
    for documents, block in small[:4]:
        assert given.EXERCISES["4"].right(documents, block) == len(viz.tiles(documents, block).data["tiles"])
