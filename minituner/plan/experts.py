"""Mixtures of experts on paper: what works on one token, and the products that experts share.

    8 experts, 2 for each token        46.7e9 parameters are in memory, 12.9e9 of them work on a token
    tokens sorted by expert            x (S, d) in 8 pieces, each times its own slice of W (8, d, f) -> (S, f)

S is tokens times experts for each token, whatever the router decides, so shapes are known without it. (torch's own
shape rule for that product knows bfloat16 only; its kernels take float32 too.) Lesson: notebook 08.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class GroupedProducts(TorchDispatchMode):
    """Within (inside a FakeTensorMode): grouped matrix products have the shapes that the kernels give."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            return args[0].new_empty(grouped_shape(args[0].shape, args[1].shape, _offsets(args, kwargs)))
        return func(*args, **(kwargs or {}))


def grouped_shape(left: torch.Size, right: torch.Size, groups: int) -> tuple[int, ...]:
    """Shape of a product whose 2-D factors are cut into `groups` pieces along the side that has no stack.

    Forward (S, d) @ (E, d, f) -> (S, f); gradient of the weights (d, S) @ (S, f) -> (E, d, f).
    """
    if len(left) == len(right) == 2:
        return groups, left[0], right[1]
    if len(left) == len(right) == 3:
        return left[0], left[1], right[2]
    return (left[0], right[2]) if len(left) == 2 else (left[1], right[1])


def _offsets(args: Any, kwargs: Any) -> int:
    given = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
    return given.shape[0] if given is not None else 0


def stacks(name: str, module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The weights of a layer that holds all experts of a block as stacks (experts, ., .); none of any other layer."""
    while name.endswith(".base_layer"):  # peft's wrappers around it
        name = name.removesuffix(".base_layer")
    if name.rsplit(".", 1)[-1] == "experts":
        yield from (p for p in module.parameters(recurse=False) if p.ndim == 3 or len(getattr(p, "ds_shape", ())) == 3)


def experts_for_a_token(config: Any) -> int:
    """How many of a block's experts work on one token."""
    return getattr(config, "num_experts_per_tok", None) or 1


def idle_parameters(model: Any) -> int:
    """Parameters of experts that do not work on a given token; 0 for a model without experts."""
    config = model.config.get_text_config()
    shapes = [p.shape for name, module in model.named_modules() for p in stacks(name, module)]
    return sum(shape.numel() - experts_for_a_token(config) * shape.numel() // shape[0] for shape in shapes)
