"""`from minituner.data import prepare` is the function, whatever was imported before it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["prepare", "collate"])
@pytest.mark.parametrize("first", ["", "from minituner.data.{name} import {name}", "import minituner.data.{name}"])
def test_a_function_named_like_its_module_stays_a_function(name: str, first: str) -> None:
    code = f"{first.format(name=name)}\nfrom minituner.data import {name}\nimport minituner.data.{name}\n"
    code += (
        f"from minituner.data import {name} as again\nassert {name} is again and type({name}).__name__ == 'function'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
