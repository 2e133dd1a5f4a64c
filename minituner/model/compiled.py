"""Regional torch.compile: the feed-forward block of every layer, and nothing else.

    layer   attention      as it is: document lengths differ from batch to batch, and each set of them would be compiled
            feed-forward   compiled once for all layers and all lengths: matrices, activation and product in one region

Compiled in place (`module.compile()`), so no parameter gets another name, and checkpoints and adapters are the same
files with or without it. Off by default: the first step waits for the compiler, which short runs never earn back, and
beside fused layers (fused.py) nothing is left for it on a CPU (assets/benchmarks/README.md). Same numbers as eager to
rounding (1e-5, tested); with dropout inside a region its draws are the compiler's own.
Lesson: notebook 07.
"""

from __future__ import annotations

from typing import Any


def compile_regions(model: Any, device: str) -> str:
    """Compile the feed-forward blocks of `model` in place; returns a sentence that says what was done, or why not."""
    if reason := _missing_compiler(device):
        return f"train.compile: {reason}; training goes on uncompiled, with the same results and no speed-up"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return (
            "train.compile: the parameters lie in pieces on several ranks (ZeRO-3), gathered by code that cannot be "
            "compiled; training goes on uncompiled, with the same results and no speed-up"
        )
    blocks = feed_forward_blocks(model)
    if not blocks:
        return "train.compile: no feed-forward blocks were found in this model; training goes on uncompiled"
    for block in blocks:
        block.compile(dynamic=True)
    return f"train.compile: {len(blocks)} feed-forward blocks; the first step waits for the compiler"


def feed_forward_blocks(model: Any) -> list[Any]:
    """The child of each decoder layer that holds linear layers and is not its attention; experts are left alone.

    (A layer of experts sends each token elsewhere, a decision a compiled region cannot hold.)
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = getattr(base.get_decoder(), "layers", None) or []
    return [
        child
        for layer in layers
        for name, child in layer.named_children()
        if "attn" not in name
        and "attention" not in name
        and not hasattr(child, "experts")
        and any(isinstance(part, torch.nn.Linear) for part in child.modules())
    ]


def _missing_compiler(device: str) -> str | None:
    """Why nothing can be compiled on this machine; None if a compiler is there."""
    if device == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "it needs the package triton and a GPU that it supports"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler on this machine (g++, or the one that $CXX names)"
    return None
