"""Who may look at whom: attention masks of packed and padded documents.

    block_diagonal   # . . . .       full   # . . . .       padded   # . .    # . .
    (isolated)       # # . . .     (leaks)  # # . . .                # # .    # # .
                     # # # . .              # # # . .                # # #    . . .
                     . . . # .              # # # # .
                     . . . # #              # # # # #

Rows are queries, columns keys. In `full`, the second document reads the first: the fault that packing without isolation
makes, drawn in its own colour. Lesson: notebook 04.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from minituner.errors import UsageError, nearest
from minituner.viz.picture import Picture, frame, new_figure
from minituner.viz.style import BAD, BLUE, EMPTY, styled

Kind = Literal["block_diagonal", "full", "padded"]
KINDS = ("block_diagonal", "full", "padded")
ALLOWED, LEAK = BLUE, BAD
MOST_DRAWN = 4  # padded documents side by side; the data has all
MOST_TOKENS = 4096  # a mask of (T, T) booleans is 16 MB then


@styled
def attention_mask(seq_lens: Sequence[int], kind: Kind = "block_diagonal", max_length: int | None = None) -> Picture:
    """The mask of documents of `seq_lens` tokens, causal, with their borders.

    `data["mask"]` is boolean, True where the query (row) may read the key (column): (T, T) for packed documents, with T
    the sum of seq_lens or `max_length`; (documents, L, L) for `padded`, with L the longest or `max_length`.
    `data["leaks"]` counts pairs from two different documents, `data["waste"]` is the share of places without a token.

    Raises:
        UsageError: an unknown kind, no documents, or more tokens than `max_length`.
    """
    lengths = [int(n) for n in seq_lens]
    if kind not in KINDS:
        raise UsageError(
            f"kind={kind!r} is unknown", why=nearest(str(kind), KINDS), fix=f"use one of {', '.join(KINDS)}"
        )
    if not lengths or min(lengths) < 1:
        raise UsageError(f"seq_lens={lengths} must be one or more positive lengths")
    needed = max(lengths) if kind == "padded" else sum(lengths)
    size = max_length or needed
    if not needed <= size <= MOST_TOKENS:
        why = f"the documents need {needed}" if size < needed else f"a picture shows at most {MOST_TOKENS}"
        raise UsageError(f"{size} tokens do not fit", why=why, fix="use other lengths or another max_length")
    if kind == "padded":
        masks = np.stack([_mask(_owners([length], size), True) for length in lengths])
        leaks = np.zeros_like(masks)
    else:
        owners = _owners(lengths, size)
        masks = _mask(owners, kind == "block_diagonal")[None]
        leaks = masks & (owners[:, None] != owners[None, :])
    waste = 1 - sum(lengths) / (size * len(masks))
    drawn = min(len(masks), MOST_DRAWN)
    figure = new_figure(3.4 * drawn, 3.8)
    for number, (mask, leak) in enumerate(zip(masks[:drawn], leaks[:drawn], strict=True)):
        axes = figure.add_subplot(1, drawn, number + 1)
        _draw(axes, mask, leak, [lengths[number]] if kind == "padded" else lengths)
        axes.set_xlabel("key: is read")
        axes.set_ylabel("query: reads" if number == 0 else "")
    summary = _title(kind, lengths, int(leaks.sum()), waste)
    figure.suptitle(summary.replace("documents, ", "documents\n", 1))
    data: dict[str, Any] = {
        "mask": masks if kind == "padded" else masks[0],
        "seq_lens": lengths,
        "allowed": int(masks.sum()),
        "leaks": int(leaks.sum()),
        "waste": waste,
    }
    return Picture(figure, data, summary)


def _owners(lengths: list[int], size: int) -> np.ndarray:
    """The document of each place, (size,); -1 where there is no token."""
    owners = np.full(size, -1)
    owners[: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
    return owners


def _mask(owners: np.ndarray, isolated: bool) -> np.ndarray:
    """(T, T): causal between tokens, and within a document when isolated; an empty place neither reads nor is read."""
    mask = np.tri(len(owners), dtype=bool) & (owners >= 0)[:, None] & (owners >= 0)[None, :]
    return mask & (owners[:, None] == owners[None, :]) if isolated else mask


def _draw(axes: Any, mask: np.ndarray, leak: np.ndarray, lengths: list[int]) -> None:
    from matplotlib.colors import ListedColormap

    picture = mask.astype(int) + (leak & mask)
    axes.imshow(picture, cmap=ListedColormap([EMPTY, ALLOWED, LEAK]), vmin=0, vmax=2, interpolation="nearest")
    size = len(mask)
    for border in np.cumsum(lengths):
        if border < size:
            axes.axhline(border - 0.5, color="black", linewidth=1, linestyle="--")
            axes.axvline(border - 0.5, color="black", linewidth=1, linestyle="--")
    if size <= 40:  # the grid, and a mark that does not need colour
        axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
        rows, columns = np.nonzero(leak & mask)
        axes.plot(columns, rows, linestyle="", marker="x", color="black", markersize=max(2, 80 / size))
    frame(axes, ())


def _title(kind: str, lengths: list[int], leaks: int, waste: float) -> str:
    name = {"block_diagonal": "packed, isolated", "full": "packed, not isolated", "padded": "padded"}[kind]
    tail = f"{leaks:,} places read another document" if leaks else "no document reads another"
    return f"{name}: {len(lengths)} documents, {tail}, {waste:.0%} of the places are empty"
