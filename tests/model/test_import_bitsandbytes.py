"""Importing bitsandbytes does not wake torch's compiler, leaves its setting as it was, and 4-bit matrices are right."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from minituner.model import quantized
from minituner.model.quantized import import_bitsandbytes, right_for_short_rows, take_matrices_as_one_row

PROGRAM = """
import os, sys
from minituner.model.quantized import ASLEEP, import_bitsandbytes

import_bitsandbytes()
print(os.environ.get(ASLEEP), "bitsandbytes" in sys.modules)
import peft
from transformers import get_scheduler
print("torch._inductor.compile_fx" in sys.modules)
"""

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.parametrize("setting", [None, "0"])
def test_the_compiler_stays_asleep_and_the_setting_as_it_was(setting: str | None) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    environment |= {} if setting is None else {"TORCHDYNAMO_DISABLE": setting}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == [f"{setting} True", "False"]
    assert not done.stderr, "nothing that a newcomer would wonder about"


@needs_bitsandbytes
def test_it_can_still_be_woken() -> None:
    import_bitsandbytes()
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))


@needs_bitsandbytes
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 100),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_4_bit_matrices_of_any_shape_are_what_their_codes_and_scales_say(
    rows: int, columns: int, double: bool, dtype: torch.dtype, seed: int
) -> None:
    """Where rows end within a block of 64, bitsandbytes' kernel for AVX-512 took the scale of another block."""
    import_bitsandbytes()
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit

    assume(rows * columns > 2)  # a single byte is read as the first row of a matrix packed the other way round
    torch.manual_seed(seed)
    matrix = (torch.randn(rows, columns) * torch.linspace(0.1, 9, rows)[:, None]).to(dtype)
    packed, state = quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=double)
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()[: matrix.numel()]
    by_hand = (state.code[codes] * scales.repeat_interleave(64)[: matrix.numel()]).to(dtype)
    assert torch.equal(dequantize_4bit(packed, state), by_hand.view(rows, columns))


@needs_bitsandbytes
def test_a_kernel_that_is_wrong_for_short_rows_is_seen_and_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that confuses rows and blocks as theirs does: on other CPUs theirs is right."""
    import_bitsandbytes()
    with torch.device("meta"), FakeTensorMode():  # where a plan asks
        assert right_for_short_rows(), "mended, or never wrong"
    real = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def confused(packed: Any, absmax: Any, blocksize: int, kind: str, shape: list[int], dtype: Any) -> torch.Tensor:
        if len(shape) > 1 and shape[-1] % blocksize:
            absmax = absmax.roll(1)
        return real.call_boxed(keys, packed, absmax, blocksize, kind, shape, dtype)

    kept: list[Any] = []
    monkeypatch.setattr(quantized, "_KEPT", kept)
    try:
        with warnings.catch_warnings(action="ignore"):
            kept.append(torch.library.Library("bitsandbytes", "IMPL"))
            kept[0].impl("dequantize_4bit", confused, "CPU", allow_override=True)
        assert not right_for_short_rows()
        take_matrices_as_one_row()
        assert right_for_short_rows()
    finally:
        for library in reversed(kept):
            library._destroy()
    assert right_for_short_rows()
