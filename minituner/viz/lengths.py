"""Where the tokens are: how long records are, and where each token of the data went.

    length_histogram   ▂▇█▅▃▂▁▁ ¦ ▁        ¦ is max_length: what lies beyond is cut
    ledger_bar         |trained ////|masked: prompt      |cut|

Lessons: notebooks 01 and 03.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from minituner.data.ledger import Ledger
from minituner.errors import UsageError
from minituner.viz.picture import Picture, frame, new_figure
from minituner.viz.style import BAD, BLUE, GOOD, HATCHES, READ, SKY, SMALL, YELLOW, styled

BINS = 40
TRAINED, MASKED, LOST, PADDING, HELD_OUT = GOOD, READ, BAD, YELLOW, SKY


@styled
def length_histogram(lengths: npt.ArrayLike, max_length: int | None = None) -> Picture:
    """Records by their number of tokens, with a line at `max_length`.

    `data` has counts (b,), edges (b + 1,), median, mean, longest, and longer: how many records exceed max_length.

    Raises:
        UsageError: there are no lengths.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    if tokens.ndim != 1 or not len(tokens):
        raise UsageError("length_histogram needs one flat list of at least one length")
    longest = int(tokens.max())
    counts, edges = np.histogram(tokens, bins=min(BINS, max(longest - int(tokens.min()) + 1, 1)))
    longer = int((tokens > max_length).sum()) if max_length else 0
    figure = new_figure(8, 2.6)
    axes = figure.add_subplot()
    axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.85)
    summary = f"{len(tokens):,} records, median {np.median(tokens):,.0f} tokens, longest {longest:,}"
    if max_length:
        axes.axvline(max_length, color=BAD, linestyle="--", linewidth=1.5)
        axes.annotate(f"max_length {max_length:,}", (max_length, counts.max()), ha="right", va="top", fontsize=SMALL)
        summary += f"; {longer:,} longer than {max_length:,}"
    axes.set_title(summary)
    axes.set(xlabel="tokens", ylabel="records", ylim=(0, None))
    data = {
        "counts": counts,
        "edges": edges,
        "median": float(np.median(tokens)),
        "mean": float(tokens.mean()),
        "longest": longest,
        "longer": longer,
    }
    return Picture(figure, data, summary)


@styled
def ledger_bar(ledger: Ledger | dict[str, Any]) -> Picture:
    """One stacked bar: every token of the data, trained, masked by reason, cut, dropped, held out; padding on top.

    `data` has `parts` (name -> tokens, in the order drawn) and `raw`; the parts without padding add up to raw.
    """
    ledger = ledger if isinstance(ledger, Ledger) else Ledger.from_dict(ledger)
    parts = [("trained", ledger.trained, TRAINED, "")]
    parts += [(f"masked: {why}", n, MASKED, _hatch(i)) for i, (why, n) in enumerate(ledger.masked.most_common())]
    parts += [("truncated at max_length", ledger.truncated, LOST, _hatch(1))]
    parts += [(f"dropped: {why}", n, LOST, _hatch(i + 2)) for i, (why, n) in enumerate(ledger.dropped.most_common())]
    parts += [("held out for evaluation", ledger.held_out, HELD_OUT, "xx")]
    parts += [("padding (added)", ledger.padding, PADDING, "++")]
    parts = [part for part in parts if part[1]]
    raw = max(ledger.raw, 1)
    figure = new_figure(9, 1.2 + 0.2 * len(parts))
    axes = figure.add_subplot()
    start = 0
    for name, count, colour, hatch in parts:
        label = f"{name}: {count:,} ({count / raw:.1%})"
        axes.barh(0, count, left=start, color=colour, hatch=hatch, edgecolor="white", label=label)
        start += count
    axes.set(xlim=(0, max(start, 1)), yticks=[], xlabel="tokens")
    axes.set_title(f"{ledger.records:,} records, {ledger.raw:,} tokens")
    frame(axes, ("bottom",))
    if parts:
        figure.legend(loc="outside lower left")
    summary = f"{ledger.raw:,} tokens, {ledger.trained / raw:.1%} trained"
    return Picture(figure, {"parts": {name: count for name, count, _, _ in parts}, "raw": ledger.raw}, summary)


def _hatch(number: int) -> str:
    return HATCHES[number % len(HATCHES)]
