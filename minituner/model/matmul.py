"""Products with frozen matrices on a CPU: by torch's BLAS (MKL), or by oneDNN, which torch brings as well.

    by = products_for(x)                                chosen once for all products of a layer
    y  = x W^T    by.linear(x, W)                       (T, in) with (out, in)
    dx = dy W     by.linear(dy, W.T)                    the same function: a transposed view is no copy

torch gives float32 products to MKL. On CPUs with AVX-512, AMD's above all, oneDNN is a tenth to a quarter
faster, and more for LoRA's thin matrices; on CPUs with AVX2 the two are as fast (measured:
assets/benchmarks/README.md). `train.cpu_matmul` chooses; `auto` goes by the instructions the CPU has and never by the
clock, so a resumed run computes as the first one did. The results are equal up to the order of the additions (tested).

torch hands oneDNN's kernel to tensors in oneDNN's own layout only. The kernel takes ordinary ones as they lie; the
bias, small, is what brings the call to it. Used inside autograd functions: it has no gradient of its own.
Lesson: notebook 05.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

_chosen = "blas"


class Products(NamedTuple):
    """One library's products of matrices (T, in) and (out, in), of any strides, of one data type.

    `linear(x, weight, bias)` is x W^T + bias. `add_linear(y, x, weight)` is y += x W^T in place, for large matrices:
    BLAS adds by itself, which is the better way for LoRA's thin ones (`addmm_`).
    """

    linear: Callable[..., torch.Tensor]
    add_linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def choose_matmul(wanted: str, device: str) -> str:
    """Multiply by "blas", "onednn", or what suits this CPU ("auto"); returns a sentence that says what was chosen.

    It holds for the whole process, until the next choice.
    """
    global _chosen
    capability = torch.backends.cpu.get_cpu_capability()
    able = torch.backends.mkldnn.is_available() and device == "cpu"
    _chosen = "onednn" if able and (wanted == "onednn" or (wanted == "auto" and capability == "AVX512")) else "blas"
    if device != "cpu":
        return f"matrix products: by {device}'s own library"
    return f"matrix products: {'oneDNN' if _chosen == 'onednn' else 'BLAS'} ({capability})"


def products_for(x: torch.Tensor) -> Products:
    """What multiplies x (T, in), and gradients like it, by matrices of its data type that are not empty.

    Asked once for all products of a layer: the answer takes 20 microseconds where the CPU's caches hold weights.
    oneDNN takes float32 numbers in memory, where nobody compiles or counts: what counts bytes knows no other layouts.
    """
    able = (
        _chosen == "onednn"
        and x.dtype is torch.float32
        and x.is_cpu
        and type(x) is torch.Tensor
        and x.numel() > 0
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.compiler.is_compiling()
    )
    return ONEDNN if able else BLAS


def _linear_by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    shift = _no_bias(weight.shape[0]) if bias is None else bias.to_mkldnn()
    return torch.ops.mkldnn._linear_pointwise(x, weight, shift, "none", [], "")


def _add_linear_by_onednn(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return y.add_(_linear_by_onednn(x, weight))


def _add_linear_by_blas(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return y.addmm_(x, weight.T)


@lru_cache(maxsize=64)
def _no_bias(length: int) -> torch.Tensor:
    """Zeros in oneDNN's layout; making them anew took as long as a thin product."""
    return torch.zeros(length).to_mkldnn()


BLAS = Products(F.linear, _add_linear_by_blas)
ONEDNN = Products(_linear_by_onednn, _add_linear_by_onednn)
