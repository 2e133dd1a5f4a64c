"""Tiles are the pairs that attention needs, in blocks; curves are the numbers given, and their growth is right."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib", reason="pictures need the notebooks extra")

from minituner import viz
from minituner.errors import UsageError


def png(picture: viz.Picture) -> bytes:
    """Draw it; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = picture._repr_png_()
    assert data.startswith(b"\x89PNG")
    return data


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(1, 25)),
)
def test_tiles_cover_what_may_be_seen_and_nothing_of_a_neighbour(
    seq_lens: list[int], block: int, window: int | None
) -> None:
    data = viz.tiles(seq_lens, block, window).data
    isolated = viz.attention_mask(seq_lens).data["mask"]
    places = np.arange(len(isolated))
    allowed = isolated & (places[:, None] - places[None, :] < (window or len(places)))
    document = np.repeat(np.arange(len(seq_lens)), seq_lens)
    covered = np.zeros_like(allowed, dtype=int)
    for (q, q_end, k, k_end), whole in zip(data["tiles"], data["whole"], strict=True):
        assert q < q_end <= q + block
        assert k < k_end <= k + block
        covered[q:q_end, k:k_end] += 1
        assert allowed[q:q_end, k:k_end].any(), "a tile without a visible pair is skipped"
        assert allowed[q:q_end, k:k_end].all() == whole
        assert len({*document[q:q_end], *document[k:k_end]}) == 1, "a tile lies inside one document"
    assert covered.max() == 1, "no pair is computed twice"
    assert (covered[allowed] == 1).all(), "every visible pair is computed"
    assert data["computed"] == covered.sum()
    assert data["needed"] == allowed.sum()
    assert data["all"] == allowed.size


def test_tiles_of_one_token_are_exactly_the_mask() -> None:
    data = viz.tiles([5, 3], 1).data
    assert data["computed"] == data["needed"] == 15 + 6
    assert data["whole"].all()


def test_tiles_are_drawn() -> None:
    picture = viz.tiles([5, 3], 2)
    assert "9 tiles of 2 x 2: 24 of 64 pairs" in repr(picture)
    assert len(png(picture)) < 30_000


@pytest.mark.parametrize("wrong", [([], 4, None), ([3, 0], 4, None), ([3], 0, None), ([3], 4, 0), ([600], 4, None)])
def test_tiles_refuse(wrong: tuple[list[int], int, int | None]) -> None:
    with pytest.raises(UsageError):
        viz.tiles(*wrong)


@settings(deadline=None, max_examples=15)
@given(st.floats(0.2, 3), st.floats(1e-6, 1e6))
def test_a_power_of_the_length_is_found_again(power: float, scale: float) -> None:
    lengths = [64, 128, 256, 512, 1024]
    curve = [scale * length**power for length in lengths]
    data = viz.cost_curves(lengths, {"this": curve}, ylabel="x").data
    assert data["exponent"]["this"] == pytest.approx(power, abs=1e-6)
    assert data["curves"]["this"].tolist() == curve


def test_growth_is_measured_where_rows_are_long() -> None:
    lengths = [64, 128, 256, 512]  # a constant cost hides the square in short rows
    data = viz.cost_curves(lengths, {"square": [1, 1, 4, 16]}, ylabel="x").data
    assert data["exponent"]["square"] == pytest.approx(2)


def test_curves_are_drawn() -> None:
    picture = viz.cost_curves([1, 2], {str(i): [1, 2 + i] for i in range(9)}, ylabel="milliseconds", title="many")
    assert "0 grows as length^1.0" in repr(picture)
    assert len(png(picture)) < 60_000


@pytest.mark.parametrize(
    ("lengths", "curves"),
    [
        ([1], {"a": [1]}),
        ([2, 1], {"a": [1, 1]}),
        ([0, 1], {"a": [1, 1]}),
        ([1, 2], {}),
        ([1, 2], {"a": [1]}),
        ([1, 2], {"a": [1, 0]}),
        ([1, 2], {"a": [1, float("nan")]}),
    ],
)
def test_curves_refuse(lengths: list[int], curves: dict[str, list[float]]) -> None:
    with pytest.raises(UsageError):
        viz.cost_curves(lengths, curves, ylabel="x")
