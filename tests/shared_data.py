"""Where the shared parity cases lie: a folder beside the repository, which not every machine has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
GOLDEN = SHARED / "golden"

needs_shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the shared parity cases are not on this machine")


def golden_lines(name: str) -> list[dict[str, Any]]:
    """The cases of one golden file, or none where the folder is absent."""
    path = GOLDEN / name
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
