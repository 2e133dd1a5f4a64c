"""A decoder layer as one function: the fused parts one after another, with one node of autograd's instead of twenty.

    autograd, part by part                              one function
    norm, q k v, rotation, attention, o, sum,           x  ->  y = x + o(attention(norm(x)))  ->  y + swiglu(norm(y))
    norm, feed-forward, sum: a module or a node each    the same functions, forward and back, called by this one

What a layer computes and keeps is what its parts compute and keep (fused_norm.py, fused_lora.py, fused_rotary.py,
packed_attention.py, fused_swiglu.py). What is saved is what happens between the parts: calls of modules, autograd's
nodes, and a new tensor for each sum of states or of gradients, made in place here. Gains: assets/benchmarks/README.md.

Only where every part would take its own fused way, in float32 on a CPU: all four kinds are fused, every linear layer is
frozen base + one adapter, documents attend alone, and nobody listens to or replaces what is inside (hooks, a compiled
block). Proved on the model first (fused.py): models that scale their sums are left alone. Lesson: notebook 05.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from minituner.model.fused_lora import (
    Part,
    a_and_b,
    fused_class,
    has_listeners,
    parts_of,
    product_gradients,
    products,
    shaped,
)
from minituner.model.fused_norm import norm_gradient, normed
from minituner.model.fused_rotary import attends_at_once, attention_of, is_rotary, rotated, rotates_here
from minituner.model.fused_swiglu import is_swiglu, rows_at_a_time, swiglu, swiglu_gradients
from minituner.model.packed_attention import Piece, attended, attention_gradients, pieces

CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class Told(NamedTuple):
    """What a layer is besides its adapters, and what it is told of a row."""

    qkv: list[Part]
    o: list[Part]
    block: list[Part]
    """gate, up, down."""
    norms: tuple[tuple[torch.Tensor, float], tuple[torch.Tensor, float]]
    """Weight (H,) and epsilon, of the norm before attention and of that before the feed-forward block."""
    documents: Sequence[Piece]
    cos: torch.Tensor
    """(T, D), and sin alike."""
    sin: torch.Tensor
    scale: float
    """Of the scores."""

    @property
    def adapters(self) -> list[torch.Tensor]:
        """A, B, A, B, ... in the order in which the gradients come."""
        return a_and_b([*self.qkv, *self.o, *self.block])


class LoraLayer(torch.autograd.Function):
    """One pre-norm decoder layer over a row of documents, with gradients for x and the adapters."""

    @staticmethod
    def forward(ctx: Any, told: Told, x: torch.Tensor, *adapters: torch.Tensor) -> torch.Tensor:
        """x (1, T, H) -> (1, T, H). After x come the A and B of `told`, for autograd to know them."""
        x = x[0]
        before, r_before = normed(x, *told.norms[0])
        qkv, h_qkv = products(before, told.qkv)
        q, k, v = (t.view(len(x), -1, told.cos.shape[-1]) for t in qkv)
        q, k = rotated((q, k), told.cos, told.sin, 1.0)
        out, weights = attended(q, k, v, told.documents, told.scale)
        (y,), h_o = products(out.flatten(1), told.o)
        y = y.add_(x)
        between, r_between = normed(y, *told.norms[1])
        done = [swiglu(piece, told.block) for piece in between.split(rows_at_a_time(between, told.block))]
        z = done[0][0] if len(done) == 1 else torch.cat([one for one, _ in done])
        of_block = [tensor for _, kept in done for tensor in kept]
        ctx.told, ctx.counts = told, (len(weights), len(of_block))
        first = (x, r_before) if ctx.needs_input_grad[1] else (None, None)  # for the gradient of x only
        rest = (before, h_qkv, q, k, v, out, h_o, y, r_between, between)
        ctx.save_for_backward(*first, *rest, *weights, *of_block, *adapters)
        return shaped(z.add_(y), (1, *z.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x and of every A and B; that of x only where something before the layer is trained."""
        x, r_before, before, h_qkv, q, k, v, out, h_o, y, r_between, between, *rest = ctx.saved_tensors
        told, dz, (documents, inner) = ctx.told, dz[0], ctx.counts
        weights, of_block = rest[:documents], rest[documents : documents + inner]
        d_between, block = _block_gradients(dz, between, of_block, told.block)
        dy = norm_gradient(d_between, y, told.norms[1][0], r_between).add_(dz)
        d_out, o = product_gradients([dy], out.flatten(1), h_o, told.o, wants_dx=True)
        assert d_out is not None
        dq, dk, dv = attention_gradients(d_out.view_as(out), q, k, v, out, weights, told.documents, told.scale)
        dq, dk = rotated((dq, dk), told.cos, told.sin, -1.0)
        dqkv, flows = [d.flatten(1) for d in (dq, dk, dv)], ctx.needs_input_grad[1]
        d_before, qkv = product_gradients(dqkv, before, h_qkv, told.qkv, wants_dx=flows)
        dx = norm_gradient(d_before, x, told.norms[0][0], r_before).add_(dy) if flows else None
        return None, None if dx is None else dx[None], *qkv, *o, *block


