"""Lesson 09's exercises: their right values are those of a real session, a real merge and a real check."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minituner.camp.lesson_09 import EXERCISES, LEVELS
from minituner.chat.loaded import LoadedModel, Voice
from minituner.chat.session import Session
from minituner.data.conversation import Message
from minituner.errors import UsageError
from minituner.export.serving import PROGRAMS, what_servers_read
from tests.export.test_parity import full_folder
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer


def test_a_merged_layer_is_the_layer_with_its_adapter() -> None:
    weight, a, b, alpha = np.eye(3), np.ones((2, 3)), np.arange(6.0).reshape(3, 2), 8.0
    x = np.array([1.0, -2.0, 0.5])
    right = EXERCISES["1"].right(weight, a, b, alpha)
    assert np.allclose(right @ x, weight @ x + alpha / 2 * b @ (a @ x))


def test_a_merge_that_changes_nothing_loses_nothing() -> None:
    base, trained = [[0.5, 0.5], [0.2, 0.8]], [[0.9, 0.1], [0.3, 0.7]]
    assert EXERCISES["2"].right(base, trained, trained) == pytest.approx(0, abs=1e-12)
    assert EXERCISES["2"].right(base, trained, base) > 0.2, "going back to the base is refused"


def test_small_changes_do_not_survive_the_grid_and_large_ones_do() -> None:
    gap = min(b - a for a, b in itertools.pairwise(LEVELS))
    weights = [2.0, *(2 * level for level in LEVELS[1:-1])]
    for share, survives in ((0.45, False), (1.0, True)):
        updates = [0.0, *[2 * gap * share] * (len(weights) - 1)]
        assert any(EXERCISES["3"].right(weights, updates, LEVELS)) == survives


def test_stop_ids_are_those_that_the_check_reports(tmp_path: Path) -> None:
    folder = full_folder(tiny_folder(tmp_path / "base"), tmp_path / "full")
    settings = {"eos_token_id": [7, 9]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    found = {r.program: r.found for r in what_servers_read(folder) if r.item == "stop ids"}
    assert found == {p: ", ".join(map(str, EXERCISES["4"].right(p, settings, 258))) for p in PROGRAMS}


@pytest.mark.parametrize(("answer", "context"), [(20, 300), (20, 200), (60, 200), (20, 120), (20, 40)])
def test_the_turns_that_are_sent_are_those_of_a_real_session(answer: int, context: int) -> None:
    """Lengths are measured with a real tokenizer and template, whose turns only add up."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    model.config.max_position_embeddings = context
    session = Session(LoadedModel(model, tokenizer, {"model": Voice("native", None, tokenizer)}))
    alone = len(session.prompt_ids("hello"))
    turns = []
    for text in ("a" * 9, "b" * 30, "c" * 3):
        session.messages += [Message("user", text), Message("assistant", text)]
        turns.append(len(session.prompt_ids("hello")) - alone - sum(turns))
    right = EXERCISES["5"].right(turns, alone, answer, context)
    torch.manual_seed(0)
    if right is None:
        with pytest.raises(UsageError, match="exceed"):
            session.ask("hello", settings=session.settings.__class__(max_new_tokens=answer))
    else:
        session.ask("hello", settings=session.settings.__class__(max_new_tokens=answer))
        assert session.first == 2 * right
