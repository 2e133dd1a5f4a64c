"""Attention that keeps packed documents apart, and the proof that it does.

Several documents share one row; each must attend to itself only:

    documents A A A B B        allowed  A . . . .
    cu_seqlens 0     3   5              A A . . .
                                        A A A . .
                                        . . . B .
                                        . . . B B

transformers builds such a mask from position_ids only if no mask and no cache are passed, and silently drops it
otherwise. So minituner registers attention functions of its own in transformers' AttentionInterface
(`attention_kernels.py`) and chooses among them and flash-attn's (`attention_choice.py`). Here is what the rest of the
program calls: register them, tell a model where documents begin (`packed_kwargs`), step back for generation, and prove
the isolation at step 0 on the very model that is trained (`assert_isolated`). Lesson: notebooks 04 and 06.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minituner.errors import MinitunerError
from minituner.model.attention_choice import (
    FLASH_2,
    FLASH_3,
    PER_DOCUMENT_EAGER,
    PER_DOCUMENT_SDPA,
    VARLEN,
    choose,
    facts_here,
    needs_of,
)
from minituner.model.attention_kernels import per_document_sdpa, varlen

__all__ = [
    "FLASH",
    "OURS",
    "PER_DOCUMENT_EAGER",
    "PER_DOCUMENT_SDPA",
    "ULYSSES",
    "VARLEN",
    "assert_isolated",
    "choose",
    "facts_here",
    "for_generation",
    "needs_of",
    "packed_kwargs",
    "per_document_sdpa",
    "register",
    "varlen",
]
FLASH = (FLASH_2, FLASH_3)
OURS = (PER_DOCUMENT_SDPA, PER_DOCUMENT_EAGER, VARLEN)
ULYSSES = "ulysses"  # one of the others inside an all-to-all, see train/sequence_parallel.py
PROOF = (7, 1, 9)  # documents of the proof: one of a single token, the rest longer than the window it is made with
WINDOW = 5
# How far logits of packed and of separate documents may lie apart, relative to their size (root mean squares). The
# kernels add in another order; in half precision that is felt in every layer.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Experts multiply the tokens that were sent to them: another document changes how many, and with it the order of
# additions, though not what is added.
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def register() -> None:
    """Make our attention functions known to transformers (doing it twice is harmless)."""
    from transformers import AttentionInterface

    AttentionInterface.register(PER_DOCUMENT_SDPA, per_document_sdpa)
    AttentionInterface.register(PER_DOCUMENT_EAGER, per_document_sdpa)
    AttentionInterface.register(VARLEN, varlen)


def packed_kwargs(batch: Any, implementation: str) -> dict[str, Any]:
    """Keyword arguments that tell the model's attention layers where documents begin.

    Made once per batch from Python numbers, so that no layer has to read a length back from the device.
    """
    shared = {} if batch.prefixes is None else {"prefixes": batch.prefixes}
    if implementation in (PER_DOCUMENT_SDPA, PER_DOCUMENT_EAGER):
        return {"seq_lens": batch.seq_lens, **shared}
    longest, cu = max(batch.seq_lens, default=0), batch.cu_seqlens
    if implementation == VARLEN:
        return {"cu_seq_lens_q": cu, "max_length_q": longest, **shared}
    if implementation in FLASH:
        return {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest}
    return {}


@contextmanager
def for_generation(model: Any) -> Iterator[None]:
    """Within: transformers' own attention instead of ours, for answering with a cache (one document, one row)."""
    if model.config._attn_implementation not in (*OURS, ULYSSES):
        yield
        return
    with _transformers_own(model):
        yield


