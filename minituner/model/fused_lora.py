"""LoRA's forward and backward pass as one function: five passes over the layer's output become one.

    autograd, part by part                          one function
    y  = x W^T                                      y  = x W^T
    u  = (x A^T) B^T          a second output       h  = s * x A^T                     (T, r), small
    v  = s * u                a third               y += h B^T                         added by the matrix product
    y' = y + v                a fourth

    backward: s * dy (a copy), dx in two parts      dh = s * dy B; dA = dh^T x; dB = dy^T h; dx = dy W + dh A

Layers that read the same x (query, key and value; gate and up) share what can be shared: their A are one matrix, x is
read once for all of them, and each adds its part to the same dx.

The numbers are the same up to the rounding of another order (1e-5, tested). W stays as it is, in float32 or in 4 bits;
a 4-bit W is made whole for each of its two products and forgotten. Used where nothing else happens in the layer: one
adapter, no dropout, no DoRA, one data type. Everything else takes peft's own path, at every call: merging, disabling
and switching adapters work as before. Source: the idea is Unsloth's (fast_lora.py). Lesson: notebook 05.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from minituner.model.matmul import products_for

# What makes a call of a module more than its class's forward: a replaced forward, hooks, a compiled call.
LISTENERS = (
    "forward",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_compiled_call_impl",
)


class Part(NamedTuple):
    """One layer: y = x W^T + b + s (x A^T) B^T; W (out, in) or its 4-bit form, b (out,), A (r, in), B (out, r)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    quantization: Any = None

    @property
    def whole(self) -> torch.Tensor:
        """W as a matrix (out, in): itself, or made from its 4 bits."""
        if self.quantization is None:
            return self.weight
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight.view(-1, 1), self.quantization).to(self.a.dtype)


