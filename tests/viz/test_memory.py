"""Memory bars: the data is what was given, the totals add up, and it can be drawn without a warning."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("matplotlib", reason="pictures need the notebooks extra")

from hypothesis import given
from hypothesis import strategies as st

from minituner import viz
from minituner.errors import UsageError
from minituner.viz.memory import as_text

FULL = {"weights": 4e9, "gradients": 4e9, "optimizer": 8e9}
LORA = {"weights": 4e9, "gradients": 1e7, "optimizer": 2e7, "activations": 3e8}


def bars(picture: viz.Picture) -> list[tuple[float, float]]:
    """Left end and width of every visible bar, as drawn."""
    axes = picture.figure.axes[0]
    return [(patch.get_x(), patch.get_width()) for patch in axes.patches if patch.get_width()]


def test_data_totals_and_what_is_drawn() -> None:
    picture = viz.memory_bars({"full": FULL, "lora": LORA}, {"lora": {**LORA, "weights": 5e9}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture._repr_png_().startswith(b"\x89PNG")
    assert picture.data["rows"] == {"full": FULL, "lora": LORA}
    assert picture.data["totals"] == {"full": 16e9, "lora": 4.33e9}
    assert picture.data["measured_totals"]["lora"] == pytest.approx(5.33e9)
    assert picture.data["parts"] == ["weights", "gradients", "optimizer", "activations"]
    drawn = bars(picture)
    assert drawn[:3] == [(0, 4), (4, 4), (8, 8)], "parts of one bar stand end to end, in GB"
    assert len(drawn) == 3 + 4 + 4
    assert repr(picture) == "Picture(full 16 GB; lora 4.33 GB)"


def test_names_may_be_only_measured() -> None:
    picture = viz.memory_bars({}, {"rank 0": {"weights": 10}, "rank 1": {"weights": 12}})
    assert picture.data["measured_totals"] == {"rank 0": 10, "rank 1": 12}
    assert [text.get_text() for text in picture.figure.axes[0].get_yticklabels()] == ["rank 0", "rank 1"]
    picture._repr_png_()


def test_nothing_and_negative_sizes_are_refused() -> None:
    for rows in ({}, {"full": {}}):
        with pytest.raises(UsageError, match="at least one"):
            viz.memory_bars(rows)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(UsageError, match="lora: weights"):
            viz.memory_bars({"full": FULL, "lora": {"weights": wrong}})


@given(st.integers(0, 10**15))
def test_sizes_in_words_are_within_one_percent(size: int) -> None:
    assert "e" not in as_text(size).split()[0], "no powers of ten"
    number, unit = as_text(size).replace(",", "").split()
    factor = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    assert float(number) * factor == pytest.approx(size, rel=0.01)
