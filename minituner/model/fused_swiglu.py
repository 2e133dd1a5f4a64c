"""SwiGLU without keeping what can be made again: the gate's activation, and with LoRA its product as well.

    silu(g) * u                 autograd keeps g, silu(g) and u    (T, intermediate) each; here g and u are kept
    down(silu(g) * u)           the adapter of `down` keeps silu(g) * u for its own gradient; here it is made again

Each of them is the largest thing a layer keeps (6 MB for SmolLM2 and 1,024 tokens, in every one of 30 layers), and
making it again costs two passes over one tensor. Where gate, up and down are all nothing but fused LoRA, the block is
one function: gate and up share x, h and dx. Backward: du = dp * silu(g), dg = dp * u * silu'(g). Long rows go through
it in pieces on a CPU, since tokens do not meet here: a piece stays in the cache between its passes, and in memory that
the C library keeps (beyond 32 MB it asks the system for fresh pages every time).
Source: Shazeer 2020 (GLU variants); the recomputation is Liger's, the one function Unsloth's. Lesson: notebook 05.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minituner.model.fused_lora import (
    Part,
    a_and_b,
    fused_class,
    has_listeners,
    parts_of,
    product_gradients,
    products,
    saved_parts,
    shaped,
)

PIECE = 2**24  # bytes of gate, and of up, at a time on a CPU: 2,730 tokens of SmolLM2 in float32


class SiluProduct(torch.autograd.Function):
    """silu(gate) * up, elementwise, any shape."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """gate and up of one shape and data type -> the same shape."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of gate and up."""
        gate, up = ctx.saved_tensors
        du = F.silu(gate).mul_(upstream)
        return torch.ops.aten.silu_backward(upstream * up, gate), du


class LoraSwiglu(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) of three layers that are base + adapter, with gradients for x and the adapters."""

    @staticmethod
    def forward(ctx: Any, parts: Sequence[Part], x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        """x (..., H) -> (..., H); parts are gate, up and down. After x come their A and B, for autograd."""
        flat = x.reshape(-1, x.shape[-1])
        y, kept = swiglu(flat, parts)
        ctx.save_for_backward(flat, *kept, *(part.weight for part in parts), *a_and_b(parts))
        ctx.parts, ctx.shape = [(part.bias, part.scale, part.quantization) for part in parts], x.shape
        return shaped(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        """The gradients of x and of every A and B; that of x only where something before the block is trained."""
        flat, gate, up, h, h_down, *rest = ctx.saved_tensors
        parts, dy = saved_parts(rest, ctx.parts), dy.reshape(-1, dy.shape[-1])
        wants_dx = ctx.needs_input_grad[1]
        dx, adapters = swiglu_gradients(dy, flat, (gate, up, h, h_down), parts, wants_dx=wants_dx)
        return None, None if dx is None else dx.view(ctx.shape), *adapters


def swiglu(x: torch.Tensor, parts: Sequence[Part]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """down(silu(gate(x)) * up(x)) of x (T, H), and what its gradient needs besides x: gate, up and the two h."""
    (gate, up), h = products(x, parts[:2])
    (y,), h_down = products(F.silu(gate).mul_(up), parts[2:])
    return y, (gate, up, h, h_down)


def swiglu_gradients(
    dy: torch.Tensor, x: torch.Tensor, kept: Sequence[torch.Tensor], parts: Sequence[Part], *, wants_dx: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The gradient of x (T, H), or None if not wanted, and [dA, dB of gate, up and down]."""
    gate, up, h, h_down = kept
    active = F.silu(gate)
    inner, of_down = product_gradients([dy], active * up, h_down, parts[2:], wants_dx=True)
    assert inner is not None
    du = active.mul_(inner)
    dg = torch.ops.aten.silu_backward(inner.mul_(up), gate)
    dx, adapters = product_gradients([dg, du], x, h, parts[:2], wants_dx=wants_dx)
    return dx, [*adapters, *of_down]


def rows_at_a_time(x: torch.Tensor, parts: Sequence[Part]) -> int:
    """How many tokens of x (..., H) go through the block together; all of them where memory is not a CPU's."""
    if x.device.type != "cpu":
        return x[..., 0].numel()
    return max(1, PIECE // (x.element_size() * parts[0].b.shape[0]))


def is_swiglu(module: Any) -> bool:
    """True for down(silu(gate(x)) * up(x)), as transformers writes it for Llama, Qwen, Mistral and their kin."""
    parts = {name for name, _ in module.named_children()}
    if parts != {"gate_proj", "up_proj", "down_proj", "act_fn"} or any(True for _ in module.parameters(recurse=False)):
        return False
    return type(module.act_fn) is torch.nn.SiLU or type(module.act_fn).__name__ == "SiLUActivation"


def fused_swiglu(kind: Any) -> Any:
    """A subclass of a model's own block that keeps gate and up only, where gradients are wanted."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or has_listeners(self.act_fn):
            return kind.forward(self, x)
        parts = parts_of([self.gate_proj, self.up_proj, self.down_proj], x)
        if parts is None:
            return self.down_proj(SiluProduct.apply(self.gate_proj(x), self.up_proj(x)))
        pieces = x.flatten(0, -2).split(rows_at_a_time(x, parts))
        done = [LoraSwiglu.apply(parts, piece, *a_and_b(parts)) for piece in pieces]
        return (done[0] if len(done) == 1 else torch.cat(done)).view(x.shape)

    return fused_class(kind, forward)
