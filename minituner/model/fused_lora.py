"""LoRA's forward and backward pass as one function: five passes over the layer's output become one.

    autograd, part by part                          one function
    y  = x W^T                                      y  = x W^T
    u  = (x A^T) B^T          a second output       h  = x A^T                         (T, r), small
    v  = s * u                a third               y += s * h B^T                     added by the matrix product
    y' = y + v                a fourth

    backward: s * dy (a copy), dx in two parts      dh = s * dy B; dA = dh^T x; dB = s * dy^T h; dx = dy W + dh A

The numbers are the same up to the rounding of another order (1e-5, tested). W stays as it is, in float32 or in 4 bits;
a 4-bit W is made whole for each of its two products and forgotten. Used where nothing else happens in the layer: one
adapter, no dropout, no DoRA, one data type. Everything else takes peft's own path, at every call: merging, disabling
and switching adapters work as before. Source: the idea is Unsloth's (fast_lora.py). Lesson: notebook 05.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class LoraProduct(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T with gradients for x, A and B, and none for the frozen W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        quantization: Any,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """x (..., in), weight (out, in) or its 4-bit form, bias (out,), a (r, in), b (out, r) -> (..., out)."""
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, whole(weight, quantization, x.dtype), bias)
        h = flat @ a.T
        y.addmm_(h, b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, h)
        ctx.quantization, ctx.scale, ctx.shape = quantization, scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x, a and b; that of x only where something before this layer is trained."""
        flat, weight, a, b, h = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dh = (dy @ b).mul_(ctx.scale)
        da = dh.T @ flat if ctx.needs_input_grad[4] else None
        db = (h.T @ dy).mul_(ctx.scale).T if ctx.needs_input_grad[5] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ whole(weight, ctx.quantization, dy.dtype)).addmm_(dh, a).view(ctx.shape)
        return dx, None, None, None, da, db, None


def whole(weight: torch.Tensor, quantization: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a matrix (out, in): itself, or made from its 4 bits."""
    if quantization is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.view(-1, 1), quantization).to(dtype)


def is_plain(layer: Any) -> bool:
    """True for peft's LoRA over an ordinary or a 4-bit linear layer."""
    from peft.tuners.lora import Linear

    base = getattr(layer, "base_layer", None)
    if getattr(getattr(base, "weight", None), "quant_state", None) is not None:
        from peft.tuners.lora.bnb import Linear4bit

        return type(layer) is Linear4bit
    return type(layer) is Linear and type(base) is torch.nn.Linear and not layer.fan_in_fan_out


def fused_lora(kind: Any) -> Any:
    """A subclass of peft's layer whose forward is `LoraProduct` where that is all there is to do."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = nothing_but_lora(self, x) if not args and not kwargs else None
        if name is None:
            return kind.forward(self, x, *args, **kwargs)
        weight = self.base_layer.weight
        return LoraProduct.apply(
            x,
            weight,
            getattr(weight, "quant_state", None),
            self.base_layer.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__, "__module__": __name__})


def nothing_but_lora(layer: Any, x: torch.Tensor) -> str | None:
    """The one active adapter's name if this call is base + scaled product and nothing else; None otherwise."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1 or not torch.is_grad_enabled():
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant or torch.is_autocast_enabled(x.device.type):
        return None
    a, b, base = layer.lora_A[name], layer.lora_B[name], layer.base_layer
    if a.bias is not None or b.bias is not None or not isinstance(layer.lora_dropout[name], torch.nn.Identity):
        return None
    weight = base.weight
    computes_in = base.compute_dtype if getattr(weight, "quant_state", None) is not None else weight.dtype
    frozen = not weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
    alike = a.weight.dtype == b.weight.dtype == x.dtype == computes_in
    return name if frozen and alike and weight.numel() else None
