"""Attention that keeps packed documents apart.

Several documents share one row; each must attend to itself only:

    documents A A A B B        allowed  A . . . .
    cu_seqlens 0     3   5              A A . . .
                                        A A A . .
                                        . . . B .
                                        . . . B B

transformers builds such a mask from position_ids only if no mask and no cache are passed, and silently drops it
otherwise. So minituner registers an attention function of its own in transformers' AttentionInterface. It is told where
documents begin (`cu_seq_lens_q`, the key flash-attention uses) and calls a causal kernel for each document, which also
costs less: the sum of the squares of the lengths, and never the square of their sum. At step 0 the training loop
proves the isolation on its own model (`assert_isolated`). Lesson: notebook 04.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from minituner.errors import MinitunerError, UsageError

PER_DOCUMENT_SDPA = "per_document_sdpa"
FLASH = ("flash_attention_2", "flash_attention_3")


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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a packed row.

    Args:
        query: (1, heads, T, head_dim); key and value: (1, key_value_heads, T, head_dim).
        seq_lens: document lengths that add up to T (or `cu_seq_lens_q`, their running sum from 0).
        sliding_window: how many tokens back a token sees, itself included; None is all.
        softcap: squashes scores with tanh (Gemma 2).

    Returns:
        (1, T, heads, head_dim) and None, as AttentionInterface wants it.

    Raises:
        MinitunerError: called without document borders, which would let documents see each other.
    """
    if seq_lens is None:
        if cu_seq_lens_q is None:
            raise MinitunerError(
                "per-document attention was called without document borders",
                why="a model that does not pass its keyword arguments on to its attention layers",
                fix="set data.packing=none and model.attention=sdpa for this model",
            )
        seq_lens = cu_seq_lens_q.diff().tolist()
    if softcap is not None or getattr(module, "sinks", None) is not None:
        out = [
            _eager(module, q, k, v, scaling, dropout, sliding_window, softcap)
            for q, k, v in zip(query.split(seq_lens, 2), key.split(seq_lens, 2), value.split(seq_lens, 2), strict=True)
        ]
        return torch.cat(out, dim=2).transpose(1, 2), None
    gqa = query.shape[1] != key.shape[1]
    outputs = []
    for q, k, v in zip(query.split(seq_lens, 2), key.split(seq_lens, 2), value.split(seq_lens, 2), strict=True):
        mask = _window(q.shape[2], sliding_window, q.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """Boolean (length, length) mask of a causal sliding window; None where the window holds everything."""
    if sliding_window is None or length <= sliding_window:
        return None
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (back >= 0) & (back < sliding_window)


def _eager(
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One document with everything written out, for what the fused kernel cannot do (soft-capping, sinks)."""
    length, repeat = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = _window(length, sliding_window or length + 1, q.device)
    if allowed is None:
        allowed = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    sinks = getattr(module, "sinks", None)
    if sinks is not None:  # a learned score that takes probability and gives no value (gpt-oss)
        column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, length, 1).to(scores.dtype)
        weights = torch.cat([scores, column], -1).softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32)
    return F.dropout(weights.to(q.dtype), dropout) @ v


def register() -> None:
    """Make `per_document_sdpa` known to transformers (doing it twice is harmless)."""
    from transformers import AttentionInterface

    AttentionInterface.register(PER_DOCUMENT_SDPA, per_document_sdpa)


def choose(wanted: str, *, one_document_rows: bool, device: str) -> tuple[str, str]:
    """The attention implementation for these settings, and a sentence that says why.

    Args:
        one_document_rows: every row holds one document (no packing, one record per micro-batch).

    Raises:
        UsageError: the wanted one would let packed documents see each other, or is not installed.
    """
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    installed = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if wanted in installed and not (installed[wanted]() and device == "cuda"):
        raise UsageError(
            f"model.attention={wanted} needs a CUDA GPU and the flash-attn package",
            fix="model.attention=auto uses what this machine has",
            next_command="pip install 'minituner[flash]' --no-build-isolation",
        )
    if wanted in ("sdpa", "eager") and not one_document_rows:
        raise UsageError(
            f"model.attention={wanted} with several documents in a row: they would see each other",
            why="these kernels know one causal mask for the whole row",
            fix="model.attention=auto, or data.packing=none with train.per_device_batch_size=1",
        )
    if wanted != "auto":
        return wanted, "as the recipe says"
    for name, available in installed.items():
        if device == "cuda" and available():
            return name, "flash-attn is installed and isolates documents by cu_seqlens"
    return PER_DOCUMENT_SDPA, "one causal SDPA call per document; flash-attn is not installed or there is no GPU"


def packed_kwargs(batch: Any, implementation: str) -> dict[str, Any]:
    """Keyword arguments that tell the model's attention layers where documents begin."""
    if implementation == PER_DOCUMENT_SDPA:
        return {"seq_lens": batch.seq_lens}
    if implementation in FLASH:
        longest = max(batch.seq_lens, default=0)
        cu = batch.cu_seqlens
        return {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest}
    return {}


@contextmanager
def for_generation(model: Any) -> Iterator[None]:
    """Within: plain SDPA, for answering with a cache (one document, one row)."""
    before = model.config._attn_implementation
    if before != PER_DOCUMENT_SDPA:
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def assert_isolated(model: Any, implementation: str, vocab_size: int) -> float:
    """Prove on this model that a document does not see its neighbour; returns the largest difference (must be 0).

    Two short documents are packed; the first is changed, and the logits of the second must not move at all.

    Raises:
        MinitunerError: they moved.
    """
    import numpy as np

    from minituner.data.collate import collate

    device = next(model.parameters()).device
    tokens = np.arange(16) % max(vocab_size - 1, 1)
    was_training = model.training
    model.eval()
    try:
        logits = []
        for change in (0, 1):
            first = (tokens[:7] + change) % vocab_size
            batch = collate([[(first, first), (tokens[7:], tokens[7:])]]).to(device)
            out = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                **packed_kwargs(batch, implementation),
            )
            logits.append(out.logits[:, 7:])
    finally:
        model.train(was_training)
    difference = float((logits[0] - logits[1]).abs().max())
    if difference:
        raise MinitunerError(
            f"packed documents see each other: changing one moved its neighbour's logits by {difference:.3g}",
            why=f"attention {implementation!r} does not isolate documents in this model",
            fix="data.packing=none with train.per_device_batch_size=1, or another model.attention",
        )
    return difference
