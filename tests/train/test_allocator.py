"""Keeping memory between steps: the C library is told once, unless the user has told it, or there is none to tell."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minituner.train import allocator
from minituner.train.allocator import keep_memory
from minituner.train.loop import train
from tests.tiny import tiny_recipe

FAULTS = """
import resource, torch
from minituner.train.allocator import keep_memory
print(keep_memory())
def step():
    layers = [torch.empty(1_500_000).fill_(1.0) for _ in range(40)]  # 6 MB each, all alive at once, then gone
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(), step(), step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def has_mallopt() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.slow
@pytest.mark.skipif(not has_mallopt(), reason="the C library here has no mallopt")
def test_a_step_finds_the_pages_of_the_last_one() -> None:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    handed_back = {f"MALLOC_{name}_THRESHOLD_": "131072" for name in ("TRIM", "MMAP")}
    faults = {}
    for name, environment in (("kept", plain), ("handed back", plain | handed_back)):
        out = subprocess.run(
            [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=environment
        )
        told, count = out.stdout.split()
        assert told == str(name == "kept"), "what is set by hand stands"
        faults[name] = int(count)
    assert faults["kept"] < 5_000 < 170_000 < faults["handed back"], faults  # three steps touch 176,000 pages


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_what_the_user_has_set_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "131072")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("asked"))
    assert not keep_memory()


@pytest.mark.parametrize("error", [OSError, AttributeError, TypeError])
def test_another_c_library_is_left_alone(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: None) -> SimpleNamespace:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert not keep_memory()


@pytest.mark.slow
def test_a_run_tells_it_unless_it_is_turned_off(
    model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr("minituner.train.run.keep_memory", lambda: told.append(1) or True)
    for keep in (True, False):
        train(tiny_recipe(model_folder, chats, train={"max_steps": 1, "keep_memory": keep}), tmp_path / str(keep))
    assert len(told) == 1
    assert allocator.LARGEST == 32 * 2**20, "glibc refuses more"
