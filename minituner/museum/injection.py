"""Injection: one function of the pipeline is another one while a `with` block runs, and loudly so.

    with injected("pad-as-eos") as injection:
        train(...)                          the real pipeline, with one function replaced
        injection.acted                     how often the fault found something to spoil
        injection.refusals                  what the defences said that would have kept it out

Everything is put back afterwards, also after an error. A fault that found nothing to spoil is an error of its own: a
clean run that calls itself broken teaches nothing. Lessons: the museum's cells in notebooks 03, 04, 05, 07 and 09.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from minituner.errors import MinitunerError, UsageError
from minituner.museum.catalog import Fault, find

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Refusal:
    """What one of minituner's defences said about the fault, word for word."""

    defence: str
    text: str


@dataclass(slots=True)
class Injection:
    """A fault while it is in: how often it acted, and which defences were asked and switched off."""

    fault: Fault
    say: Say
    acted: int = 0
    refusals: list[Refusal] = field(default_factory=list)

    def refused(self, defence: str, error: MinitunerError) -> None:
        """Enter and say what a defence said; it is switched off from here on."""
        refusal = Refusal(defence, error.text())
        self.refusals.append(refusal)
        self.say(f"museum: {defence} would refuse this. It is switched off here, and this is what it says:")
        for line in refusal.text.splitlines():
            self.say(f"    | {line}")

    def must_have_acted(self) -> None:
        """Stop a run in which there was nothing to spoil.

        Raises:
            UsageError: the fault never acted.
        """
        if not self.acted:
            raise UsageError(
                f"{self.fault.name} found nothing to spoil in this run: it was as good as clean",
                why="; ".join(self.fault.what.split(": ")[:1]),
                fix="a recipe in which the fault can happen",
                next_command=f"minituner museum {self.fault.name}",
            )


@contextmanager
def injected(name: str, say: Say = print) -> Iterator[Injection]:
    """Within: the fault is in the pipeline of this process.

    Raises:
        UsageError: there is no such fault.
    """
    fault = find(name)
    injection = Injection(fault, say)
    with put_in(fault)(injection):
        yield injection


def put_in(fault: Fault) -> Callable[[Injection], AbstractContextManager[None]]:
    """The context manager that puts the fault in: the function of its name in its room."""
    return getattr(import_module(f"minituner.museum.{fault.room}"), fault.name.replace("-", "_"))


def part(name: str) -> ModuleType:
    """A module of the package, `part("data.prepare")`; also where a function of that name hides it."""
    return import_module(f"minituner.{name}")


@contextmanager
def replaced(place: Any, **names: Any) -> Iterator[None]:
    """Within: the named attributes of a module or an object are these.

    A module that is imported meanwhile may have taken one over (`from ... import encode_many`); it gets the right one.
    """
    before = {name: getattr(place, name) for name in names}
    try:
        for name, value in names.items():
            setattr(place, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(place, name, value)
            for module in [m for key, m in list(sys.modules.items()) if key.startswith("minituner.")]:
                for taken in [key for key, found in vars(module).items() if found is names[name]]:
                    setattr(module, taken, value)


@contextmanager
def own_cache(injection: Injection) -> Iterator[None]:
    """Within: prepared data are kept under a name of the fault's own, so that no clean run ever finds them."""
    prepare = part("data.prepare")
    clean_name = prepare.fingerprint

    def fingerprint(*arguments: Any, **options: Any) -> str:
        return f"{clean_name(*arguments, **options)}-injected-{injection.fault.name}"

    with replaced(prepare, fingerprint=fingerprint):
        yield
