"""The museum's curves: what is drawn is what was measured, over the same axes."""

from __future__ import annotations

import pytest

from minituner import viz
from minituner.errors import UsageError


def run(*losses: float) -> list[dict[str, float]]:
    return [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]


def test_the_data_are_the_losses_and_say_what_falls() -> None:
    picture = viz.museum_curves(run(4, 3, 2), {"packed-leak": run(3.9, 3, 1.9), "frozen-warm-up": run(4, 4.1, 4)})
    assert picture.data["clean"]["loss"].tolist() == [4, 3, 2]
    assert picture.data["packed-leak"]["steps"].tolist() == [1, 2, 3]
    assert picture.data["falls"] == {"clean": True, "packed-leak": True, "frozen-warm-up": False}
    assert "frozen-warm-up 4.000 to 4.000 (does not fall)" in picture.summary
    fields = picture.figure.axes
    assert [axes.get_title().split(":")[0] for axes in fields] == ["clean", "packed-leak", "frozen-warm-up"]
    assert len({axes.get_ylim() for axes in fields}) == len({axes.get_xlim() for axes in fields}) == 1
    lines = {(axes.lines[-1].get_linestyle(), axes.lines[-1].get_marker()) for axes in fields}
    assert len(lines) == 2  # told apart without colour
    assert len(picture._repr_png_()) < 40_000


def test_a_loss_of_zero_does_not_fall() -> None:
    assert viz.museum_curves(run(4, 2), {"mask-everything": run(0, 0)}).data["falls"]["mask-everything"] is False


@pytest.mark.parametrize(("clean", "broken"), [([], {"x": run(1)}), (run(1), {}), (run(1), {"x": []})])
def test_nothing_to_draw_is_said(clean: list[dict[str, float]], broken: dict[str, list[dict[str, float]]]) -> None:
    with pytest.raises(UsageError, match="needs the metrics"):
        viz.museum_curves(clean, broken)