@contextmanager
def _transformers_own(model: Any) -> Iterator[None]:
    """Within: transformers' SDPA; or eager where soft-capping or sinks are needed, which its SDPA does not know."""
    before, needs = model.config._attn_implementation, needs_of(model.config)
    written_out = needs.softcap or needs.sinks or not getattr(model, "_supports_sdpa", True)
    model.set_attn_implementation("eager" if written_out else "sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def assert_isolated(model: Any, implementation: str, vocab_size: int) -> float:
    """Prove on this model that packed documents are as if alone; returns the largest influence of one on another.

    It must be exactly 0 (in models with experts: no more than rounding).

    Three short documents A B C are packed, B of one token, the others longer than the sliding window (which is made
    short for the proof). Then

        A is replaced    B and C must not move at all    (no leak forwards)
        C is replaced    A and B must not move at all    (causal, no leak backwards)
        each alone       the same logits, up to rounding, by transformers' own attention: positions restart, windows,
                         soft-capping and sinks are what the model was made with

    Raises:
        MinitunerError: one of these does not hold; UsageError: layers that no attention function can isolate.
    """
    # Layers that keep a state fail the proof as well; this says why.
    choose("auto", needs=needs_of(model.config), one_document_rows=False, device="cpu")
    device = next(model.parameters()).device
    first, single, last = _documents(vocab_size)
    was_training = model.training
    model.eval()
    try:
        with _short_windows(model):
            packed = _packed_logits(model, implementation, [first, single, last], device)
            new_first = _packed_logits(model, implementation, [(first + 1) % vocab_size, single, last], device)
            new_last = _packed_logits(model, implementation, [first, single, (last + 1) % vocab_size], device)
            with _transformers_own(model):
                alone = torch.cat([_logits_alone(model, d, device) for d in (first, single, last)])
    finally:
        model.train(was_training)
    forwards = packed[PROOF[0] :] - new_first[PROOF[0] :]
    backwards = packed[: -PROOF[2]] - new_last[: -PROOF[2]]
    influence = max(float(forwards.abs().max()), float(backwards.abs().max()))
    if not torch.isfinite(packed).all():
        raise MinitunerError(
            "the model's logits are not finite before the first step",
            why="damaged weights, or a data type with too small a range",
            fix="model.dtype=float32, or fetch the model anew",
        )
    dtype = computes_in(model)
    allowed = ROUNDING[dtype] * float(packed.abs().max()) if _has_experts(model) else 0.0
    if influence > allowed:
        raise MinitunerError(
            f"packed documents see each other: changing one moved its neighbour's logits by {influence:.3g}",
            why=f"attention {implementation!r} does not isolate documents in this model",
            fix="data.packing=none with train.per_device_batch_size=1, or another model.attention",
        )
    apart = float((packed - alone).square().mean().sqrt() / alone.square().mean().sqrt().clamp_min(1e-12))
    if not apart <= TOLERANCE[dtype]:
        raise MinitunerError(
            f"packed documents are not what they are alone: logits differ by {apart:.2%} of their size, and"
            f" {TOLERANCE[dtype]:.2%} is allowed",
            why=f"attention {implementation!r} computes something else than this model was made with",
            fix="data.packing=none with train.per_device_batch_size=1 and model.attention=eager",
        )
    return influence


def _documents(vocab_size: int) -> list[torch.Tensor]:
    """Three documents of PROOF tokens, different from each other and the same every time."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (n,), generator=draw) for n in PROOF]


def _packed_logits(
    model: Any, implementation: str, documents: list[torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Logits of the documents in one row, (T, vocabulary) float32."""
    from minituner.data.collate import collate

    batch = collate([[(d.numpy(), d.numpy()) for d in documents]]).to(device)
    out = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        **packed_kwargs(batch, implementation),
    )
    return out.logits[0].float()


def _logits_alone(model: Any, document: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Logits of one document in a row of its own, (n, vocabulary) float32."""
    # By `forward`: of a model that shares its rows among ranks, that is the model itself, on this rank alone.
    return model.forward(input_ids=document[None].to(device), use_cache=False).logits[0].float()


@contextmanager
def _short_windows(model: Any) -> Iterator[None]:
    """Within: sliding windows see WINDOW tokens, so that a proof of a few tokens goes beyond them.

    A window of 4096 could be shown only with documents longer than that, which costs minutes on a CPU; the code that is
    run is the same for any size. Layers keep their window in an attribute, or read the config's.
    """
    holders = [model.config.get_text_config(), *model.modules(), *(m.config for m in model.modules() if _config_of(m))]
    changed = []
    for holder in holders:
        window = getattr(holder, "sliding_window", None)
        if isinstance(window, int) and not isinstance(window, bool) and window > WINDOW:
            changed.append((holder, window))
            holder.sliding_window = WINDOW
    try:
        yield
    finally:
        for holder, window in changed:
            holder.sliding_window = window


def _config_of(module: torch.nn.Module) -> bool:
    return getattr(module, "config", None) is not None


def computes_in(model: Any) -> torch.dtype:
    """The coarsest floating-point type among the parameters and the config (quantised weights)."""
    found = {parameter.dtype for parameter in model.parameters()} | {getattr(model.config, "dtype", None)}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in found), torch.float32)


def _has_experts(model: Any) -> bool:
    config = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)
