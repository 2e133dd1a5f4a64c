"""Run notebooks from top to bottom and write their outputs back, in the one form that is committed.

    python -m tests.notebooks.refresh               all of them (`make notebooks-refresh`)
    python -m tests.notebooks.refresh 03 04         those whose names begin so

A notebook is replaced only when all of its cells ran. What differs from run to run and means nothing is left out:
execution times, widget state, the version of Python, how output was cut into pieces.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"


def normalised(notebook: Any) -> Any:
    """The notebook without what changes from run to run: changed in place, and returned."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            cell.outputs = _joined([o for o in cell.outputs if WIDGET not in o.get("data", {})])
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Neighbouring pieces of one stream as one."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            output.pop("metadata", None) if output.output_type == "stream" else None
            joined.append(output)
    return joined


def refresh(path: Path) -> float:
    """Run a notebook where it lies and replace it; the seconds it took.

    Raises:
        CellExecutionError: a cell failed; the file is as it was.
    """
    notebook, start = nbformat.read(path, as_version=4), time.monotonic()
    NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    aside = path.with_suffix(".aside")
    aside.write_text(nbformat.writes(normalised(notebook)) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return time.monotonic() - start


def main(names: list[str]) -> int:
    """Refresh the notebooks whose names begin with one of `names` (none: all); the exit status."""
    chosen = [path for path in sorted(FOLDER.glob("*.ipynb")) if not names or path.name.startswith(tuple(names))]
    if not chosen:
        print(f"no notebook begins with {', '.join(names)}", file=sys.stderr)
        return 2
    failed = 0
    for path in chosen:
        try:
            print(f"{path.name}: {refresh(path):.0f} s", flush=True)
        except CellExecutionError as error:
            failed += 1
            print(f"{path.name}: FAILED, the file is as it was\n{error}", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
