"""Tokens as pictures: what is trained, what is only read, and which label each position is asked to predict.

    token_html    the whole document as text with coloured tokens; for notebooks, any script, any length
    token_strip   the same as a figure for print; draws `·` for characters that this machine's fonts lack
    label_strip   position      0      1      2      3
                  input         Hi     ⏎      Hello  </s>
                  predicts      ●      Hello  </s>   ●         ● is -100: asked nothing

Lesson: notebook 03.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minituner.data.encoding import IGNORE, Encoded
from minituner.data.token_view import COLOURS, ROLES, Role, TokenView, token_views
from minituner.errors import UsageError
from minituner.viz.picture import LATIN, Picture, drawable, fonts, lacks_a_font, new_figure
from minituner.viz.style import FAINT, INK, LABEL, OUTLINE, SMALL, styled

HATCH: dict[Role, str] = {"trained": "", "masked": "", "stop": "////", "bos": "...."}
MARK: dict[Role, str] = {"trained": " (underlined)", "masked": "", "stop": " (boxed)", "bos": " (dotted)"}
CHARACTER, LINE = 0.085, 0.3  # inches: a monospaced character, a line of tokens
SHORT = 12  # characters of a token in the label strip


@dataclass(repr=False)
class TokenHtml:
    """Coloured tokens that Jupyter shows as HTML; `data` as for `token_strip`."""

    html: str
    data: dict[str, Any] = field(default_factory=dict)
    summary: str = ""

    def _repr_html_(self) -> str:
        """What Jupyter shows; user text is escaped."""
        return self.html

    def __repr__(self) -> str:
        return f"TokenHtml({self.summary})"


def token_html(document: Encoded, tokenizer: Any, *, show_ids: bool = False, limit: int = 1000) -> TokenHtml:
    """A document's first `limit` tokens as coloured HTML: underlined trained, boxed stop, dotted BOS, grey masked."""
    from minituner.data.report_html import legend_html, tokens_html

    views = token_views(document, tokenizer, limit)
    data, summary = _facts(document, views)
    more = f"<div>... and {data['hidden']:,} more tokens</div>" if data["hidden"] else ""
    return TokenHtml(legend_html() + tokens_html(views, show_ids=show_ids) + more, data, summary)


@styled
def token_strip(
    document: Encoded, tokenizer: Any, *, width: int = 100, show_ids: bool = False, limit: int = 400
) -> Picture:
    """A document's first `limit` tokens as boxes, wrapped at `width` characters.

    `data` has texts, ids, roles, trained (all of the tokens drawn) and hidden (how many were not). A character that no
    font on this machine has is drawn as `·` (Chinese, where no Chinese font is installed): `token_html` shows it.
    """
    if width < 10:
        raise UsageError(f"width={width} leaves no room for a token", fix="use at least 10 characters")
    views = token_views(document, tokenizer, limit)
    data, summary = _facts(document, views)
    labels = [_shortened(f"{v.text} {v.id}" if show_ids else v.text, width - 2) for v in views]
    places, lines = _laid_out([_columns(label) + 1 for label in labels], width)
    figure = new_figure(width * CHARACTER + 0.3, (lines + 1) * LINE + 0.5)
    axes = figure.add_subplot()
    for view, label, (line, column, columns) in zip(views, labels, places, strict=True):
        _box(axes, view.role, column, line, columns, drawable(label))
    if data["hidden"]:
        axes.text(0, lines + 0.5, f"... and {data['hidden']:,} more tokens", va="center")
    axes.set(xlim=(0, width), ylim=(lines + bool(data["hidden"]), 0))
    axes.axis("off")
    _legend(figure, views)
    return Picture(figure, data, summary)


