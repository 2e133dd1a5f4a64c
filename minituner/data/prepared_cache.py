"""The cache of prepared data: under which name it is kept, and how it gets there whole.

    <home>/prepared/3f9c.../data.arrow, info.json        the name is a hash of the records' bytes and of every setting
    <home>/prepared/.3f9c...-x7q2/                       being written; renamed into place when it is complete

A broken-off write never has the final name, so what has it is whole. Lesson: notebook 01.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from minituner.recipe import DataSection

VERSION = 2  # of everything that decides a token; part of the fingerprint


def fingerprint(data: DataSection, tokenizer: Any, seed: int) -> str:
    """A name for prepared data: changes with the records' bytes, the tokenizer, and any setting that matters."""
    settings = data.model_dump(include={"template", "system", "loss_on", "too_long", "on_error", "bos_policy"})
    settings |= {
        "version": VERSION,
        "allow_control_tokens": data.allow_control_tokens,
        # Packing by concat cuts documents itself, so it is prepared without a limit.
        "max_length": None if data.packing == "concat" else data.max_length,
        "sources": [
            [s.path, s.format, s.limit, s.split, seed if s.limit else None, _content(s.path)] for s in data.sources
        ],
        "tokenizer": _tokenizer_text(tokenizer),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def _content(path: str) -> str:
    """A hash of a file's or folder's bytes; a hub id stands for itself."""
    place = Path(path)
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place] * place.is_file()
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(place)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if files else path


def _tokenizer_text(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = f"{type(tokenizer).__name__} {getattr(tokenizer, 'vocab_size', 0)}"
    else:  # without its head: padding and truncation are whatever the last call left there
        _, _, text = backend.to_str().partition('"added_tokens":')
    text += repr(getattr(tokenizer, "chat_template", None)) + repr(getattr(tokenizer, "special_tokens_map", None))
    return hashlib.sha256(text.encode()).hexdigest()


def publish(aside: Path, folder: Path, *, keep: bool) -> None:
    """Rename finished data into its place; with `keep`, data that another process finished first stays."""
    while not (keep and (folder / "info.json").is_file()):
        try:
            os.replace(aside, folder)
            return
        except OSError:  # something stands there: move it away whole, so that nobody meets half a folder
            if not folder.is_dir():
                raise
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            os.replace(folder, old)
        except FileNotFoundError:  # another process was faster
            pass
        finally:
            shutil.rmtree(old, ignore_errors=True)
