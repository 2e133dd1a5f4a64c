"""Each fault's tool passes the clean run and not the broken one; afterwards everything is as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minituner.errors import UsageError
from minituner.museum import injected, show
from tests.museum.conftest import NAMES, recipe_for, silent


def functions_of_the_package() -> dict[str, Any]:
    """Every function that a loaded module of the package names."""
    return {
        f"{module}.{name}": value
        for module, loaded in list(sys.modules.items())
        if module.startswith("minituner.") and "museum" not in module
        for name, value in vars(loaded).items()
        if callable(value)
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_tool_tells_them_apart_and_nothing_is_left(
    name: str, model_folder: Path, fault_data: Path, own_home: Path
) -> None:
    if name == "merge-into-4bit":
        pytest.importorskip("bitsandbytes")
    recipe = recipe_for(name, model_folder, fault_data)
    with injected(name, silent):
        pass  # loads what the fault is put into
    before = functions_of_the_package()
    said: list[str] = []
    clean, broken = show(name, recipe, said.append)
    assert clean.passes, clean
    assert not broken.passes, broken
    assert clean.says != broken.says
    assert [line for line in said if "->" in line] == [f"{'':12}-> passes", f"{'':12}-> DOES NOT PASS"]
    after = functions_of_the_package()
    assert all(after[key] is before[key] for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_taken_out_after_an_error_too(name: str) -> None:
    with injected(name, silent):
        pass
    before = functions_of_the_package()

    def fail() -> None:
        with injected(name, silent):
            inside = functions_of_the_package()
            assert any(inside[key] is not before[key] for key in before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    after = functions_of_the_package()
    assert all(after[key] is before[key] for key in before)


@pytest.mark.slow
def test_a_module_imported_meanwhile_keeps_nothing_of_it() -> None:
    """In a fresh interpreter: what is first imported inside the block is right after it."""
    code = (
        "from minituner.museum import injected\n"
        "for name in ('double-bos', 'pad-as-eos', 'packed-leak', 'mask-everything', 'lost-tail'):\n"
        "    with injected(name):\n"
        "        import minituner.data.walk, minituner.plan.activations, minituner.train.loop\n"
        "from minituner.data import encoding\n"
        "from minituner.model import attention\n"
        "from minituner.plan import activations\n"
        "import sys\n"
        "walk = sys.modules['minituner.data.walk']\n"
        "print(walk.encode_many.__module__, activations.packed_kwargs.__module__, encoding.encode_many.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["minituner.data.encoding", "minituner.model.attention", "minituner.data.encoding"]


CANNOT = {
    "mean-of-means": {"train": {"gradient_accumulation_steps": 1}},
    "packed-leak": {"data": {"packing": "none"}},
    "pad-as-eos": {"data": {"loss_on": "all"}},
}


@pytest.mark.parametrize("name", [*CANNOT, "merge-into-4bit"])
def test_a_recipe_in_which_it_cannot_happen_is_refused(name: str, model_folder: Path, fault_data: Path) -> None:
    from tests.tiny import tiny_recipe

    with pytest.raises(UsageError, match="cannot happen") as refusal:
        show(name, tiny_recipe(model_folder, fault_data, **CANNOT.get(name, {})), silent)
    assert "=" in refusal.value.fix


def test_nothing_to_spoil_is_an_error(model_folder: Path, fault_data: Path, own_home: Path) -> None:
    one_pack = recipe_for("lost-tail", model_folder, fault_data, data={"max_length": 1024})
    with pytest.raises(UsageError, match="found nothing to spoil"):
        show("lost-tail", one_pack, silent)
