"""Documents longer than the model's positions are refused before it is loaded; long rows of short ones are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minituner.errors import UsageError
from minituner.train.context import context_length
from minituner.train.dry_run import dry_run
from minituner.train.loop import train
from tests.tiny import tiny_folder, tiny_recipe


@pytest.fixture
def short_model(tmp_path: Path) -> Path:
    """The tiny model, made for 96 positions."""
    folder = tiny_folder(tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 96}))
    return folder


def test_a_document_beyond_the_model_s_positions_is_refused(
    short_model: Path, chats: Path, tmp_path: Path, own_home: Path
) -> None:
    assert context_length(short_model) == 96
    recipe = tiny_recipe(short_model, chats, data={"max_length": 4096})
    for start in (lambda: dry_run(recipe, lambda line: None), lambda: train(recipe, tmp_path / "w", progress=False)):
        with pytest.raises(UsageError, match=r"made for 96 positions") as caught:
            start()
        assert "data.max_length=96" in caught.value.fix


def test_a_long_row_of_short_documents_is_right_because_positions_restart(
    short_model: Path, chats: Path, tmp_path: Path, own_home: Path
) -> None:
    text = [json.loads(line) for line in chats.read_text().splitlines()]
    brief = [row for row in text if len(row["messages"]) == 2]
    chats.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in brief))
    dry_run(tiny_recipe(short_model, chats, data={"max_length": 256}), lambda line: None)
    joined = {"max_length": 256, "isolate_documents": False}
    with pytest.raises(UsageError, match=r"256 with data.isolate_documents=false: .* made for 96"):
        dry_run(tiny_recipe(short_model, chats, data=joined), lambda line: None)
