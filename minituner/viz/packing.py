"""Packs as stacked bars: one bar a pack, one colour a document, white where nothing is trained.

    pack 0 |█████████▓▓▓▓▒▒|
    pack 1 |████████▓▓▓▓▓  |       the white gap is what packing is there to close

Lesson: notebook 04.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from minituner.data.packing import Packs, Pieces
from minituner.errors import UsageError
from minituner.viz.picture import Picture, frame, new_figure
from minituner.viz.style import FAINT, bar, styled


@styled
def packing_bins(
    packs: Packs | Pieces | Sequence[Sequence[Any]],
    lengths: npt.ArrayLike,
    max_length: int,
    limit: int = 40,
) -> Picture:
    """The first `limit` packs of a plan; `lengths` (records,) are tokens, as given to `pack`.

    `data` has packs (a list of `(record, tokens)` for each pack drawn), fill (0 to 1, over all packs), count, hidden.

    Raises:
        UsageError: a pack holds more than `max_length` tokens.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if isinstance(packs, (Packs, Pieces)):
        totals = packs.lengths
    else:
        totals = np.array([sum(tokens for _, tokens in _documents(pack, sizes)) for pack in packs], dtype=np.int64)
    if len(totals) and int(totals.max()) > max_length:
        raise UsageError(f"pack {int(totals.argmax())} holds {totals.max()} tokens, more than max_length={max_length}")
    fill = float(totals.sum() / (len(totals) * max_length)) if len(totals) else 0.0
    shown = [_documents(packs[number], sizes) for number in range(min(limit, len(totals)))]
    figure = new_figure(9, max(0.22 * len(shown), 0.6) + 0.8)
    axes = figure.add_subplot()
    for row, pack in enumerate(shown):
        _draw_pack(axes, row, pack, by_record=isinstance(packs, Pieces))
    for row in range(len(shown)):
        axes.barh(row, max_length, color="none", edgecolor=FAINT, linewidth=0.6, height=0.8)
    hidden = len(totals) - len(shown)
    summary = f"{len(totals):,} packs of at most {max_length:,} tokens, {fill:.1%} full"
    axes.set_title(summary + (f" (the first {limit} drawn)" if hidden else ""))
    axes.set(xlim=(0, max_length), ylim=(len(shown) - 0.4, -0.6), xlabel="tokens", ylabel="pack")
    axes.yaxis.get_major_locator().set_params(integer=True)
    frame(axes, ())
    return Picture(figure, {"packs": shown, "fill": fill, "count": len(totals), "hidden": hidden}, summary)


def _documents(pack: Any, sizes: np.ndarray) -> list[tuple[int, int]]:
    """`(record, tokens)` for each record, or piece of one, in a pack."""
    entries = np.asarray(pack, dtype=np.int64)
    if entries.ndim == 2:
        return [(record, end - start) for record, start, end in entries.tolist()]
    return [(record, int(sizes[record])) for record in entries.tolist()]


def _draw_pack(axes: Any, row: int, pack: list[tuple[int, int]], by_record: bool) -> None:
    """Neighbours differ in colour; with `by_record` the pieces of a cut record match across packs."""
    start = 0
    for place, (record, tokens) in enumerate(pack):
        look = bar(record if by_record else place)
        axes.barh(row, tokens, left=start, linewidth=0.8, height=0.8, **look)
        start += tokens
