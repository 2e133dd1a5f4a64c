"""The attention of all documents of a row as one function: each written to its place, nothing joined or laid out.

    autograd, document by document                       one function
    split q, k, v; one kernel each; join the outputs     outputs are written into one tensor, gradients too
    kept: each output, and the joined one                kept: the joined one, and weights of short documents

Where documents share a beginning (data/prefixes.py), its keys and values are read where they were computed:

    row          S S S a b | S S S c         document 2 reads keys and values of rows 0 1 2 and 5, and writes row 5
    computed     0 1 2 3 4   5               its gradients of rows 0 1 2 are added to those of document 1

    a short document     its table of weights written out and kept, for its own queries only; heads that share a key
                         are one matrix of queries, so their gradients add up in the product
    a long one           the CPU kernel behind torch's scaled_dot_product_attention; queries of a shared beginning run
                         along (the kernel wants as many as keys), with gradients of 0

The numbers are per_document_sdpa's up to rounding (1e-5, tested). Used by fused rotary layers (fused_rotary.py,
fused_layer.py) in float32 on a CPU, where gradients are wanted. Gains: assets/benchmarks/README.md.
Lesson: notebook 06.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from minituner.data.prefixes import Prefixes

SHORT = 128  # a table of scores of at most this size, squared, is written out
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
GRADIENT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Piece:
    """One document: the rows that are its own, and those of its beginning that another document computes."""

    own: slice
    shared: torch.Tensor | None

    @property
    def before(self) -> int:
        """How many rows of its beginning another document computes."""
        return 0 if self.shared is None else len(self.shared)

    @property
    def new(self) -> int:
        """How many rows are its own."""
        return self.own.stop - self.own.start

    @property
    def short(self) -> bool:
        """Whether its table of scores is small enough to be written out."""
        return self.new * (self.new + self.before) <= SHORT**2

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, ...) -> the document's rows (n, ...), without a copy where it shares nothing."""
        return x[self.own] if self.shared is None else torch.cat([x[self.shared], x[self.own]])

    def behind_zeros(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, ...) -> the same with zeros for what is shared."""
        if self.shared is None:
            return x[self.own]
        return torch.cat([x.new_zeros(len(self.shared), *x.shape[1:]), x[self.own]])

    def add(self, total: torch.Tensor, part: torch.Tensor) -> None:
        """Write the document's rows of `part` (n, ...) into `total` (N, ...), and add what belongs to others."""
        total[self.own] = part[self.before :]
        if self.shared is not None:
            total.index_add_(0, self.shared, part[: self.before])


def pieces(seq_lens: Sequence[int], prefixes: Prefixes | None) -> list[Piece]:
    """The documents of a row, by the lengths they have in it."""
    return _pieces(tuple(seq_lens), prefixes)


@lru_cache(maxsize=1)  # all layers of a model ask the same
def _pieces(seq_lens: Sequence[int], prefixes: Prefixes | None) -> list[Piece]:
    if prefixes is None:
        ends = accumulate(seq_lens)
        return [Piece(slice(end - length, end), None) for end, length in zip(ends, seq_lens, strict=True)]
    found, start, own = [], 0, 0
    computed = torch.zeros(len(prefixes.rows), dtype=torch.bool).index_fill_(0, prefixes.own, True)
    for length, rows in zip(seq_lens, prefixes.rows.split(list(seq_lens)), strict=True):
        count = int(computed[start : start + length].sum())
        shared = rows[: length - count] if count < length else None
        found.append(Piece(slice(own, own + count), shared))
        start, own = start + length, own + count
    return [piece for piece in found if piece.own.start < piece.own.stop]


class PackedAttention(torch.autograd.Function):
    """Causal attention inside each document, with gradients for query, key and value."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Sequence[Piece], scale: float
    ) -> torch.Tensor:
        """q (N, heads, D), k and v (N, key_value_heads, D) -> (N, heads, D)."""
        out, kept = attended(q, k, v, documents, scale)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.documents, ctx.scale = documents, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of q, k and v."""
        q, k, v, out, *kept = ctx.saved_tensors
        return *attention_gradients(upstream, q, k, v, out, kept, ctx.documents, ctx.scale), None, None


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Sequence[Piece], scale: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output (N, heads, D), and what is kept of each document: its weights if it is short, else their log sums."""
    out, kept = torch.empty_like(q, memory_format=torch.contiguous_format), []
    for document in documents:
        if document.short:
            queries, keys, values = _written_out(document, q, k, v)
            kept.append(_weights(torch.bmm(queries, keys.transpose(1, 2)).mul_(scale), document.new))
            out[document.own] = _unstacked(torch.bmm(kept[-1], values), q.shape[1])
            continue
        one, size = KERNEL(*_as_batch(*map(document.of, (q, k, v))), 0.0, True, scale=scale)
        out[document.own] = _as_rows(one)[document.before :]
        kept.append(size)
    return out, kept


def attention_gradients(
    upstream: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    kept: Sequence[torch.Tensor],
    documents: Sequence[Piece],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, given that of the output and what `attended` returned."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for document, saved in zip(documents, kept, strict=True):
        if document.short:
            queries, keys, values = _written_out(document, q, k, v)
            given = _stacked(upstream[document.own], k.shape[1])
            of_weights = torch.bmm(given, values.transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, saved, -1, q.dtype).mul_(scale)
            dq[document.own] = _unstacked(torch.bmm(of_scores, keys), q.shape[1])
            for total, pair in ((dk, (of_scores, queries)), (dv, (saved, given))):
                document.add(total, torch.bmm(pair[0].transpose(1, 2), pair[1]).transpose(0, 1))
            continue
        batch = _as_batch(*map(document.of, (q, k, v)))
        given, made = (_as_heads(document.behind_zeros(x), k.shape[1]) for x in (upstream, out))
        of_q, of_k, of_v = GRADIENT(given, *batch, made, saved, 0.0, True, scale=scale)
        dq[document.own] = _as_rows(of_q)[document.before :]
        for total, part in ((dk, of_k), (dv, of_v)):
            document.add(total, part.sum(1).transpose(0, 1))  # heads that share a key
    return dq, dk, dv


def _written_out(document: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of m own queries, stacked: (groups, heads of a group * m, D); of n keys and values: (groups, n, D)."""
    return _stacked(q[document.own], k.shape[1]), *(document.of(x).transpose(0, 1) for x in (k, v))


def _weights(scores: torch.Tensor, own: int) -> torch.Tensor:
    """Attention weights of scaled products (groups, heads of a group * m, n); the m own queries are the last of n."""
    n = scores.shape[-1]
    later = torch.full((own, n), -torch.inf, dtype=scores.dtype).triu_(n - own + 1)
    scores.view(len(scores), -1, own, n).add_(later)
    return scores.softmax(-1)


def _stacked(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(m, heads, D) -> (groups, heads of a group * m, D): heads that share a key as more queries of it."""
    return _as_heads(x, groups).flatten(1, 2)


def _unstacked(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(groups, heads of a group * m, D) -> (m, heads, D)."""
    return _as_rows(x.unflatten(1, (heads // len(x), -1)))


def _as_heads(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(n, heads, D) -> (key_value_heads, heads that share one, n, D), a view."""
    return x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """(key_value_heads, heads that share one, n, D) -> (n, heads, D)."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _as_batch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Heads that share a key are a row of the kernel's batch, and all of them see the same tensor (stride 0)."""
    q = _as_heads(q, k.shape[1])
    return q, *(x.transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
