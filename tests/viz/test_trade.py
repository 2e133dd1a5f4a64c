"""The trade-off picture draws the numbers it is given, in the order of the steps."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="pictures need the notebooks extra")

from minituner import viz
from minituner.errors import UsageError


def point(step: int, rate: float, kl: float | None, **more: float) -> dict[str, float | None]:
    return {"step": step, "identity_rate": rate, "retention_kl": kl, **more}


def test_it_draws_what_it_is_given() -> None:
    live = [point(20, 1.0, 0.4), point(0, 0.0, 0.0), point(10, 0.5, 0.1)]
    beside = [point(0, 0.0, 0.0, clean_rate=1.0), point(30, 0.9, 0.2, clean_rate=0.8)]
    picture = viz.tradeoff({"1:2": live, "名字": beside}, beside={"known": beside})
    assert picture.data["1:2"] == {"step": [0, 10, 20], "identity_rate": [0, 0.5, 1], "retention_kl": [0, 0.1, 0.4]}
    assert picture.data["known"]["clean_rate"] == [1.0, 0.8]
    assert picture.summary == "1:2: 100% at KL 0.40; 名字: 90% at KL 0.20"
    axes = picture.figure.axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert drawn["1:2"] == [0, 0.5, 1]
    assert viz.tradeoff({"again": live}).data, "the name stays a function after its module was imported"
    assert {text.get_text() for text in axes.texts} == {"0", "10", "20", "30"}
    low, high = axes.get_xlim()
    assert low <= 0
    assert high >= 0.4
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_steps_that_would_lie_on_each_other_are_left_out() -> None:
    near = [point(0, 0.0, 0.0), point(4, 0.0, 0.001), point(40, 1.0, 0.48), point(60, 1.0, 0.47), point(90, 1.0, 0.45)]
    picture = viz.tradeoff({"a": near, "b": near[:3]})
    picture._repr_png_()
    axes = picture.figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert {"0", "40"} <= {text.get_text() for text in axes.texts}
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(
    ("runs", "said"),
    [({}, "at least one"), ({"a": []}, "at least one"), ({"a": [point(1, 0.5, None)]}, "no retention_kl")],
)
def test_what_cannot_be_drawn_is_refused(runs: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        viz.tradeoff(runs)
