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
from torch.autograd.function import once_differentiable
from torch.nn.modules.dropout import _DropoutNd

from minituner.data.collate import Batch, collate
from minituner.data.prefixes import Prefixes, share_prefixes

# How far states may lie apart, relative to the largest: other sizes of a product add in another order.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class LaidOut(torch.autograd.Function):
    """Computed states (N, ...) -> those of every token of the row (T, ...)."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, prefixes: Prefixes) -> torch.Tensor:
        """states (N, heads, head_dim) -> (T, heads, head_dim)."""
        ctx.prefixes = prefixes
        return states.index_select(0, prefixes.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradients of a state's copies, added up."""
        rows, own, again = ctx.prefixes.rows, ctx.prefixes.own, ctx.prefixes.again
        gradient = upstream.index_select(0, own)
        return gradient.index_add_(0, rows[again], upstream.index_select(0, again)), None


class PickedOut(torch.autograd.Function):
    """States of every token of the row (T, ...) -> those that are computed (N, ...)."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, prefixes: Prefixes) -> torch.Tensor:
        """states (T, heads, head_dim) -> (N, heads, head_dim)."""
        ctx.prefixes = prefixes
        return states.index_select(0, prefixes.own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The copies were not looked at, so their gradient is 0."""
        gradient = upstream.new_zeros(len(ctx.prefixes.rows), *upstream.shape[1:])
        return gradient.index_copy_(0, ctx.prefixes.own, upstream), None


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
        whole = (LaidOut.apply(x[0].transpose(0, 1), prefixes).transpose(0, 1)[None] for x in (query, key, value))
        out, weights = attend(module, *whole, attention_mask, **options)
        return PickedOut.apply(out[0], prefixes)[None], weights

    return attended


@torch.no_grad()
def proved(model: torch.nn.Module, states: Callable[[Batch], torch.Tensor], device: torch.device | str) -> bool:
    """True if the model's states are the same whether beginnings are computed once or each time.

    Args:
        model: in training mode.
        states: its computed states of a row, (N, width).
    """
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
