"""SwiGLU without keeping what can be made again: the gate's activation.

    silu(g) * u         autograd keeps g, silu(g) and u            (T, intermediate) each
                        here g and u are kept                      a third less, silu(g) is computed again

The second silu costs one pass over one tensor; what is kept is the largest thing a layer keeps (6 MB of 18 for SmolLM2
and 1,024 tokens, in every one of 30 layers). Backward: du = dp * silu(g), dg = dp * u * silu'(g).
Source: Shazeer 2020 (GLU variants); the recomputation is Liger's. Lesson: notebook 05.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


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


def is_swiglu(module: Any) -> bool:
    """True for down(silu(gate(x)) * up(x)), as transformers writes it for Llama, Qwen, Mistral and their kin."""
    parts = {name for name, _ in module.named_children()}
    if parts != {"gate_proj", "up_proj", "down_proj", "act_fn"} or any(True for _ in module.parameters(recurse=False)):
        return False
    return type(module.act_fn) is torch.nn.SiLU or type(module.act_fn).__name__ == "SiLUActivation"


def fused_swiglu(kind: Any) -> Any:
    """A subclass of a model's own block that multiplies by `SiluProduct` where gradients are wanted."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return kind.forward(self, x)
        return self.down_proj(SiluProduct.apply(self.gate_proj(x), self.up_proj(x)))

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__, "__module__": __name__})
