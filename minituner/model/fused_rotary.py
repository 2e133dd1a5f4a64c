"""Rotary positions in two passes, and query, key and value from one reading of x.

    transformers' own                                       here
    q * cos                          one new tensor         out  = q * cos
    rotate_half(q): -second, first   two more               out[first half]  -= q[second half] * sin
    ... * sin, and the sum           two more               out[second half] += q[first half]  * sin
    and its gradient as many again, and a few copies        the same with -sin: a turn back is the gradient of a turn

Query, key and value share x, h and dx if they are fused LoRA (fused_lora.py). The attention between rotation and output
is what the recipe chose, with everything it is told; on a CPU all documents' as one function (packed_attention.py).
Equal up to rounding (1e-5, proved on the model first; tested); in float32 only: in half precision the model's own
roundings are part of it. Layers that do more to q and k (norms), or turn other pairs, are left alone. Source: Su et al.
2021 (RoFormer). Lesson: notebook 05.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from minituner.model.attention_kernels import per_document_sdpa
from minituner.model.fused_lora import LoraProduct, a_and_b, fused_class, parts_of
from minituner.model.packed_attention import PackedAttention, pieces

# What attention may be told; more (Ministral 3: position_ids) is more than a rotation.
TOLD = {"self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "cache_position", "kwargs"}


class Rotation(torch.autograd.Function):
    """Turn each pair (x_i, x_{i + D/2}) by its token's angle; query and key, which turn alike, in one call."""

    @staticmethod
    def forward(ctx: Any, cos: torch.Tensor, sin: torch.Tensor, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """cos and sin (..., T, D) with both halves alike, each x (..., T, heads, D) -> the shape of each x."""
        ctx.save_for_backward(cos, sin)
        return rotated(xs, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of each x; the angles have none."""
        cos, sin = ctx.saved_tensors
        return None, None, *rotated(upstream, cos, sin, -1.0)


def rotated(
    xs: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, direction: float
) -> tuple[torch.Tensor, ...]:
    """x * cos + direction * (-second half, first half) * sin, (..., T, heads, D), of each x."""
    cos, (of_first, of_second) = cos.unsqueeze(-2), sin.unsqueeze(-2).chunk(2, -1)
    outs = []
    for x in xs:
        first, second = x.chunk(2, -1)
        out = torch.mul(x, cos, out=x.new_empty(x.shape))
        into_first, into_second = out.chunk(2, -1)
        into_first.addcmul_(second, of_first, value=-direction)
        into_second.addcmul_(first, of_second, value=direction)
        outs.append(out)
    return tuple(outs)


def is_rotary(module: Any) -> bool:
    """True for what looks like attention as Llama and Qwen2 have it; what it computes is proved (fused.py)."""
    names = {name for name, _ in module.named_children()}
    if names != {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return False
    told = set(inspect.signature(type(module).forward).parameters)
    if (
        "position_embeddings" not in told
        or not told <= TOLD
        or not all(hasattr(module, name) for name in ("head_dim", "scaling", "attention_dropout", "config"))
    ):
        return False
    more = [getattr(module, name, None) for name in ("sliding_window", "attn_logit_softcapping", "sinks")]
    # OLMo's clip_qkv is a limit beyond what the x of a proof reaches.
    more += [getattr(module.config, name, None) for name in ("sliding_window", "clip_qkv")]
    return all(value is None for value in more)


def fused_rotary(kind: Any) -> Any:
    """A subclass of a model's own attention that rotates by `Rotation` where gradients are wanted."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attend = attention_of(self) if past_key_values is None else None
        if attend is None or not rotates_here(self, hidden_states, position_embeddings):
            kwargs.update(attention_mask=attention_mask, past_key_values=past_key_values)  # not all have Llama's order
            return kind.forward(self, hidden_states, position_embeddings=position_embeddings, **kwargs)
        layers = (self.q_proj, self.k_proj, self.v_proj)
        parts = parts_of(layers, hidden_states)
        if parts is None:
            qkv = tuple(layer(hidden_states) for layer in layers)
        else:
            qkv = LoraProduct.apply(parts, hidden_states, *a_and_b(parts))
        q, k, v = (x.view(*x.shape[:-1], -1, self.head_dim) for x in qkv)
        q, k = Rotation.apply(*position_embeddings, q, k)
        dropout = self.attention_dropout if self.training else 0.0
        if attends_at_once(attend, q, dropout, kwargs):
            documents = pieces(kwargs["seq_lens"], kwargs.get("prefixes"))
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # x[0] would be copied into zeros on its way back
            return self.o_proj(PackedAttention.apply(q, k, v, documents, self.scaling).flatten(1)[None]), None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights

    return fused_class(kind, forward)


def attention_of(layer: Any) -> Any:
    """The attention function that the model's config names; None where the layer brings its own (eager)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get(layer.config._attn_implementation)


def attends_at_once(attend: Any, q: torch.Tensor, dropout: float, told: Mapping[str, Any]) -> bool:
    """Whether the documents of this row (1, N, heads, head_dim) are for `PackedAttention`."""
    alone = attend is per_document_sdpa and q.device.type == "cpu" and len(q) == 1
    return alone and not dropout and told.get("seq_lens") is not None


def rotates_here(layer: Any, x: torch.Tensor, positions: Any) -> bool:
    """Whether this call is one for `Rotation`: float32, with gradients, every number of a head turned."""
    if not torch.is_grad_enabled() or x.dtype != torch.float32 or positions is None:
        return False
    return positions[0].dtype == x.dtype and positions[0].shape[-1] == layer.head_dim