class LoraProduct(torch.autograd.Function):
    """The outputs of layers that read the same x, with gradients for x, A and B, and none for the frozen W and b."""

    @staticmethod
    def forward(ctx: Any, parts: Sequence[Part], x: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x (..., in) -> (..., out) of each part. After x come the parts' A and B, for autograd to know them."""
        flat = x.reshape(-1, x.shape[-1])
        ys, h = products(flat, parts)
        ctx.save_for_backward(flat, h, *(part.weight for part in parts), *a_and_b(parts))
        ctx.parts, ctx.shape = [(part.bias, part.scale, part.quantization) for part in parts], x.shape
        return tuple(shaped(y, (*x.shape[:-1], y.shape[-1])) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[Any, ...]:
        """The gradients of x and of every A and B; that of x only where something before this layer is trained."""
        flat, h, *rest = ctx.saved_tensors
        parts = saved_parts(rest, ctx.parts)
        dys = tuple(dy.reshape(-1, dy.shape[-1]) for dy in dys)
        dx, adapters = product_gradients(dys, flat, h, parts, wants_dx=ctx.needs_input_grad[1])
        return None, None if dx is None else dx.view(ctx.shape), *adapters


def shaped(y: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """y in another shape, for a function that returns it: autograd lets nobody change a view from there in place.

    Some models do (OLMo clamps its queries). y itself must not be used any more.
    """
    return torch.ops.aten._unsafe_view(y, shape)


def products(x: torch.Tensor, parts: Sequence[Part]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The outputs [(T, out)] of the parts for x (T, in), and h = s x A^T (T, r of all parts together)."""
    by = products_for(x)
    h = _scaled(by.linear(x, _all_a(parts)), parts)
    ys = [
        by.linear(x, part.whole, part.bias).addmm_(own, part.b.T)
        for part, own in zip(parts, h.split_with_sizes(_ranks(parts), -1), strict=True)
    ]
    return ys, h


def product_gradients(
    dys: Sequence[torch.Tensor], x: torch.Tensor, h: torch.Tensor, parts: Sequence[Part], *, wants_dx: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The gradient of x (T, in), or None if not wanted, and [dA, dB of each part], given those of the outputs."""
    by, ranks = products_for(x), _ranks(parts)
    dhs, dbs, dx = [], [], None
    for part, dy, own in zip(parts, dys, h.split_with_sizes(ranks, -1), strict=True):
        dhs.append(by.linear(dy, part.b.T))
        dbs.append(by.linear(own.T, dy.T).T)
        if wants_dx:
            dx = by.linear(dy, part.whole.T) if dx is None else by.add_linear(dx, dy, part.whole.T)
    dh = _scaled(dhs[0] if len(dhs) == 1 else torch.cat(dhs, -1), parts)
    if dx is not None:
        dx.addmm_(dh, _all_a(parts))
    das = by.linear(dh.T, x.T).split_with_sizes(ranks)
    return dx, [gradient for pair in zip(das, dbs, strict=True) for gradient in pair]


def a_and_b(parts: Sequence[Part]) -> list[torch.Tensor]:
    """A, B, A, B, ... of the parts."""
    return [matrix for part in parts for matrix in (part.a, part.b)]


def saved_parts(tensors: Sequence[torch.Tensor], others: Sequence[tuple[Any, float, Any]]) -> list[Part]:
    """The parts again: from all weights, then A, B, A, B, ..., and (bias, scale, quantization) of each."""
    count = len(others)
    return [
        Part(tensors[i], bias, tensors[count + 2 * i], tensors[count + 2 * i + 1], scale, quantization)
        for i, (bias, scale, quantization) in enumerate(others)
    ]


def _ranks(parts: Sequence[Part]) -> list[int]:
    return [part.a.shape[0] for part in parts]


def _all_a(parts: Sequence[Part]) -> torch.Tensor:
    return parts[0].a if len(parts) == 1 else torch.cat([part.a for part in parts])


def _scaled(h: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """Each part's columns of h (T, r of all parts together) times its scale, in place."""
    if len({part.scale for part in parts}) == 1:
        return h.mul_(parts[0].scale)
    for own, part in zip(h.split_with_sizes(_ranks(parts), -1), parts, strict=True):
        own.mul_(part.scale)
    return h


def is_plain(layer: Any) -> bool:
    """True for peft's LoRA over an ordinary or a 4-bit linear layer."""
    base = getattr(layer, "base_layer", None)
    if base is None:
        return False
    from peft.tuners.lora import Linear

    if getattr(getattr(base, "weight", None), "quant_state", None) is not None:
        from peft.tuners.lora.bnb import Linear4bit

        return type(layer) is Linear4bit
    ordinary = type(base) is torch.nn.Linear or getattr(base, "on_paper", False)  # plan/activations.py counts with it
    return type(layer) is Linear and ordinary and not layer.fan_in_fan_out


def fused_lora(kind: Any) -> Any:
    """A subclass of peft's layer whose forward is `LoraProduct` where that is all there is to do."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        parts = parts_of([self], x) if not args and not kwargs else None
        if parts is None:
            return kind.forward(self, x, *args, **kwargs)
        return LoraProduct.apply(parts, x, *a_and_b(parts))[0]

    return fused_class(kind, forward)


def parts_of(layers: Sequence[Any], x: torch.Tensor) -> list[Part] | None:
    """What `LoraProduct` needs of layers that all read x; None unless every one is fused and does nothing else."""
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or _has_any_global_hook():
        return None
    parts = []
    for layer in layers:
        part = part_of(layer, x.dtype) if getattr(layer, "fused", False) else None
        if part is None:
            return None
        parts.append(part)
    return parts


def fused_class(kind: Any, forward: Callable[..., Any]) -> Any:
    """A subclass of a layer's class `kind` of the same name that computes by `forward` and says that it is fused."""
    names = {"forward": forward, "fused": True, "__doc__": kind.__doc__, "__module__": forward.__module__}
    return type(kind.__name__, (kind,), names)


def has_listeners(module: Any) -> bool:
    """True if calling this module is more than its class's forward, so that a function must not do without the call."""
    state = module.__dict__
    return any(state.get(name) for name in LISTENERS)


def part_of(layer: Any, dtype: torch.dtype) -> Part | None:
    """The layer, if its call with x of this type is base + scaled product of the one active adapter and nothing else.

    Asked at every call, since peft merges, disables and switches adapters in place, and hooks come and go; so
    everything is read once. Layers that share a function are not called themselves: who listens to one is heard here.
    """
    active, adapters_a = layer.active_adapters, layer.lora_A
    if layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    name = active[0]
    if name not in adapters_a or name in layer.lora_variant:
        return None
    layer_a, layer_b, base = adapters_a[name], layer.lora_B[name], layer.base_layer
    if any(map(has_listeners, (layer, base, layer_a, layer_b))):
        return None
    if layer_a.bias is not None or layer_b.bias is not None:
        return None
    if not isinstance(layer.lora_dropout[name], torch.nn.Identity):
        return None
    a, b, weight, bias = layer_a.weight, layer_b.weight, base.weight, base.bias
    state = getattr(weight, "quant_state", None)
    computes_in = weight.dtype if state is None else base.compute_dtype
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    alike = a.dtype == b.dtype == dtype == computes_in
    return Part(weight, bias, a, b, layer.scaling[name], state) if frozen and alike and weight.numel() else None
