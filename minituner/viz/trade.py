"""The trade-off of a personal assistant: what is learned (upwards) against what is lost (to the right).

    100% |      4---8---16        one line a mix of data, one point a measurement, the number beside it its step
         |   2 /
         | 1 /                    good is up and left: the name is learned, and the model is still the one it was
      0% |0__________________
          0     KL from the untuned model

The base model is the corner that every line starts from. Lesson: notebook 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minituner.errors import UsageError
from minituner.viz.picture import Picture, drawable, fonts, new_figure
from minituner.viz.style import GRID, LINES, OUTLINE, SMALL, line, styled

NEEDED = ("step", "identity_rate", "retention_kl")


@styled
def tradeoff(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], beside: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> Picture:
    """Identity rate (share) by KL from the untuned model (nats a token): `runs` in colour, `beside` thin and grey.

    Both are name -> points, as `TradeOff.points` has them. `data` has, for each name, `step`, `identity_rate` and
    `retention_kl` in the order of the steps, and `clean_rate` where the points have one. Beside a point stands its
    step, unless another step stands there.

    Raises:
        UsageError: there is no run, one has no points, or a point lacks a number.
    """
    drawn = {name: sorted(points, key=lambda point: point["step"]) for name, points in runs.items()}
    grey = {name: sorted(points, key=lambda point: point["step"]) for name, points in (beside or {}).items()}
    if not drawn or not all([*drawn.values(), *grey.values()]):
        raise UsageError("tradeoff needs at least one run, and at least one point of each")
    for name, points in [*drawn.items(), *grey.items()]:
        for point in points:
            if missing := [key for key in NEEDED if point.get(key) is None]:
                raise UsageError(
                    f"tradeoff: a point of {name!r} has no {missing[0]}",
                    why="a resumed run has no untuned model to compare with" if missing == ["retention_kl"] else "",
                )
    figure = new_figure(8, 3.8)
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(grey.items()):
        axes.plot(
            *_line(points),
            color=OUTLINE,
            linewidth=1,
            linestyle=LINES[i % len(LINES)],
            marker=".",
            label=drawable(name),
            zorder=1,
        )
    widest = max(p["retention_kl"] for points in [*drawn.values(), *grey.values()] for p in points) or 1.0
    written: list[tuple[float, float]] = []  # where steps stand, in shares of the figure: no two on top of each other
    for i, (name, points) in enumerate(drawn.items()):
        x, y = _line(points)
        axes.plot(x, y, label=drawable(name), zorder=2, **line(i))
        for point, x_, y_ in zip(points, x, y, strict=True):
            if all(abs(x_ / widest - left) > 0.05 or abs(y_ - low) > 0.08 for left, low in written):
                written.append((x_ / widest, y_))
                axes.annotate(str(point["step"]), (x_, y_), xytext=(5, -11), textcoords="offset points", fontsize=SMALL)
    axes.set(
        xlabel="lost: KL from the untuned model, nats a token", ylabel="learned: identity rate", ylim=(-0.08, 1.08)
    )
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlim(left=min(0, *axes.get_xlim()))
    axes.axhline(1, color=GRID, linewidth=0.8, zorder=0)
    figure.legend(loc="outside right upper", prop={"family": fonts()[0], "size": SMALL})
    ends = [f"{name}: {p[-1]['identity_rate']:.0%} at KL {p[-1]['retention_kl']:.2f}" for name, p in drawn.items()]
    data = {name: _columns(points) for name, points in [*drawn.items(), *grey.items()]}
    return Picture(figure, data, "; ".join(ends))


def _line(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [float(p["retention_kl"]) for p in points], [float(p["identity_rate"]) for p in points]


def _columns(points: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    keys = [*NEEDED, *(["clean_rate"] if all("clean_rate" in p for p in points) else [])]
    return {key: [point[key] for point in points] for key in keys}