def _block_gradients(
    dy: torch.Tensor, x: torch.Tensor, kept: Sequence[torch.Tensor], parts: Sequence[Part]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`swiglu_gradients` of the pieces that went through the block, joined; the adapters' added up."""
    rows = [len(gate) for gate in kept[::4]]
    dxs, total = [], None
    for number, (one, other) in enumerate(zip(dy.split(rows), x.split(rows), strict=True)):
        dx, adapters = swiglu_gradients(one, other, kept[4 * number : 4 * number + 4], parts, wants_dx=True)
        dxs.append(dx)
        total = adapters if total is None else [a.add_(b) for a, b in zip(total, adapters, strict=True)]
    return dxs[0] if len(dxs) == 1 else torch.cat(dxs), total


def is_layer(module: Any) -> bool:
    """True for a decoder layer of two norms, attention and a feed-forward block, all of it fused already.

    What it computes with them is proved elsewhere (fused.py): some scale what they add.
    """
    if {name for name, _ in module.named_children()} != set(CHILDREN):
        return False
    if not all(getattr(getattr(module, name), "fused", False) for name in CHILDREN):
        return False
    if not (is_rotary(module.self_attn) and is_swiglu(module.mlp)):
        return False
    linear = [getattr(module.self_attn, f"{name}_proj") for name in "qkvo"]
    linear += [getattr(module.mlp, f"{name}_proj") for name in ("gate", "up", "down")]
    return all(getattr(layer, "fused", False) for layer in linear)


def fused_layer(kind: Any) -> Any:
    """A subclass of a model's own decoder layer that is one `LoraLayer` where all its parts would be fused."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        told = None if args else told_of(self, hidden_states, kwargs)
        if told is None:
            return kind.forward(self, hidden_states, *args, **kwargs)
        return LoraLayer.apply(told, hidden_states, *told.adapters)

    return fused_class(kind, forward)


def told_of(layer: Any, x: torch.Tensor, kwargs: Mapping[str, Any]) -> Told | None:
    """What `LoraLayer` needs for this call with x (1, T, H); None where a part would take another way.

    Asked at every call, for the reasons of `part_of`.
    """
    attention, block, positions = layer.self_attn, layer.mlp, kwargs.get("position_embeddings")
    if kwargs.get("past_key_values") is not None or not rotates_here(attention, x, positions):
        return None
    dropout = attention.attention_dropout if attention.training else 0.0
    if not attends_at_once(attention_of(attention), x, dropout, kwargs):
        return None
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if any(norm.weight.dtype != x.dtype for norm in norms):
        return None
    if any(map(has_listeners, (*norms, attention, block, block.act_fn))):
        return None
    qkv = parts_of((attention.q_proj, attention.k_proj, attention.v_proj), x)
    o = parts_of((attention.o_proj,), x)
    inner = parts_of((block.gate_proj, block.up_proj, block.down_proj), x)
    if qkv is None or o is None or inner is None:
        return None
    documents = pieces(kwargs["seq_lens"], kwargs.get("prefixes"))
    cos, sin = (angles[0] for angles in positions)
    weights = tuple((norm.weight, norm.variance_epsilon) for norm in norms)
    return Told(qkv, o, inner, weights, documents, cos, sin, attention.scaling)
