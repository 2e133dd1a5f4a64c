"""A fingerprint of a base model's weights: is this the model that the adapter was trained on?

An adapter is a correction to one particular base. Put on another base of the same shape it loads without a word and
answers nonsense, so training notes the base's fingerprint, and resuming, chat and merging compare it:

    every weight tensor -> its name and shape                      -> sha256 -> "9f2c1a08-
                        -> 64 values, evenly spaced, in bfloat16   -> sha256 ->  77b0e2d4"

Values are compared in bfloat16, so that a base loaded in float32 here and in bfloat16 there is the same base. A
quantised base is compared by its bytes and scales, under a name of its own kind (`4bit:...`): the same quantised base
is recognised, and whether it came from a certain full one cannot be asked.
Lesson: notebook 09.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

SAMPLES = 64  # values of each tensor


@torch.no_grad()
def fingerprint(model: Any) -> str | None:
    """`SHAPES-VALUES`, a short name for the weights of `model` (without adapters); None where rounding hides them.

    `KIND:SHAPES-VALUES` for a quantised one. float16 rounds differently than bfloat16, so it has none.
    """
    return fingerprint_of(sorted(model.named_parameters()), model)


def fingerprint_of(named: Iterable[tuple[str, torch.Tensor]], model: Any = None) -> str | None:
    """The same for tensors that come one by one, sorted by name, as out of a folder; `model` for quantised ones."""
    shapes, samples = hashlib.sha256(), hashlib.sha256()
    kind = ""
    for name, parameter in named:
        tensors = [parameter]
        if parameter.dtype in (torch.uint8, torch.int8):
            kind = "4bit:" if parameter.dtype == torch.uint8 else "8bit:"
            tensors += _scales(model, name, parameter)
        elif parameter.dtype not in (torch.float32, torch.bfloat16):
            return None
        shapes.update(f"{name} {tuple(parameter.shape)} ".encode())
        for tensor in tensors:
            values = tensor.detach().flatten()
            values = values[:: max(1, len(values) // SAMPLES)][:SAMPLES]
            samples.update(values.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return f"{kind}{shapes.hexdigest()[:8]}-{samples.hexdigest()[:8]}"


def comparable(one: str | None, other: str | None) -> bool:
    """True if two fingerprints can be compared: both there, and of bases held in the same kind of numbers."""
    return bool(one and other) and _kind(one) == _kind(other)


def _kind(mark: str | None) -> str:
    return mark.partition(":")[0] if mark and ":" in mark else ""


def _scales(model: Any, name: str, parameter: torch.Tensor) -> list[torch.Tensor]:
    """What a quantised weight's integers are multiplied by (double quantisation: integers too)."""
    if getattr(parameter, "quant_state", None) is not None:
        return [parameter.quant_state.absmax]
    layer = model.get_submodule(name.rpartition(".")[0])
    scales = layer.state.SCB if layer.state.SCB is not None else parameter.SCB
    return [scales]
