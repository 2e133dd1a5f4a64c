"""RMSNorm's forward and backward pass as one function: four passes over memory each, where autograd takes nine.

    y  = x * r * w            r = 1 / sqrt(mean(x^2) + eps), one number a token
    dx = r * g - x * r^3 * mean(g * x)          g = dy * w

Kept: x, which the residual keeps anyway, and r. Only where w is frozen (LoRA), and in float32 only: in half precision
the model's own norm is left, as its roundings are part of the model. Source: Zhang and Sennrich 2019 (RMSNorm).
Lesson: notebook 05.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from minituner.model.fused_lora import fused_class


class RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension, float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x (..., H), weight (H,) -> (..., H)."""
        y, r = normed(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of x; the weight has none."""
        return norm_gradient(dy, *ctx.saved_tensors), None, None


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) * weight (..., H), and 1 / rms(x) (..., 1), of x (..., H)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * r).mul_(weight), r


def norm_gradient(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The gradient of x, a new tensor, given that of the normed x, both (..., H), and r of `normed`."""
    dx = dy * weight
    share = torch.linalg.vecdot(dx, x).unsqueeze(-1).mul_(r.pow(3))
    return dx.mul_(r).addcmul_(x, share, value=-1 / x.shape[-1])


def is_rms_norm(module: Any) -> bool:
    """True for what transformers calls an RMSNorm: one frozen weight, one epsilon, nothing inside.

    What it computes is proved elsewhere (fused.py): some multiply by 1 + weight.
    """
    names = {name for name, _ in module.named_parameters()}
    named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return named and names == {"weight"} and not module.weight.requires_grad


def fused_norm(kind: Any) -> Any:
    """A subclass of a model's own RMSNorm that computes by `RmsNorm` where gradients are wanted."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        half = hidden_states.dtype != torch.float32 or self.weight.dtype != torch.float32
        if half or not torch.is_grad_enabled():
            return kind.forward(self, hidden_states)
        return RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)

    return fused_class(kind, forward)
