"""Refreshing keeps what a reader sees, drops what changes without meaning, and replaces nothing when a cell fails."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.notebooks import refresh


def test_normalising_keeps_outputs_and_is_done_once() -> None:
    cell = new_code_cell("x", metadata={"tags": ["nbval-check-output"], "execution": {"a": "b"}, "scrolled": True})
    cell.outputs = [
        new_output("stream", name="stdout", text="a\n"),
        new_output("stream", name="stdout", text="b\n"),
        new_output("stream", name="stderr", text="c\n"),
        new_output("display_data", data={refresh.WIDGET: {"model_id": "1"}, "text/plain": "Widget"}),
        new_output("execute_result", data={"text/plain": "4"}, execution_count=1),
    ]
    notebook = new_notebook(cells=[new_markdown_cell("# A"), cell], metadata={"widgets": {"state": {}}})
    done = refresh.normalised(notebook)
    nbformat.validate(done)
    assert [(o.output_type, o.get("text")) for o in done.cells[1].outputs] == [
        ("stream", "a\nb\n"),
        ("stream", "c\n"),
        ("execute_result", None),
    ]
    assert done.cells[1].metadata == {"tags": ["nbval-check-output"]}
    assert "widgets" not in done.metadata
    once = nbformat.writes(done)
    assert nbformat.writes(refresh.normalised(done)) == once


@pytest.mark.slow
def test_a_failing_notebook_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh, "FOLDER", tmp_path)
    path = tmp_path / "00_a.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("print(1)"), new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError):
        refresh.refresh(path)
    assert path.read_bytes() == before
    assert refresh.main(["00"]) == 1
    assert refresh.main(["07"]) == 2
    nbformat.write(new_notebook(cells=[new_code_cell("print(1)")]), path)
    assert refresh.main([]) == 0
    assert nbformat.read(path, as_version=4).cells[0].outputs[0].text == "1\n"
