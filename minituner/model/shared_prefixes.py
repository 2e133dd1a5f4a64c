"""Attention over a row whose shared prefixes are computed once: laid out whole before it, picked out again after it.

    computed     S S S a b c d         (1, heads, N, head_dim)     norms, projections, feed-forward: N tokens
    laid out     S S S a b S S S c     (1, heads, T, head_dim)     attention, document by document, as ever
    picked out   S S S a b c d         (1, N, heads, head_dim)

    backward     gradients of laid-out copies add up in the state that they were copied from

Which tokens those are is decided in data/prefixes.py. It is used after a proof on the model itself (fewer_tokens.py).
Lesson: notebook 04.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from minituner.data.prefixes import Prefixes


def over_whole_row(attend: Callable[..., tuple[torch.Tensor, None]]) -> Callable[..., tuple[torch.Tensor, None]]:
    """An attention function that may also be told `prefixes` and given the computed states only."""

    @wraps(attend)
    def attended(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        prefixes: Prefixes | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        if prefixes is None:
            return attend(module, query, key, value, attention_mask, **options)
        # As rows (N, heads, head_dim), which is how they lie in memory.
        whole = (x[0].transpose(0, 1).index_select(0, prefixes.rows).transpose(0, 1)[None] for x in (query, key, value))
        out, weights = attend(module, *whole, attention_mask, **options)
        return out[0].index_select(0, prefixes.own)[None], weights

    return attended
