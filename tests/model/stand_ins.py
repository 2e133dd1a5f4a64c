"""Stand-ins for the GPU kernels: they take the same arguments and compute the same thing, slowly, on any device.

They are put in place of torch's `varlen_attn` and flash-attn's `flash_attn_varlen_func`, so that everything around a
kernel (borders, windows, grouped heads, data types, padding of heads) is run and compared without a GPU. They insist on
what the real ones insist on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

HALF = (torch.float16, torch.bfloat16)


def allowed_pairs(cu: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Which query (row) may read which key: (T, T) boolean, from borders and a window (left, right), -1 for no end."""
    place = torch.arange(int(cu[-1]))
    document = torch.bucketize(place, cu[1:].long().cpu(), right=True)
    back = place[:, None] - place[None, :]
    left, right = window
    allowed = document[:, None] == document[None, :]
    allowed &= (back <= left) | (left < 0)
    return (allowed & ((-back <= right) | (right < 0))).to(cu.device)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scale: float, softcap: float = 0.0
) -> torch.Tensor:
    """Attention of (T, heads, head_dim) with everything written out, in float32 or finer."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.to(wide)).to(q.dtype)


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """For `torch.nn.attention.varlen.varlen_attn`."""
    _insist(query, key, value, cu_seq_q, max_q)
    assert cu_seq_k is cu_seq_q
    assert max_k == max_q
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert query.shape[2] % 8 == 0, "aten's flash kernel takes multiples of 8"
    return attend(query, key, value, allowed_pairs(cu_seq_q, window_size), scale or query.shape[2] ** -0.5)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: None = None,
) -> torch.Tensor:
    """For flash-attn 2's function of that name (2.8)."""
    _insist(q, k, v, cu_seqlens_q, max_seqlen_q)
    assert (window_size == (-1, -1)) or causal
    window = (window_size[0], 0 if causal else window_size[1])
    return attend(q, k, v, allowed_pairs(cu_seqlens_q, window), softmax_scale or q.shape[2] ** -0.5, softcap)


def _insist(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, longest: int) -> None:
    assert cu.dtype == torch.int32
    assert isinstance(longest, int), "a tensor would have to be read back from the device"
    assert longest == int(cu.diff().max())
    assert int(cu[0]) == 0
    assert int(cu[-1]) == q.shape[0] == k.shape[0] == v.shape[0]
    assert q.shape[2] == k.shape[2] == v.shape[2]
    assert q.dtype == k.dtype == v.dtype
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "the kernel reads heads as contiguous numbers"


@contextmanager
def in_place(*, float32: bool = False) -> Iterator[dict[str, list[torch.dtype]]]:
    """Within: the stand-ins are called instead of the kernels; gives the data types each was called with.

    With `float32` they take it too, so that results can be compared to 1e-5.
    """
    import torch.nn.attention.varlen as torch_varlen
    from transformers import modeling_flash_attention_utils as hf

    seen: dict[str, list[torch.dtype]] = {"varlen": [], "flash": []}

    def varlen_stand_in(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert float32 or query.dtype in HALF
        seen["varlen"].append(query.dtype)
        return varlen_attn(query, *args, **kwargs)

    def noted(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert float32 or q.dtype in HALF
        seen["flash"].append(q.dtype)
        return flash_attn_varlen_func(q, *args, **kwargs)

    noted.__signature__ = __import__("inspect").signature(flash_attn_varlen_func)  # transformers asks for it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_varlen, "varlen_attn", varlen_stand_in)
        patch.setattr(hf, "_lazy_imports", lambda *_, **__: (None, noted, None, hf._pad_input, hf._unpad_input))
        patch.setattr(hf, "_loaded_implementation", None)
        if float32:
            patch.setattr("minituner.model.attention_kernels.HALF", (*HALF, torch.float32))
        yield seen
