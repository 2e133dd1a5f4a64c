"""The mark of a run that is wrong on purpose, and the line between it and every other run.

    work_dirs/mine_injected_packed-leak/INJECTED.json      {"injected": "packed-leak", ...}

A fault of the museum (minituner/museum) is put in from outside; training only carries its name along. Marked folders
and clean ones are never mixed: neither is written into, nor resumed as, the other. Lesson: notebook 03.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minituner.errors import UsageError

MARK = "INJECTED.json"
CONTENTS = ("runs", "checkpoints", "hf", "latest", "recipe.yaml")  # what a run leaves in its folder


def mark(work_dir: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Write the mark into a run's folder; `facts` are what else it says.

    Raises:
        UsageError: the folder cannot be written.
    """
    values = {"injected": name, "warning": "this run is wrong on purpose; do not use what it made", **facts}
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        (work_dir / MARK).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write into --work-dir {work_dir}: {error.strerror}") from None


def fault_of(work_dir: Path) -> str | None:
    """The fault that a run's folder is marked with; None for a clean one.

    Raises:
        UsageError: the mark is there and cannot be read.
    """
    file = work_dir / MARK
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["injected"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} cannot be read: {error}", fix="train into another --work-dir") from None


def refuse_mixed(work_dir: Path, injected: str | None) -> None:
    """Stop before a clean run and one with an injected fault meet in one folder.

    Raises:
        UsageError: `work_dir` belongs to a run with another fault, or with none.
    """
    there = fault_of(work_dir)
    if there == injected:
        return
    if there is None and not any((work_dir / name).exists() for name in CONTENTS):
        return
    what = f"a run with the injected fault {there}" if there else "a clean run"
    asked = f"with --inject {injected}" if injected else "without --inject"
    raise UsageError(
        f"{work_dir} holds {what}, and this one is started {asked}",
        why="a run that is wrong on purpose must never be taken for another, nor go on as one",
        fix=f"another --work-dir{f', or --inject {there}' if there else ''}",
    )
