"""Which models of the catalog train here, said plainly: what `minituner list-models` prints.

    natively            transformers knows the architecture; built tiny, it takes two LoRA steps in the tests
    trust_remote_code   the model brings its own Python code, which runs only when you say so
    conversion          its published weights have to be changed first

Lesson: notebook 08.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minituner.catalog.lookup import load


def list_models(pattern: str | None = None) -> list[dict[str, Any]]:
    """The catalog's models whose key, family or hub id contains `pattern`, each with its key and how it trains."""
    wanted = (pattern or "").lower()
    rows = []
    for key, entry in load("models").items():
        if any(wanted in str(text).lower() for text in (key, entry["family"], entry["hub"])):
            rows.append({"key": key, "trains": how(entry), **entry})
    return rows


def how(entry: Mapping[str, Any]) -> str:
    """`natively`, or what is needed."""
    return "natively" if entry["native"] else str(entry["needs"])


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each model, grouped by family; the end says how many train natively."""
    out: list[str] = []
    width = max((len(row["key"]) for row in rows), default=0)
    family = None
    for row in rows:
        if row["family"] != family:
            family = row["family"]
            out.append(f"{family}  (architecture {row['architecture']}, {row['licence']}, trains {_needs(row)})")
            if row["notes"]:
                out.append(f"    {row['notes']}")
        where = row["hub"] or row["modelscope"]
        facts = f"{_size(row['size']):>6}  context {row['context']:>7}  {row['template']:16}"
        out.append(f"  {row['key']:{width}}  {facts}  {where}")
    native = sum(row["trains"] == "natively" for row in rows)
    out.append(f"{len(rows)} models: {native} train natively, {len(rows) - native} need something first (said above)")
    return out


def _needs(row: Mapping[str, Any]) -> str:
    return "natively" if row["trains"] == "natively" else f"only with {row['trains']}"


def _size(parameters: int | float) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
