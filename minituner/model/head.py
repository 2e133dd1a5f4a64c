"""The output head and its loss in pieces, so that the largest tensor of a small model is never there as a whole.

A vocabulary of 49,152 makes one position's logits 85 times as large as its hidden state (576 wide). Cross-entropy needs
them once, and what the backward pass needs of them has the size of the hidden states:

    hidden (S, H)  ->  for each block of rows and words:  logits  ->  loss            logits are forgotten
                                                exp(logits)  ->  @ W  ->  d loss / d hidden (S, H), kept

Frozen head (LoRA): no gradient of W is wanted, so that is all, and nothing is computed twice. It goes block by block
through the vocabulary, as attention goes through its keys: sums so far are kept relative to the largest logit so far.
Trainable head: pieces of rows, computed again in the backward pass (activation checkpointing), only where the logits
would pass `LOGITS_BYTES`.

Used only where the model's logits are proved to be this head over its decoder's last hidden state, on the model itself
(`find_head`). Models that scale or cap their logits (Gemma 2, Cohere, Granite) fail that proof and keep their own
forward; so do models whose parameters lie in pieces on several ranks (ZeRO-3), because nobody but their own forward
gathers them. Sources: the chunked losses of torchtitan and TRL; cut cross-entropy (Wijmans et al. 2024).
Lesson: notebook 05.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minituner.data.collate import Batch, collate, slice_of_row
from minituner.model.attention import packed_kwargs
from minituner.model.matmul import products_for

LOGITS_BYTES = 2**26  # of one piece before a trained head, 64 MB: 341 positions of SmolLM2, 110 of Qwen2.5
ROWS, WORDS = 1_024, 2_048  # of one block before a frozen head: 8 MB, which a CPU's cache holds; elsewhere 8 times that


@dataclass(frozen=True)
class Head:
    """A model's two halves: everything up to the last hidden state, and the layer that makes logits of it."""

    decoder: Any
    linear: Any
    frozen: bool

    def hidden(self, batch: Batch, implementation: str) -> torch.Tensor:
        """The last hidden state of the batch's row, (T, H)."""
        output = self.decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **packed_kwargs(batch, implementation),
        )
        return output.last_hidden_state[0]

    def loss_sum(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of `targets` (S,) given `hidden` (S, H), summed, a float32 scalar."""
        if self.frozen:
            words = WORDS if hidden.device.type == "cpu" else 8 * WORDS
            return FrozenHeadLoss.apply(hidden, self.linear.weight, self.linear.bias, targets, ROWS, words)
        rows = max(1, LOGITS_BYTES // (4 * self._vocabulary(hidden)))
        pieces = list(zip(hidden.split(rows), targets.split(rows), strict=True))
        if len(pieces) == 1:
            return _piece_loss(self.linear, *pieces[0])
        losses = [checkpoint(_piece_loss, self.linear, *piece, use_reentrant=False) for piece in pieces]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _vocabulary(self, hidden: torch.Tensor) -> int:
        return self.linear(hidden[:1]).shape[-1]  # a head with an adapter or a second copy says it nowhere else


def _piece_loss(linear: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(linear(hidden).float(), targets, reduction="sum")


class FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy over a head without gradient; the gradient of `hidden` is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rows: int,
        words: int,
    ) -> torch.Tensor:
        """hidden (S, H), weight (V, H), bias (V,), targets (S,) int64 -> a float32 scalar; rows x words at a time."""
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            target = targets[piece]
            loss, mean = _over_words(hidden[piece], weight, bias, target, words, wanted)
            total += loss.sum()
            if wanted:  # d loss / d logits = softmax - one_hot; dividing and taking away is cheaper after the product
                gradient[piece] = mean.sub_(weight[target])
        if wanted:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        """The kept gradient times that of the sum (one over the window's supervised tokens)."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None, None


def _over_words(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    words: int,
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row, (rows, 1), and if wanted the softmax's mean of the weights, (rows, H), both float32.

    `words` of the vocabulary at a time: what came before is kept relative to the largest logit so far, and scaled when
    a larger one appears, so one exp serves both. A block of weights is used twice while it is in the cache.
    """
    likely = hidden.new_empty(len(hidden), 1, dtype=torch.float32)  # the target's logit
    largest = torch.full_like(likely, torch.finfo(torch.float32).min)
    size = torch.zeros_like(likely)
    mean = torch.zeros_like(hidden, dtype=torch.float32) if wanted else size
    by = products_for(hidden)
    for start in range(0, len(weight), words):
        block = weight[start : start + words]
        logits = by.linear(hidden, block, None if bias is None else bias[start : start + words]).float()
        place = (target - start)[:, None]
        here = (place >= 0) & (place < len(block))
        likely = torch.where(here, logits.gather(1, place.clamp(0, len(block) - 1)), likely)
        before, largest = largest, torch.maximum(largest, logits.amax(-1, keepdim=True))
        shrunk = (before - largest).exp_()
        logits.sub_(largest).exp_()
        size.mul_(shrunk).add_(logits.sum(-1, keepdim=True))
        if not wanted:
            continue
        if weight.dtype == torch.float32:
            by.add_linear(mean.mul_(shrunk), logits, block.T)
        else:
            mean.mul_(shrunk).add_((logits.to(weight.dtype) @ block).float())
    return largest + size.log() - likely, mean.div_(size) if wanted else mean


def probe(part: int = 0, parts: int = 1) -> Batch:
    """Eight tokens to compare two ways of computing on; with sequence parallelism, this rank's slice of them."""
    tokens = np.arange(8)
    row = collate([[(tokens, tokens)]])
    return slice_of_row(row, part, parts) if parts > 1 else row


@torch.no_grad()
def find_head(model: Any, implementation: str, batch: Batch) -> tuple[Head | None, str]:
    """The model's head, if its logits are provably nothing but that head; and a sentence that says what was found.

    Args:
        model: a causal language model, with or without adapters.
        batch: a short one on the model's device (`probe`); on it the two sides must be equal to the last bit.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    linear = base.get_output_embeddings()
    if linear is None or not hasattr(base, "get_decoder") or base.get_decoder() is base:
        return None, "loss: through the model's own forward, as it does not name its decoder and its head"
    if any(hasattr(parameter, "ds_id") for parameter in linear.parameters()):
        return None, "loss: through the model's own forward, which gathers the parts of its head"
    frozen = isinstance(linear, torch.nn.Linear) and not any(p.requires_grad for p in linear.parameters())
    plain = type(linear) is torch.nn.Linear
    head = Head(base.get_decoder(), linear, frozen and plain)
    was_training = model.training
    model.eval()
    try:
        ours = linear(head.hidden(batch, implementation))
        theirs = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **packed_kwargs(batch, implementation),
        ).logits[0]
    finally:
        model.train(was_training)
    if not torch.equal(ours, theirs):
        return None, "loss: through the model's own forward, which does more to its logits than one matrix product"
    if head.frozen:
        return head, "loss: frozen head, logits a block at a time, gradients without keeping them"
    return head, f"loss: trained head, in pieces where logits pass {LOGITS_BYTES / 2**20:.0f} MB"
