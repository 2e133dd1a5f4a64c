"""Products with frozen matrices on a CPU: by torch's BLAS (MKL), or by oneDNN, which torch brings as well.

    y  = x W^T    linear(x, W)                        (T, in) with (out, in)
    dx = dy W     linear(dy, W.T)                     the same function: a transposed view is no copy

torch gives float32 products to MKL. On CPUs with AVX-512, AMD's above all, oneDNN is a tenth to a quarter
faster, and more for LoRA's thin matrices; on CPUs with AVX2 the two are as fast (measured:
assets/benchmarks/README.md). `train.cpu_matmul` chooses; `auto` goes by the instructions the CPU has and never by the
clock, so a resumed run computes as the first one did. The results are equal up to the order of the additions (tested).

torch hands oneDNN's kernel to tensors in oneDNN's own layout only. The kernel takes ordinary ones as they lie; the
bias, small, is what brings the call to it. Used inside autograd functions: it has no gradient of its own.
Lesson: notebook 05.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional as F

_chosen = "blas"


def choose_matmul(wanted: str, device: str) -> str:
    """Let `linear` use "blas", "onednn", or what suits this CPU ("auto"); returns a sentence that says what was chosen.

    It holds for the whole process, until the next choice.
    """
    global _chosen
    capability = torch.backends.cpu.get_cpu_capability()
    able = torch.backends.mkldnn.is_available() and device == "cpu"
    _chosen = "onednn" if able and (wanted == "onednn" or (wanted == "auto" and capability == "AVX512")) else "blas"
    if device != "cpu":
        return f"matrix products: by {device}'s own library"
    return f"matrix products: {'oneDNN' if _chosen == 'onednn' else 'BLAS'} ({capability})"


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias: x (T, in) and weight (out, in), of any strides -> (T, out)."""
    if not _for_onednn(x, weight):
        return F.linear(x, weight, bias)
    shift = _no_bias(len(weight)) if bias is None else bias.to_mkldnn()
    return torch.ops.mkldnn._linear_pointwise(x, weight, shift, "none", [], "")


def add_linear(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """y += x W^T in place, for large matrices; BLAS adds by itself, which is the better way for LoRA's thin ones."""
    return y.add_(linear(x, weight)) if _for_onednn(x, weight) else y.addmm_(x, weight.T)


@lru_cache(maxsize=64)
def _no_bias(length: int) -> torch.Tensor:
    """Zeros in oneDNN's layout; making them anew took as long as a thin product."""
    return torch.zeros(length).to_mkldnn()


def _for_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Both are float32 numbers in memory, and nobody compiles or counts: what counts bytes knows no other layouts."""
    return (
        _chosen == "onednn"
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) is torch.Tensor
        and min(*x.shape, *weight.shape) > 0
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.compiler.is_compiling()
    )
