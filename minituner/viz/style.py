"""One look for every figure: colours, the marks that go with them, and the sizes of text and lines.

    number    0      1       2      3     4    5          6
    colour    blue   orange  green  pink  sky  vermilion  yellow      Okabe and Ito's
    hatch            //      ..     \\\\    xx   --         ++          bars: `bar(number)`
    marker    o      s       D      ^     v    P          *           lines: `line(number)`, each with - -- : -.

Nothing is told by colour alone: some readers see fewer colours, and most printers have none. In a notebook that draws
with pyplot itself, `viz.use_style()` gives its figures the same look. Lessons: notebooks 01 to 10.

Source: Okabe and Ito, Color Universal Design (2008), https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from minituner.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")

BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, YELLOW = PALETTE = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
)
# Greys, from the paper to the ink: an empty place, a grid, what is only read, a thin outline, small text, text.
EMPTY, GRID, READ, OUTLINE, FAINT, INK = "#f4f4f4", "#dddddd", "#bdbdbd", "#999999", "#555555", "#111111"
GOOD, BAD = GREEN, VERMILION  # never without a word or a mark beside

HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++")
MARKERS = ("o", "s", "D", "^", "v", "P", "*")
LINES = ("-", "--", ":", "-.")

TITLE, LABEL, SMALL = 10, 9, 8  # points; nothing in a figure is smaller than SMALL, so that it survives print
DPI = 100


def line(number: int) -> dict[str, Any]:
    """Colour, line and marker of the curve `number`, as keywords of `plot`."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def bar(number: int) -> dict[str, Any]:
    """Colour and hatch of the bar `number`, as keywords of `barh` or of a patch."""
    return {"color": PALETTE[number % len(PALETTE)], "hatch": HATCHES[number % len(HATCHES)], "edgecolor": "white"}


def settings() -> dict[str, Any]:
    """The style as matplotlib's rcParams."""
    from cycler import cycler

    lines = [LINES[number % len(LINES)] for number in range(len(PALETTE))]
    return {
        "axes.prop_cycle": cycler(color=PALETTE, linestyle=lines),
        "axes.titlesize": TITLE,
        "axes.labelsize": LABEL,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
        "figure.dpi": DPI,
        "figure.titlesize": TITLE,
        "font.size": LABEL,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "hatch.linewidth": 0.8,
        "legend.fontsize": SMALL,
        "legend.frameon": False,
        "legend.title_fontsize": SMALL,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL,
    }


def use_style() -> None:
    """Give this look to everything that matplotlib draws from now on; for notebooks that draw by themselves.

    Raises:
        UsageError: matplotlib is not installed.
    """
    need_matplotlib()
    import matplotlib

    matplotlib.rcParams.update(settings())


@contextmanager
def in_style() -> Iterator[None]:
    """The look inside a `with`; the caller's own settings come back behind it.

    Raises:
        UsageError: matplotlib is not installed.
    """
    need_matplotlib()
    import matplotlib

    with matplotlib.rc_context(settings()):
        yield


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """A function that draws, in this look whatever the caller has set."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with in_style():
            return draw(*args, **kwargs)

    return drawn


def need_matplotlib() -> None:
    """Say what to install.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "pictures need matplotlib, which is not installed",
            fix="install it; viz.token_html works without",
            next_command="pip install 'minituner[notebooks]'",
        ) from None
