"""Pictures of live objects: the very arrays that are trained on, drawn, with their data beside the figure.

    picture = viz.attention_mask([3, 2]);  picture                 the last expression of a cell is shown
    picture.data["mask"]                                           what was drawn, to assert on

`viz` looks in from outside: nothing in the package imports it. Lessons: notebooks 01 to 07.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Picture": "picture",
    "use_style": "style",
    "TokenHtml": "tokens",
    "token_strip": "tokens",
    "token_html": "tokens",
    "label_strip": "tokens",
    "attention_mask": "attention",
    "packing_bins": "packing",
    "length_histogram": "lengths",
    "ledger_bar": "lengths",
    "memory_bars": "memory",
    "shard_map": "ranks",
    "sequence_split": "ranks",
    "tiles": "cost",
    "cost_curves": "cost",
    "loss_curve": "loss",
    "LiveLoss": "loss",
    "run_curves": "run",
    "museum_curves": "museum",
    "tradeoff": "trade",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: matplotlib takes a second, and `token_html` works without it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
