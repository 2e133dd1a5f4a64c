"""Two attention functions that keep packed documents apart: one that runs everywhere, and one for GPUs.

                       per_document_sdpa                        varlen
    borders come as    seq_lens [3, 2], Python numbers          cu_seq_lens_q [0, 3, 5], int32 on the device
    calls              one causal SDPA for each document        one kernel for the whole row
    query, inside      (1, heads, n, head_dim)                  (T, heads, head_dim)
    runs               on anything torch runs on, any dtype     on CUDA, float16 and bfloat16

    A A A B B          allowed  A . . . .        Both compute this and nothing else, so the cost is the sum of the
                                A A . . .        squares of the lengths, and never the square of their sum. Which one
                                A A A . .        is used, and why, is decided in `attention_choice.py`.
                                . . . B .
                                . . . B B

Both have the signature of transformers' AttentionInterface, and take `prefixes` besides (shared_prefixes.py).
Lesson: notebook 06.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from minituner.errors import MinitunerError
from minituner.model.shared_prefixes import over_whole_row

HALF = (torch.float16, torch.bfloat16)


@over_whole_row
def per_document_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    seq_lens: list[int] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a packed row.

    Args:
        query: (1, heads, T, head_dim); key and value: (1, key_value_heads, T, head_dim).
        seq_lens: document lengths that add up to T (or `cu_seq_lens_q`, their running sum from 0).
        sliding_window: how many tokens back a token sees, itself included; None is all.
        softcap: squashes scores with tanh (Gemma 2).
        s_aux: (heads,) attention sinks, a learned score that takes probability and gives no value (gpt-oss).

    Returns:
        (1, T, heads, head_dim) and None, as AttentionInterface wants it.

    Raises:
        MinitunerError: called without document borders, which would let documents see each other, or with several rows.
    """
    if query.shape[0] != 1:
        raise MinitunerError(
            f"per-document attention was called with {query.shape[0]} rows",
            why="its documents' lengths are those of one packed row",
            fix="one row at a time, or model.attention=sdpa",
        )
    if seq_lens is None:
        if cu_seq_lens_q is None:
            raise _no_borders("per-document attention")
        seq_lens = cu_seq_lens_q.diff().tolist()
    if query.dtype != value.dtype or key.dtype != value.dtype:  # rotary positions or norms computed in float32
        query, key, value = to_compute_dtype(module, query, key, value)
    documents = zip(query.split(seq_lens, 2), key.split(seq_lens, 2), value.split(seq_lens, 2), strict=True)
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    if softcap is not None or sinks is not None:
        out = [_written_out(q, k, v, scaling, dropout, sliding_window, softcap, sinks) for q, k, v in documents]
        return torch.cat(out, dim=2).transpose(1, 2), None
    outputs = [_one_document(q, k, v, scaling, dropout, sliding_window) for q, k, v in documents]
    return torch.cat(outputs)[None], None


def _one_document(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """(1, heads, n, head_dim) and (1, key_value_heads, n, head_dim) -> (n, heads, head_dim)."""
    mask = _window(q.shape[2], sliding_window, q.device)
    heads, groups = q.shape[1], k.shape[1]
    if q.device.type == "cpu":
        # Heads that share a key are a row of a batch, and all of them see the same tensor (stride 0): with enable_gqa
        # torch would copy keys and values for each head. 10 to 14% of attention's time (assets/benchmarks/README.md).
        q = q[0].unflatten(0, (groups, -1))
        k, v = (x[0, :, None].expand(-1, heads // groups, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.permute(2, 0, 1, 3).flatten(1, 2)


@over_whole_row
def varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The same by torch's variable-length kernel: one call for the whole row, however many documents.

    Args:
        query: (1, heads, T, head_dim); key and value: (1, key_value_heads, T, head_dim). float32 is cast to the data
            type the model computes in.
        cu_seq_lens_q: (documents + 1,) int32 on the same device, where each document begins.
        max_length_q: the longest document, a Python number: reading it from the device would stop the GPU per layer.
        sliding_window: how many tokens back a token sees, itself included; None is all.

    Returns:
        (1, T, heads, head_dim) in the compute dtype, and None.

    Raises:
        MinitunerError: without document borders, or with what the kernel has no argument for (dropout, soft-capping,
            sinks): it would leave them out without a word.

    Source: torch/nn/attention/varlen.py (torch 2.13).
    """
    from torch.nn.attention.varlen import varlen_attn

    if cu_seq_lens_q is None or max_length_q is None:
        raise _no_borders("variable-length attention")
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    wanted = {"attention dropout": dropout > 0, "soft-capping": softcap is not None, "sinks": sinks is not None}
    if missing := [name for name, there in wanted.items() if there]:
        raise MinitunerError(
            f"varlen attention cannot do {' and '.join(missing)}, which this model asks for",
            why="torch's kernel has no argument for it",
            fix="model.attention=per_document_sdpa",
        )
    query, key, value = to_compute_dtype(module, query, key, value)
    heads, head_dim, value_dim = query.shape[1], query.shape[-1], value.shape[-1]
    # The kernel wants one head size for all three, a multiple of 8. Zeros beyond the real ones change no score.
    padded = -(-max(head_dim, value_dim) // 8) * 8
    q, k, v = (F.pad(x[0].transpose(0, 1), (0, padded - x.shape[-1])) for x in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=head_dim**-0.5 if scaling is None else scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),  # (left, right); right 0 is causal
        enable_gqa=heads != key.shape[1],
    )
    return out[None, :, :, :value_dim], None


def to_compute_dtype(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, key and value in the one half-precision type that this layer computes in.

    Adapters and norms kept in float32, and rotary positions computed in it, make float32 out of a bfloat16 model's
    query and key (flash-attention issue 398). What the layer computes in is read, in this order, from autocast, from
    whichever of the three still has it, from the layer's weights, and from the model's config (quantised weights).

    Raises:
        MinitunerError: nothing says a half-precision type: the model computes in float32.
    """
    tensors = (query, key, value)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        found = [torch.get_autocast_dtype(device)]
    else:
        linear = [layer.weight.dtype for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
        config = getattr(getattr(module, "config", None), "dtype", None)
        found = [dtype for dtype in (*(t.dtype for t in tensors), *linear, config) if dtype in HALF]
    if not found:
        raise MinitunerError(
            f"this attention needs float16 or bfloat16, and the model computes in {str(query.dtype)[6:]}",
            fix="model.dtype=bfloat16, or model.attention=per_document_sdpa",
        )
    query, key, value = (t.to(found[0]) for t in tensors)
    return query, key, value


def _no_borders(what: str) -> MinitunerError:
    return MinitunerError(
        f"{what} was called without document borders",
        why="a model that does not pass its keyword arguments on to its attention layers",
        fix="set data.packing=none and model.attention=sdpa for this model",
    )


def _window(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """Boolean (length, length) mask of a causal sliding window; None where the window holds everything."""
    if sliding_window is None or length <= sliding_window:
        return None
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (back >= 0) & (back < sliding_window)


def _written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One document with everything written out, for what the fused kernel cannot do (soft-capping, sinks)."""
    length, repeat = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = _window(length, sliding_window, q.device)
    if allowed is None:
        allowed = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, length, 1).to(scores.dtype)
        weights = torch.cat([scores, column], -1).softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32)
    return F.dropout(weights.to(q.dtype), dropout) @ v
