"""Quantised bases: the frozen weights in 4 or 8 bits, multiplied in the compute data type.

    qlora      NF4: blocks of 64 weights share one scale, each weight is the nearest of 16 values that a normal
               distribution uses equally often; double quantisation holds the scales themselves in 8 bits
               0.5 + 1/64 + 4/(64*256) = 0.516 bytes a weight, where float32 takes 4
    int8_lora  one scale a row, each weight an integer from -127 to 127: 1 byte a weight

Only the linear layers inside the decoder are quantised. Embedding, norms and the output head keep the data type of the
recipe: the head's errors would go straight into the logits, and norms are too small to be worth it. A weight is made
whole again for each multiplication (forward and backward) and forgotten, so gradients are exactly those of the
dequantised matrix.

bitsandbytes' own 8-bit layer does this only while training on a CPU. Otherwise it rounds the *activations* to 8 bits
too, with columns of outliers picked from the whole batch: packed documents then change each other's numbers, and
answers come from another function than the one that was trained. `differentiable_everywhere` makes all of them the
first kind.
Sources: Dettmers et al. 2023 (QLoRA), Dettmers et al. 2022 (LLM.int8). Lesson: notebook 05.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from minituner.errors import UsageError

ASLEEP = "TORCHDYNAMO_DISABLE"  # torch.compile then returns the function it was given
_KEPT: list[Any] = []  # what is registered with torch holds as long as the object that registered it


@cache
def import_bitsandbytes() -> None:
    """Import bitsandbytes, if it is there, without torch's compiler: a second less until peft is imported.

    peft imports bitsandbytes whatever it is used for. That marks some functions for torch.compile, which imports the
    whole compiler. They are those for devices without kernels of their own, and stay as they are written.
    """
    before = os.environ.get(ASLEEP)
    os.environ[ASLEEP] = "1"
    # On CPUs with bfloat16 units it misses a kernel for answering from rearranged weights, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    found = False
    try:
        with suppress(ImportError):  # who needs it says so
            import bitsandbytes  # noqa: F401

            found = True
    finally:
        if before is None:
            del os.environ[ASLEEP]
        else:
            os.environ[ASLEEP] = before
    if found and not right_for_short_rows():
        take_matrices_as_one_row()


def right_for_short_rows() -> bool:
    """True if bitsandbytes makes 4-bit matrices whole whose rows end within a block of 64, on this machine's CPU.

    Its kernel for AVX-512 (0.50) gives such rows the wrong blocks' scales: a quarter of their size is then error, not a
    tenth, and nothing says so.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    with _disable_current_modes():  # a plan imports it too, among tensors without numbers
        matrix = torch.linspace(1, 8, 256, device="cpu").view(8, 32)
        packed, state = quantize_4bit(matrix, blocksize=64, quant_type="nf4")
        whole = dequantize_4bit(packed, state)
        state.shape = torch.Size([256])
        return torch.equal(whole.flatten(), dequantize_4bit(packed, state).flatten())


def take_matrices_as_one_row() -> None:
    """From now on bitsandbytes' CPU kernel gets every 4-bit matrix as one long row, which it makes whole rightly."""
    name = "bitsandbytes::dequantize_4bit"
    theirs = torch.library.get_kernel(name, "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def as_one_row(
        A: torch.Tensor,
        absmax: torch.Tensor,
        blocksize: int,
        quant_type: str,
        shape: list[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        whole: torch.Tensor = theirs.call_boxed(keys, A, absmax, blocksize, quant_type, [math.prod(shape)], dtype)
        return whole.view(shape)

    _KEPT.append(torch.library.Library("bitsandbytes", "IMPL"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        _KEPT[-1].impl("dequantize_4bit", as_one_row, "CPU", allow_override=True)


def quantization_config(method: str, compute_dtype: torch.dtype) -> Any:
    """transformers' settings for the base of `method`; None where it is not quantised.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    if method not in ("qlora", "int8_lora"):
        return None
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"method.name={method} needs the package bitsandbytes",
            fix="install it, or use method.name=lora",
            next_command="pip install 'minituner[quantization]'",
        )
    from transformers import BitsAndBytesConfig

    import_bitsandbytes()
    if method == "int8_lora":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def differentiable_everywhere(model: Any) -> int:
    """Let every quantised layer of `model` compute one function, with its gradient, in training and in evaluation.

    8-bit layers multiply by their dequantised weight, always. 4-bit layers keep their layout: on a CPU with bfloat16
    units the first evaluation would rearrange the packed weights, for good, into one that has no gradient.

    Returns:
        How many layers there are.
    """
    import bitsandbytes as bnb
    from bitsandbytes.autograd._functions import MatMul8bitFp

    class WeightOnlyInt8(bnb.nn.Linear8bitLt):
        """y = x (s W8 / 127)^T + b; x (..., in), W8 (out, in) int8, s (out,) float32."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.weight.CB is not None:  # the first call: bitsandbytes moves integers and scales into its state
                self.init_8bit_state()
            bias = None if self.bias is None else self.bias.to(x.dtype)
            flat = x.reshape(-1, x.shape[-1])
            return MatMul8bitFp.apply(flat, self.weight, None, bias, self.state).view(*x.shape[:-1], -1)

    layers = [module for module in model.modules() if isinstance(module, (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit))]
    for layer in layers:
        if isinstance(layer, bnb.nn.Linear8bitLt):
            layer.__class__ = WeightOnlyInt8
        else:
            layer.support_avx512bf16_for_cpu = False
    return len(layers)


def leave_the_file(model: Any) -> int:
    """Copy what was not quantised out of the checkpoint's file, which could not leave the memory otherwise.

    Weights loaded for a CPU are the file itself, mapped into memory: one of them (the embedding) keeps all of it there,
    and so the frozen weights in full size beside their 4 bits.

    Returns:
        Bytes that were copied.
    """
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}  # by address: tied weights stay one
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.is_floating_point():  # what was quantised has left it already
            place = (tensor.data_ptr(), tensor.shape)
            if place not in copies:
                copies[place] = tensor.data.clone()
            tensor.data = copies[place]
    return sum(copy.nbytes for copy in copies.values())


def parameter_bytes(model: Any) -> int:
    """Bytes of a model's weights as they lie in memory, the scales of quantised ones included (tied ones once)."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        for scales in (state, getattr(state, "state2", None)):
            if scales is not None:
                total += scales.absmax.numel() * scales.absmax.element_size()
    for module in model.modules():
        scales = getattr(getattr(module, "state", None), "SCB", None)
        scales = scales if scales is not None else getattr(getattr(module, "weight", None), "SCB", None)
        if scales is not None:
            total += scales.numel() * scales.element_size()
    return total
