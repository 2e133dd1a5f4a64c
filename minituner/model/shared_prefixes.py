"""Attention over a row whose shared prefixes are computed once: laid out whole before it, picked out again after it.

    computed     S S S a b c d         (1, heads, N, head_dim)     norms, projections, feed-forward: N tokens
    laid out     S S S a b S S S c     (1, heads, T, head_dim)     attention, document by document, as ever
    picked out   S S S a b c d         (1, N, heads, head_dim)

    backward     gradients of laid-out copies add up in the state that they were copied from

Which tokens those are is decided in data/prefixes.py. It is used after a proof on the model itself, in training mode:
where each copy would draw a dropout of its own, or where layers look at their neighbours by something else than
attention, the two sides differ and every token is computed. Lesson: notebook 04.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch.nn.modules.dropout import _DropoutNd

from minituner.data.collate import Batch, collate
from minituner.data.prefixes import Prefixes, share_prefixes


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


@torch.no_grad()
def proved(model: torch.nn.Module, states: Callable[[Batch], torch.Tensor], device: torch.device | str) -> bool:
    """True if the model's states are the same whether beginnings are computed once or each time.

    Args:
        model: in training mode.
        states: its computed states of a row, (N, width).
    """
    from minituner.model.fused import TOLERANCE  # whose layers call the attention that is wrapped here

    if any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in model.modules()):
        return False  # that of adapters cannot be seen before the first step: their B is 0
    beginning = np.arange(5)
    documents = [np.concatenate([beginning, np.arange(n) + first]) for n, first in ((4, 7), (1, 3), (6, 1))]
    row = collate([[(ids, ids) for ids in documents]])
    shared = share_prefixes(row)
    assert shared.prefixes is not None
    with torch.random.fork_rng():
        every = states(row.to(device))
        once = states(shared.to(device))[shared.prefixes.rows.to(device)]
    apart = float((once.float() - every.float()).abs().max())
    return apart <= TOLERANCE.get(every.dtype, 0.0) * float(every.abs().max())
