"""The bug museum: ten faults that have spoiled real trainings while the loss fell, put in on purpose, and shown.

    minituner museum                                the list: what goes wrong, which tool shows it, whose thread it was
    minituner museum packed-leak RECIPE             the tool, on the clean recipe and on the broken one
    minituner train RECIPE --inject packed-leak     a whole run with the fault, in a folder that says so

A fault replaces one function of the real pipeline while a `with` block runs, from outside: nothing imports this
package, and without it nothing changes. Where minituner's own defence refuses the fault, the defence is run first, and
what it said is shown. Lessons: the museum's cells in notebooks 03, 04, 05, 07 and 09.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "FAULTS": "catalog",
    "Fault": "catalog",
    "find": "catalog",
    "injected": "injection",
    "Injection": "injection",
    "show": "exhibit",
    "practice": "practising",
    "train_injected": "run",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, so that the list is quick."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
