"""Importing bitsandbytes does not wake torch's compiler, and leaves the setting that kept it asleep as it was."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

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


@needs_bitsandbytes
def test_it_can_still_be_woken() -> None:
    import torch

    from minituner.model.quantized import import_bitsandbytes

    import_bitsandbytes()
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
