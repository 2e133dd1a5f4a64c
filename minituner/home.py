"""Where things are: the cache with downloaded models and prepared data, and the data scripts."""

from __future__ import annotations

import os
from pathlib import Path

from minituner.errors import MinitunerError


def home() -> Path:
    """The cache folder: `MINITUNER_HOME`, or `~/.cache/minituner`."""
    return Path(os.environ.get("MINITUNER_HOME") or Path.home() / ".cache" / "minituner").expanduser()


def find_data_script(name: str) -> Path | None:
    """A script of `data_scripts/`, in the repository or inside the installed package; None if there is none."""
    package = Path(__file__).resolve().parent
    places = (package.parent / "data_scripts" / name, package / "data_scripts" / name)
    return next((place for place in places if place.is_file()), None)


def data_script(name: str) -> Path:
    """The same for a script that has to be there. Raises MinitunerError if it is not."""
    script = find_data_script(name)
    if script is None:
        raise MinitunerError(f"the script data_scripts/{name} is missing", fix="install minituner anew")
    return script
