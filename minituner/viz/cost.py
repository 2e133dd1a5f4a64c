"""What attention costs: the tiles that a kernel computes, and cost against length.

    tiles([5, 3], block=2)           cost_curves([256, 512, 1024], {"plain": ..., "per document": ...})

    # . . . . . . .  # partly        cost
    # # . . . . . .    masked          |          / plain          both axes logarithmic: a straight line of
    @ @ # . . . . .  @ whole           |        /                  slope 2 is a cost that grows with the square
    @ @ # # . . . .  . never           |     /   .- per document
    @ @ @ @ @ . . .    touched         |  /  .-
    . . . . . # . .                    +----------------- length
    . . . . . # # .
    . . . . . @ @ @

A kernel works tile by tile, and the tiles of each document start at its own first token. Lesson: notebook 06.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from minituner.errors import UsageError
from minituner.viz.picture import Picture, frame, new_figure
from minituner.viz.style import BLUE, EMPTY, OUTLINE, SKY, line, styled

MOST_TOKENS = 512  # beyond, a tile is smaller than a dot of the screen
SKIPPED, PARTLY, WHOLE = EMPTY, SKY, BLUE


@styled
def tiles(seq_lens: Sequence[int], block: int = 4, window: int | None = None) -> Picture:
    """The (block, block) tiles that causal attention computes for documents of `seq_lens` tokens in one row of T.

    `window` is the number of tokens that a token sees, itself included. `data` has `tiles` (n, 4) as first query, end,
    first key, end; `whole` (n,) boolean, true for tiles that need no mask; `computed`, the pairs of tokens inside the
    tiles; `needed`, the pairs that may see each other; and `all`, T * T.

    Raises:
        UsageError: no documents, a length, block or window below 1, or more tokens than a picture can show.
    """
    lengths = [int(n) for n in seq_lens]
    if not lengths or min(lengths) < 1 or block < 1 or (window is not None and window < 1):
        raise UsageError(f"seq_lens={lengths}, block={block}, window={window} must be positive")
    size = sum(lengths)
    if size > MOST_TOKENS:
        raise UsageError(f"{size} tokens do not fit", why=f"a picture of tiles shows at most {MOST_TOKENS}")
    spans: list[tuple[int, int, int, int]] = []
    whole: list[bool] = []
    picture = np.zeros((size, size), dtype=int)
    for start, length in zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True):
        end = start + length
        for q in range(start, end, block):
            for k in range(start, q + 1, block):
                q_end, k_end = min(q + block, end), min(k + block, end)
                visible = _visible(np.arange(q, q_end)[:, None], np.arange(k, k_end)[None, :], window)
                if visible.any():
                    spans.append((q, q_end, k, k_end))
                    whole.append(bool(visible.all()))
                    picture[q:q_end, k:k_end] = 2 if whole[-1] else 1
    token, document = np.arange(size), np.repeat(np.arange(len(lengths)), lengths)
    seen = _visible(token[:, None], token[None, :], window) & (document[:, None] == document[None, :])
    computed = sum((q_end - q) * (k_end - k) for q, q_end, k, k_end in spans)
    summary = f"{len(spans)} tiles of {block} x {block}: {computed:,} of {size * size:,} pairs computed"
    data = {
        "tiles": np.array(spans),
        "whole": np.array(whole),
        "computed": computed,
        "needed": int(seen.sum()),
        "all": size * size,
    }
    return Picture(_draw_tiles(picture, spans, summary), data, summary)


def _visible(query: npt.NDArray[Any], key: npt.NDArray[Any], window: int | None) -> npt.NDArray[np.bool_]:
    return (key <= query) & (query - key < (window or query.max() + 1))


def _draw_tiles(picture: np.ndarray, spans: list[tuple[int, int, int, int]], title: str) -> Any:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch, Rectangle

    figure = new_figure(4.6, 3.8)
    axes = figure.add_subplot()
    axes.imshow(picture, cmap=ListedColormap([SKIPPED, PARTLY, WHOLE]), vmin=0, vmax=2, interpolation="nearest")
    for q, q_end, k, k_end in spans:
        axes.add_patch(Rectangle((k - 0.5, q - 0.5), k_end - k, q_end - q, fill=False, edgecolor="white", linewidth=1))
    axes.set(xlabel="key: is read", ylabel="query: reads")
    axes.set_title(title.replace(": ", "\n"))  # on one line it runs into the legend
    frame(axes, ())
    names = {"whole": WHOLE, "with a mask": PARTLY, "never touched": SKIPPED}
    handles = [Patch(facecolor=colour, edgecolor=OUTLINE, label=name) for name, colour in names.items()]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


@styled
def cost_curves(
    lengths: Sequence[int], curves: Mapping[str, Sequence[float]], *, ylabel: str, title: str = ""
) -> Picture:
    """Costs (n,) of several ways to do one thing, against the length of the row (n,), on logarithmic axes.

    `data` has `lengths`, `curves`, and `exponent` (name -> p): over its upper half a curve grows about as length ** p.

    Raises:
        UsageError: fewer than two lengths, or a curve that has another number of values or one that is not positive.
    """
    length = np.asarray(lengths, dtype=float)
    values = {name: np.asarray(curve, dtype=float) for name, curve in curves.items()}
    if len(length) < 2 or (np.diff(length) <= 0).any() or length[0] <= 0 or not values:
        raise UsageError(f"lengths={list(lengths)}: curves need two or more positive lengths that grow")
    for name, curve in values.items():
        if curve.shape != length.shape or not (np.isfinite(curve) & (curve > 0)).all():
            raise UsageError(f"curve {name!r} needs {len(length)} positive values", why=f"it has {curve.tolist()}")
    upper = slice(min(len(length) // 2, len(length) - 2), None)
    exponent = {
        name: float(np.polyfit(np.log(length[upper]), np.log(curve[upper]), 1)[0]) for name, curve in values.items()
    }
    figure = new_figure(7.5, 3.2)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes = figure.add_subplot()
    for number, (name, curve) in enumerate(values.items()):
        axes.plot(length, curve, label=name, **line(number))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(length, [f"{int(n):,}" for n in length])
    axes.set(xlabel="tokens in the row", ylabel=ylabel)
    axes.set_title(title)
    axes.grid()
    figure.legend(loc="outside right upper")
    summary = "; ".join(f"{name} grows as length^{p:.1f}" for name, p in exponent.items())
    return Picture(figure, {"lengths": length, "curves": values, "exponent": exponent}, summary)
