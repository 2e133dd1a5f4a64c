"""Who holds what: the shares of every stage, and of tokens and heads under sequence parallel."""

from __future__ import annotations

import numpy as np
import pytest

from minituner import viz
from minituner.errors import UsageError
from minituner.train.zero_bytes import bytes_held

NAMES = {"weights": "weights", "gradients": "gradients", "averages": "optimizer"}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_shares_drawn_are_those_of_the_formula(world_size: int) -> None:
    held = viz.shard_map(world_size).data["held"]
    for (stage, _), kinds in held.items():
        for kind, (start, end) in kinds.items():
            whole = bytes_held(1000, world_size, 0)[NAMES[kind]]
            assert (end - start) * whole == pytest.approx(bytes_held(1000, world_size, stage)[NAMES[kind]])


def test_the_shares_of_all_ranks_cover_everything() -> None:
    held = viz.shard_map(4).data["held"]
    for stage, kind in ((1, "averages"), (2, "gradients"), (3, "weights")):
        assert [held[stage, rank][kind] for rank in range(4)] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]


def test_tokens_outside_attention_and_heads_inside() -> None:
    picture = viz.sequence_split([5, 3], heads=4, world_size=2)
    assert picture.data["outside"][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (picture.data["outside"] == picture.data["outside"][0]).all()
    assert picture.data["inside"][:, 0].tolist() == [0, 0, 1, 1]
    assert np.array_equal(np.bincount(picture.data["inside"].ravel()), np.bincount(picture.data["outside"].ravel()))
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_what_cannot_be_dealt_out_is_said() -> None:
    with pytest.raises(UsageError, match="7 tokens and 4 heads"):
        viz.sequence_split([4, 3], heads=4)
    with pytest.raises(UsageError, match="world_size=0"):
        viz.shard_map(0)
