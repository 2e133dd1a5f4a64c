"""What the promise tests share: documents of different lengths, and gradients as one dictionary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from minituner.data.collate import Document

TOLERANCE = 1e-5


def documents(lengths: tuple[int, ...], seed: int = 0) -> list[Document]:
    """Random documents; the first third of each is masked, and a middle token too."""
    draw = np.random.default_rng(seed)
    result = []
    for length in lengths:
        ids = draw.integers(0, 256, length)
        labels = ids.copy()
        labels[: length // 3] = -100
        labels[length // 2] = -100
        result.append((ids, labels))
    return result


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Name -> gradient of everything that is trained."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference, relative to the largest value of all."""
    assert a.keys() == b.keys()
    assert a
    scale = max(float(value.abs().max()) for value in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / scale
