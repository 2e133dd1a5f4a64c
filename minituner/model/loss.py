"""The loss, computed only where there is something to learn.

Logits are the largest tensor of a small model: (T, vocabulary). Positions without a target need none, so their hidden
states never reach the head:

    hidden (1, T, H) --keep supervised--> (S, H) --head--> logits (S, V) --cross-entropy--> a sum, in fp32

From there on head.py goes in pieces, so that the logits of all S positions are never there at once.

The result is a *sum* over supervised tokens. Dividing by their number over the whole accumulation window (and over all
ranks) is the loop's job; dividing here, per micro-batch, is the fault that weights short micro-batches too heavily.
Lesson: notebook 05.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from minituner.data.collate import Batch, collate
from minituner.data.encoding import IGNORE
from minituner.model.attention import packed_kwargs
from minituner.model.head import Head


def loss_sum(model: Any, batch: Batch, implementation: str, head: Head | None = None) -> torch.Tensor:
    """Cross-entropy summed over the batch's supervised tokens, a float32 scalar.

    A batch without any keeps its place in the graph and is exactly 0, so it changes nothing; so does an empty batch
    (T = 0), the share of a rank for which no pack was left.

    Args:
        head: the model's halves (`find_head`); None goes through its own forward, with all logits (S, V) at once.
    """
    if not batch.input_ids.shape[1]:  # a token without a target: the rank takes part in whatever the others compute
        silent = (np.zeros(1, dtype=np.int64), np.full(1, IGNORE))
        batch = collate([[silent]]).to(batch.input_ids.device)
    keep = (batch.shift_labels[0] != IGNORE).nonzero().squeeze(1)
    targets = batch.shift_labels[0, keep]
    if not len(keep):
        keep = keep.new_zeros(1)
    return loss_at(model, batch, implementation, head, keep, targets)


def loss_at(
    model: Any, batch: Batch, implementation: str, head: Head | None, keep: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The same where the positions with a target are known already: `keep` (S,), and their `targets` (S,) or none."""
    if batch.prefixes is not None:  # a token's state is where its beginning was computed
        keep = batch.prefixes.rows[keep]
    if head is not None:
        hidden = head.hidden(batch, implementation)[keep]
        return head.loss_sum(hidden, targets) if len(targets) else hidden.float().sum() * 0.0
    selects = accepts_logits_to_keep(model)
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        **({"logits_to_keep": keep} if selects else {}),
        **packed_kwargs(batch, implementation),
    )
    logits = output.logits[0] if selects else output.logits[0, keep]
    if not len(targets):
        return logits.float().sum() * 0.0
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def states(model: Any, batch: Batch, implementation: str, head: Head | None) -> torch.Tensor:
    """What the loss is made of, (N, width) for every computed token: hidden states, or logits without a head."""
    if head is not None:
        return head.hidden(batch, implementation)
    borders = packed_kwargs(batch, implementation)
    return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **borders).logits[0]


def accepts_logits_to_keep(model: Any) -> bool:
    """True if the model can compute logits at chosen positions only (nearly all decoders in transformers 5 can)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
