"""Keeping memory between steps: the C library is told once, unless the user has told it, or there is none to tell."""

from __future__ import annotations

import ctypes
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
import resource, sys, torch
from minituner.train.allocator import keep_memory
print(keep_memory() if sys.argv[1] == "kept" else None)
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
    faults = {}
    for name in ("kept", "as it comes"):
        out = subprocess.run([sys.executable, "-c", FAULTS, name], capture_output=True, text=True, check=True).stdout
        told, count = out.split()
        assert told == str(True if name == "kept" else None)
        faults[name] = int(count)
    # Three steps touch 176,000 pages. As it comes a third or all of them are asked for anew, in few runs hardly any.
    assert faults["kept"] < 5_000, faults


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