@styled
def label_strip(document: Encoded, tokenizer: Any, *, columns: int = 14, limit: int = 70) -> Picture:
    """Three rows for the first `limit` tokens: position, input token, and the label that it is asked to predict.

    The label is the next token where that is trained, else -100, drawn as a grey dot. `data` has positions, ids,
    texts, and targets (n,): what `collate` gives as shift_labels for this document alone.
    """
    views = token_views(document, tokenizer, limit + 1)
    n = min(len(document), limit)
    labels = document.labels.astype(np.int64)
    targets = np.append(labels[1:], IGNORE)[:n] if len(labels) else labels
    blocks = max(-(-n // columns), 1)
    figure = new_figure(columns * 0.95 + 0.8, blocks * 1.25 + 0.5)
    axes = figure.add_subplot()
    for i in range(n):
        block, column = divmod(i, columns)
        top = block * 4
        axes.text(column + 0.5, top + 0.5, str(i), ha="center", va="center", fontsize=SMALL, color=FAINT)
        text = drawable(_shortened(views[i].text, SHORT))
        _box(axes, views[i].role, column, top + 1, 1, text, pad=0.04, size=SMALL)
        if targets[i] == IGNORE:
            axes.plot(column + 0.5, top + 2.5, marker="o", color=OUTLINE, markersize=6)
        else:
            text = drawable(_shortened(views[i + 1].text, SHORT))
            _box(axes, views[i + 1].role, column, top + 2, 1, text, pad=0.04, size=SMALL)
    for block in range(blocks):
        for row, name in enumerate(("position", "input", "predicts")):
            axes.text(-0.1, block * 4 + row + 0.5, name, ha="right", va="center", fontsize=SMALL)
    axes.set(xlim=(-0.9, columns), ylim=(blocks * 4, 0))
    axes.axis("off")
    _legend(figure, views[:n], dot=True)
    supervised = int((targets != IGNORE).sum())
    data = {
        "positions": np.arange(n),
        "ids": document.input_ids[:n].astype(np.int64),
        "texts": [view.text for view in views[:n]],
        "targets": targets,
        "supervised": supervised,
        "hidden": len(document) - n,
    }
    return Picture(figure, data, f"labels of {n} tokens: {supervised} positions are asked to predict the next token")


def _facts(document: Encoded, views: list[TokenView]) -> tuple[dict[str, Any], str]:
    data = {
        "texts": [view.text for view in views],
        "ids": np.array([view.id for view in views], dtype=np.int64),
        "roles": [view.role for view in views],
        "trained": document.trained[: len(views)].copy(),
        "hidden": len(document) - len(views),
    }
    count = {role: data["roles"].count(role) for role in ROLES}
    summary = f"{len(document)} tokens: " + ", ".join(f"{number} {role}" for role, number in count.items() if number)
    return data, summary


def _columns(text: str) -> int:
    """Character cells the text takes; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _shortened(text: str, most: int) -> str:
    return text if _columns(text) <= most else text[: most - 1] + "…"


def _laid_out(widths: list[int], width: int) -> tuple[list[tuple[int, int, int]], int]:
    """(line, first column, columns) of each box, and how many lines there are."""
    places, line, column = [], 0, 0
    for columns in widths:
        if column and column + columns > width:
            line, column = line + 1, 0
        places.append((line, column, columns))
        column += columns
    return places, line + 1


def _box(
    axes: Any, role: Role, x: float, y: float, width: float, text: str, *, pad: float = 0.1, size: float = LABEL
) -> None:
    """One token: a tinted box, hatched for stop and BOS, with a thick line below when it is trained."""
    from matplotlib.patches import Rectangle

    fill, edge = COLOURS[role]
    heavy = 1.6 if role == "stop" else 0.6
    box = Rectangle((x + pad, y + 0.12), width - 2 * pad, 0.76, facecolor=fill, edgecolor=edge, linewidth=heavy)
    axes.add_patch(box)
    if HATCH[role]:
        hatch = Rectangle((x + pad, y + 0.12), width - 2 * pad, 0.76, fill=False, hatch=HATCH[role], linewidth=0)
        hatch.set(edgecolor=edge, alpha=0.25)
        axes.add_patch(hatch)
    if role in ("trained", "stop"):
        ends = [x + pad, x + width - pad]
        axes.plot(ends, [y + 0.88, y + 0.88], color=edge, linestyle="-", linewidth=2, solid_capstyle="butt")
    families = fonts()[0] or [LATIN]
    axes.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=size, family=families, color=INK)


def _legend(figure: Any, views: list[TokenView], dot: bool = False) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    roles = {view.role for view in views}
    handles: list[Any] = [
        Patch(facecolor=COLOURS[role][0], edgecolor=COLOURS[role][1], hatch=HATCH[role], label=meaning + MARK[role])
        for role, meaning in ROLES.items()
        if role in roles
    ]
    if dot:
        handles.append(Line2D([], [], marker="o", color=OUTLINE, linestyle="", label="-100: asked nothing"))
    split = any(view.continues for view in views)
    if lacking := any(lacks_a_font(view.text) for view in views):
        meaning = "no font here has this character (viz.token_html shows it)"
        meaning += ", or it goes on" if split else ""
    else:
        meaning = "goes on with the character before"
    if lacking or split:
        handles.append(Line2D([], [], marker=".", color=INK, markersize=3, linestyle="", label=meaning))
    figure.legend(handles=handles, loc="outside lower left", ncols=2)
