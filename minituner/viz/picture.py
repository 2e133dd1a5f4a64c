"""A picture: a matplotlib figure and the data it was drawn from.

    figure   ----shown in Jupyter as a PNG, once (it is never known to pyplot, which would show it a second time)
    data     ----what a test or an exercise asserts on: plain values and numpy arrays
    summary  ----one line of text for those who do not see the figure: the image's alt text

Lessons: notebooks 01 to 04 and 07.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

from minituner.data.token_view import visible
from minituner.viz.style import DPI, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "·"  # drawn for a character that no font of this machine has
LATIN, WIDE = "DejaVu Sans Mono", "DejaVu Sans"  # matplotlib brings both
CHINESE = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Heiti SC",
    "Arial Unicode MS",
)


@dataclass(repr=False)
class Picture:
    """A figure for the eye, `data` for the program, `summary` for the reader of plain text."""

    figure: Figure
    data: dict[str, Any] = field(default_factory=dict)
    summary: str = ""

    def _repr_png_(self) -> bytes:
        """The figure as PNG: what Jupyter shows, and what a notebook file keeps, so it should be small."""
        from PIL import Image

        buffer, small = BytesIO(), BytesIO()
        self.figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight")
        with Image.open(buffer) as picture:  # 64 colours are enough for flat tints: a third of the bytes
            picture.convert("RGB").quantize(64).save(small, format="png", optimize=True)
        return small.getvalue()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        """What Jupyter asks for first: the PNG, the words, and the words again as the image's alt text."""
        image = b64encode(self._repr_png_()).decode("ascii")
        return {"image/png": image, "text/plain": repr(self)}, {"image/png": {"alt": self.summary}}

    def __repr__(self) -> str:
        return f"Picture({self.summary})"

    def save(self, path: str) -> None:
        """Write the figure to a file; its ending (.png, .svg, .pdf) chooses the kind."""
        self.figure.savefig(path, dpi=DPI, bbox_inches="tight")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` by `height` inches that pyplot does not know.

    Raises:
        UsageError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@lru_cache(maxsize=1)
def fonts() -> tuple[list[str], frozenset[int]]:
    """Font families to use one after the other, and the code points that they can draw together."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = [name for name in (LATIN, WIDE, *CHINESE) if name in installed]
    points: set[int] = set()
    for name in families:
        points.update(font_manager.get_font(font_manager.findfont(name)).get_charmap())
    return families, frozenset(points)


def drawable(text: str) -> str:
    """The text with `·` for every character that no font here has, and no `$` that would start a formula."""
    known = fonts()[1]
    shown = visible(text)
    shown = shown if shown.strip(" ") else "␣" * len(shown)  # a box must not look empty
    return "".join(c if ord(c) in known else MISSING for c in shown).replace("$", r"\$")


def lacks_a_font(text: str) -> bool:
    """Whether `drawable` has to leave characters out."""
    return any(ord(c) not in fonts()[1] for c in visible(text))


def frame(axes: Any, keep: Sequence[str] = ("left", "bottom")) -> None:
    """Leave only the named border lines of `axes`."""
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(side in keep)
