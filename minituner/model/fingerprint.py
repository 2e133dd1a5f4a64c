"""A fingerprint of a base model's weights: is this the model that the adapter was trained on?

An adapter is a correction to one particular base. Put on another base of the same shape it loads without a word and
answers nonsense, so training notes the base's fingerprint, and resuming, chat and merging compare it:

    every weight tensor -> its name and shape                      -> sha256 -> "9f2c1a08-
                        -> 64 values, evenly spaced, in bfloat16   -> sha256 ->  77b0e2d4"

Values are compared in bfloat16, so that a base loaded in float32 here and in bfloat16 there is the same base.
Lesson: notebook 09.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

SAMPLES = 64  # values of each tensor


@torch.no_grad()
def fingerprint(model: Any) -> str | None:
    """`SHAPES-VALUES`, a short name for the weights of `model` (without adapters); None where rounding hides them.

    Quantised weights and float16 round differently than bfloat16, so they have no comparable fingerprint.
    """
    shapes, samples = hashlib.sha256(), hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            return None
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // SAMPLES)][:SAMPLES]
        shapes.update(f"{name} {tuple(parameter.shape)} ".encode())
        samples.update(values.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return f"{shapes.hexdigest()[:8]}-{samples.hexdigest()[:8]}"
