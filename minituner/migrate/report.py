"""What became of each setting of an old config, as a table that people and programs read.

    setting in the old config            became                                 why
    lr = 2e-4                            train.learning_rate = 0.0002           carried
    evaluation_freq = 500                evaluate.every_steps = 32              changed: it counted micro-batches ...
    llm.trust_remote_code = True         -                                      not supported / left out: ...

A setting is carried, changed (and why), not supported, or without meaning here; nothing is dropped unsaid.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from minituner.migrate.folding import Call, Ref, Unread
from minituner.recipe import Recipe

Fate = Literal["carried", "changed", "not supported", "not needed"]


@dataclass(frozen=True)
class Row:
    """One setting: where it stood, what it became here (None: nothing), and why."""

    fate: Fate
    old: str
    new: str | None
    why: str = ""


@dataclass
class Imported:
    """A recipe made from an old config, what became of each setting, and its arithmetic line by line."""

    kind: str
    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    arithmetic: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, old: str, fate: Fate = "carried", why: str = "") -> None:
        """Set a recipe value by its dotted key, and say so; what is no plain value is left, and that is said."""
        if not _is_plain(value):
            self.leave(old, f"{key} needs a plain value, and nothing is run to get one")
            return
        section, _, name = key.partition(".")
        self.values.setdefault(section, {})[name] = value
        self.rows.append(Row(fate, old, f"{key} = {short(value)}", why))

    def leave(self, old: str, why: str, fate: Fate = "not supported") -> None:
        """Say what is not taken over."""
        self.rows.append(Row(fate, old, None, why))

    @property
    def recipe(self) -> Recipe:
        """The recipe, checked.

        Raises:
            UsageError: the values contradict each other; all problems are listed.
        """
        return Recipe.from_values(self.values, f"the recipe made from {self.path}")

    def to_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "kind": self.kind,
            "rows": [asdict(row) for row in self.rows],
            "arithmetic": self.arithmetic,
            "recipe": self.recipe.model_dump(mode="json"),
        }

    def lines(self) -> list[str]:
        """The table as text, one group for each fate."""
        out = []
        for fate in ("carried", "changed", "not supported", "not needed"):
            rows = [row for row in self.rows if row.fate == fate]
            if not rows:
                continue
            out.append(f"{fate} ({len(rows)})")
            width = min(max(len(row.old) for row in rows), 52)
            for row in rows:
                out.append(f"  {row.old:{width}}  {'-> ' + row.new if row.new else ''}".rstrip())
                if row.why:
                    out.append(f"  {'':{width}}     {row.why}")
        if self.arithmetic:
            out += ["batch arithmetic", *("  " + line for line in self.arithmetic)]
        return out


def short(value: Any, limit: int = 60) -> str:
    """A value as a few words; never walks through a large or shared structure."""
    if isinstance(value, Ref):
        text = value.path
    elif isinstance(value, Call):
        text = f"{value.function}(...)"
    elif isinstance(value, Unread):
        text = value.text
    elif isinstance(value, list | tuple | dict):
        plain = len(value) <= 6 and all(isinstance(v, str | int | float | bool | type(None)) for v in value)
        text = repr(value) if plain and not isinstance(value, dict) else f"{type(value).__name__} of {len(value)}"
    else:
        text = repr(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _is_plain(value: Any) -> bool:
    """A single value, or a list of them. What an old config builds may be nested without end, or hold itself."""
    single = str | int | float | bool | None
    return isinstance(value, single) or (isinstance(value, list) and all(isinstance(one, single) for one in value))


def next_commands(recipe: Path) -> list[str]:
    """What to do with a recipe that was just written."""
    return [
        shlex.join(["minituner", "check", str(recipe)]),
        shlex.join(["minituner", "train", str(recipe), "--dry-run"]),
        shlex.join(["minituner", "train", str(recipe)]),
    ]
