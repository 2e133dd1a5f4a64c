"""The proofs that a model may compute fewer tokens than a row has: their states are the same, on this very model.

    tails       needed tokens alone  ==  among all        false for what looks ahead          data/tails.py
    prefixes    beginnings once      ==  each time        false for what looks at neighbours  data/prefixes.py
                                                          by something else than attention, and for dropout, of
                                                          which each copy would draw its own

Each takes a row made for it, before the first step; what fails is computed in full, and the run says so.
Lesson: notebook 04.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.modules.dropout import _DropoutNd

from minituner.data.collate import Batch, collate
from minituner.data.encoding import IGNORE
from minituner.data.prefixes import share_prefixes
from minituner.data.tails import cut_tails, needed
from minituner.model.fused import TOLERANCE

States = Callable[[Batch], torch.Tensor]  # a model's computed states of a row, (N, width)


@torch.no_grad()
def prefixes_proved(model: torch.nn.Module, states: States, device: torch.device | str) -> bool:
    """True if the states are the same whether beginnings are computed once or each time; in training mode."""
    if any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in model.modules()):
        return False  # that of adapters cannot be seen before the first step: their B is 0
    beginning = np.arange(5)
    documents = [np.concatenate([beginning, np.arange(n) + first]) for n, first in ((4, 7), (1, 3), (6, 1))]
    row = collate([[(ids, ids) for ids in documents]])
    shared = share_prefixes(row)
    assert shared.prefixes is not None
    with torch.random.fork_rng():
        every = states(row.to(device))
        once = states(shared.to(device))[shared.prefixes.rows.to(device)]
    return _same(once, every)


def limits_of_length(config: Any) -> list[tuple[str, int]]:
    """Kinds of position embedding that turn every token otherwise once a row has a document of more tokens than this.

    They choose the frequencies by the largest position they see, so all of them must be there.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    return [
        (kind["rope_type"], kind.get("original_max_position_embeddings") or config.max_position_embeddings)
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]


@torch.no_grad()
def tails_proved(model: torch.nn.Module, states: States, device: torch.device | str, *, packed: bool = True) -> bool:
    """True if states do not depend on what stands behind them; `packed`: in a row of several documents.

    Without dropout, which is as random for fewer tokens as for more, but not the same.
    """
    documents = []
    for length, targets in ((7, 4), (5, 5), (6, 2)) if packed else ((9, 4),):
        ids = np.arange(length) + targets
        documents.append((ids, np.where(np.arange(length) < targets, ids, IGNORE)))
    row = collate([documents])
    was_training = model.training
    model.eval()
    try:
        every = states(row.to(device))[torch.from_numpy(needed(row)).to(device)]
        alone = states(cut_tails(row).to(device))
    finally:
        model.train(was_training)
    return _same(alone, every)


def _same(ours: torch.Tensor, every: torch.Tensor) -> bool:
    apart = float((ours.float() - every.float()).abs().max())
    return apart <= TOLERANCE.get(every.dtype, 0.0) * float(every.abs().max())
