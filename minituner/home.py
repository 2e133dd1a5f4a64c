"""Where downloaded models and prepared data are kept."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The cache folder: `MINITUNER_HOME`, or `~/.cache/minituner`."""
    return Path(os.environ.get("MINITUNER_HOME") or Path.home() / ".cache" / "minituner").expanduser()
