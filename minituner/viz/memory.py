"""Memory bars: what lies in memory while a model is trained, one bar a method (or a rank), one colour a part.

    full    |weights|gradients|optimizer        |activ.|     2.5 GB
            #weights#gradients#optimizer########activ.##     2.5 GB measured
    qlora   |w|activ.|                                       0.5 GB

The first bar of a name is what a formula predicts, the one with a black outline under it what was measured: a
prediction nobody checked is a guess. Lessons: notebooks 05, 07 and 08.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

from minituner.errors import UsageError
from minituner.viz.picture import Picture, frame, new_figure
from minituner.viz.style import SMALL, bar, styled

Parts = Mapping[str, float]  # part -> bytes, in the order drawn
# The parts of a plan look the same in every picture; others take what is free.
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary", "communication")
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))


@styled
def memory_bars(rows: Mapping[str, Parts], measured: Mapping[str, Parts] | None = None) -> Picture:
    """Stacked bars of bytes: `rows` as predicted, `measured` outlined below the row of the same name.

    Names may be in one of the two only. `data` has `rows` and `measured` (name -> part -> bytes), `totals` and
    `measured_totals` (name -> bytes), and `parts` (in the order of the legend).

    Raises:
        UsageError: there is nothing to draw, or a part has a negative size.
    """
    predicted = {name: dict(parts) for name, parts in rows.items()}
    seen = {name: dict(parts) for name, parts in (measured or {}).items()}
    names = list(dict.fromkeys([*predicted, *seen]))
    bars = [(name, kind) for name in names for kind in (predicted, seen) if name in kind]
    parts = list(dict.fromkeys(part for name, kind in bars for part in kind[name]))
    if not parts:
        raise UsageError("memory_bars needs at least one row with at least one part")
    for name, kind in bars:
        if negative := [part for part, size in kind[name].items() if not size >= 0]:
            raise UsageError(f"memory_bars: {name}: {negative[0]} is {kind[name][negative[0]]} bytes")
    widest = max(sum(kind[name].values()) for name, kind in bars)
    unit = unit_of(widest)
    own = {part: PARTS.index(part) for part in parts if part in PARTS}
    free = (number for number in count() if number not in own.values())
    looks = {part: bar(own[part] if part in own else next(free)) for part in parts}
    figure = new_figure(8, 1.1 + 0.34 * len(bars) + 0.12 * len(names))
    axes = figure.add_subplot()
    place, ticks = 0.0, []
    for name in names:
        kinds = [kind for kind in (predicted, seen) if name in kind]
        ticks.append(place + 0.5 * (len(kinds) - 1))
        for kind in kinds:
            _draw(axes, place, kind[name], looks, unit, is_measured=kind is seen)
            place += 1
        place += 0.35
    for part in parts:
        axes.barh(0, 0, label=part, **looks[part])
    if seen:
        axes.barh(0, 0, color="white", edgecolor="black", label="measured")
    axes.set(yticks=ticks, yticklabels=names, xlabel=unit[1], xlim=(0, 1.16 * max(widest, 1) / unit[0]))
    axes.invert_yaxis()
    frame(axes, ("bottom",))
    axes.tick_params(left=False)
    figure.legend(loc="outside upper left", ncols=len(parts) + bool(seen))
    data = {
        "rows": predicted,
        "measured": seen,
        "totals": {name: sum(values.values()) for name, values in predicted.items()},
        "measured_totals": {name: sum(values.values()) for name, values in seen.items()},
        "parts": parts,
    }
    said = {**data["measured_totals"], **data["totals"]}
    return Picture(figure, data, "; ".join(f"{name} {as_text(said[name])}" for name in names))


def unit_of(size: float) -> tuple[float, str]:
    """The unit (bytes, name) in which `size` bytes are easy to read; decimal, as memory is sold and `doctor` says."""
    return next(((factor, name) for factor, name in UNITS if size >= factor), UNITS[-1])


def as_text(size: float) -> str:
    """A number of bytes in words: `2.15 GB`."""
    factor, name = unit_of(size)
    value = size / factor
    return f"{value:.3g} {name}" if value < 999.5 else f"{value:,.0f} {name}"


def _draw(
    axes: Any,
    place: float,
    parts: Parts,
    looks: Mapping[str, dict[str, Any]],
    unit: tuple[float, str],
    *,
    is_measured: bool,
) -> None:
    start = 0.0
    for part, size in parts.items():
        look = {**looks[part], "edgecolor": "black"} if is_measured else looks[part]
        axes.barh(place, size / unit[0], left=start, height=0.9, **look)
        start += size / unit[0]
    words = as_text(sum(parts.values())) + (" measured" if is_measured else "")
    axes.annotate(words, (start, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=SMALL)
