"""The attention support table: which implementations this machine can use, and what the others need.

    implementation      here  isolates  why, or what it needs
    flash_attention_2   no    yes       needs a CUDA GPU; needs flash-attn, which is not installed
    per_document_sdpa   yes   yes       one causal SDPA call per document
    sdpa                yes   no        one causal mask for the whole row

It is the table that training decides by (`model/attention_choice.py`), read aloud for this machine: the two cannot
disagree. Lesson: notebook 06.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from minituner.model.attention_choice import EVERYTHING, TABLE, Facts, Needs, choose, facts_here, misfits


@dataclass(frozen=True)
class Support:
    """One implementation on one machine."""

    implementation: str
    usable: bool
    why: str  # what it is where it is usable, else everything that it needs
    isolates: bool  # keeps packed documents apart
    cannot: tuple[str, ...]  # dropout, soft-capping, sinks, sliding windows: models that use these go another way
    chosen: bool  # what model.attention=auto takes for a plain model


def attention_support(facts: Facts | None = None, needs: Needs | None = None) -> list[Support]:
    """The table for this machine (or for `facts` of another), the fastest implementation first.

    Args:
        facts: None looks at this machine, with the data type that `model.dtype=auto` takes here.
        needs: of a model; None is a plain Llama-like one.
    """
    facts, needs = facts or _facts(), needs or Needs()
    best, _ = choose("auto", facts, needs, one_document_rows=False)
    rows = []
    for row in TABLE:
        problems = misfits(row, facts, needs)
        cannot = tuple(sorted(EVERYTHING - row.can))
        why = "; ".join(problems) or row.about
        rows.append(Support(row.name, not problems, why, row.isolates, cannot, row.name == best))
    return rows


def as_lines(rows: list[Support]) -> list[str]:
    """The table as aligned text; * marks what `auto` takes."""
    head = ("implementation", "here", "isolates", "has no", "why, or what it needs")
    cells = [
        (
            row.implementation + " *" * row.chosen,
            "yes" if row.usable else "no",
            "yes" if row.isolates else "no",
            ", ".join(row.cannot) or "-",
            row.why,
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]])
        for line in (head, *cells)
    ]


def as_values(rows: list[Support]) -> list[dict[str, Any]]:
    """The table for programs."""
    return [asdict(row) | {"cannot": list(row.cannot)} for row in rows]


def _facts() -> Facts:
    from minituner.model.loading import device_of_this_machine, fast_dtype

    device = device_of_this_machine()
    dtype, _ = fast_dtype(device)
    return facts_here(device, str(dtype).removeprefix("torch."))
