"""The curves of a run: joined over resumptions, readable while it is written, the same numbers as its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minituner import viz
from minituner.errors import UsageError
from minituner.train.loop import train
from minituner.viz.run import plot, run_curves
from tests.tiny import tiny_recipe
from tests.train.processes import run_command


def write_run(work_dir: Path, stamp: str, lines: list[dict[str, Any]], tail: str = "") -> None:
    folder = work_dir / "runs" / stamp
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines) + tail
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def steps(first: int, last: int, loss: float) -> list[dict[str, Any]]:
    shared = {"learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 100.0, "gemm_share": 0.4}
    return [{"step": step, "loss": loss, **shared} for step in range(first, last + 1)]


def test_a_resumed_training_is_one_curve(tmp_path: Path) -> None:
    write_run(tmp_path, "20261121-101500-9", [{"step": 0, "eval_loss": 9.0}, *steps(1, 7, 3.0)])
    evaluated = {"step": 5, "eval_loss": 4.0}
    write_run(tmp_path, "20261121-101500-10", [evaluated, *steps(6, 9, 2.0), {"step": 9, "eval_loss": 3.5}])
    write_run(tmp_path, "20261121-110000", [])  # has just started
    data = run_curves(tmp_path).data
    assert data["steps"].tolist() == list(range(1, 10))
    assert data["loss"].tolist() == [3.0] * 5 + [2.0] * 4, "steps 6 and 7 of the killed run are not what was kept"
    assert dict(zip(data["eval_steps"].tolist(), data["eval_loss"].tolist(), strict=True)) == {0: 9.0, 5: 4.0, 9: 3.5}
    assert data["runs"] == ["20261121-101500-9", "20261121-101500-10"]
    assert data["resumed_at"] == [6]


def test_a_new_start_in_the_same_folder_is_not_joined_to_the_old_one(tmp_path: Path) -> None:
    write_run(tmp_path, "20261121-101500", [{"step": 0, "eval_loss": 9.0}, *steps(1, 7, 3.0)])
    write_run(tmp_path, "20261121-111500", [{"step": 0, "eval_loss": 8.0}, *steps(1, 2, 1.0)])
    data = run_curves(tmp_path).data
    assert data["loss"].tolist() == [1.0, 1.0]
    assert data["eval_loss"].tolist() == [8.0]


def test_a_line_that_is_being_written_and_a_broken_one_do_no_harm(tmp_path: Path) -> None:
    cut = '{"step": 3, "lo'
    write_run(tmp_path, "20261121-101500", steps(1, 2, 3.0), tail="\x00broken\n" + '{"loss": 1}\n[]\n' + cut)
    picture = run_curves(tmp_path)
    assert picture.data["steps"].tolist() == [1, 2]
    assert picture.data["unreadable"] == 3, "the cut last line is not counted: it is being written"
    assert "3 broken lines" in picture.summary


def test_losses_that_are_not_finite_leave_a_gap_and_are_counted(tmp_path: Path) -> None:
    lines = steps(1, 3, 2.0)
    lines[1]["loss"] = "nan"
    lines[2]["grad_norm"] = "inf"
    write_run(tmp_path, "20261121-101500", lines)
    facts = plot(tmp_path)
    assert facts["loss"] == [2.0, None, 2.0]
    assert facts["grad_norm"] == [0.5, 0.5, None]
    assert "1 steps not finite" in facts["summary"]
    json.dumps(facts, allow_nan=False)


def test_the_summary_names_the_lowest_held_out_loss(tmp_path: Path) -> None:
    evaluated = [{"step": step, "eval_loss": loss} for step, loss in ((0, 5.0), (2, 1.5), (4, 2.5))]
    write_run(tmp_path, "20261121-101500", [*steps(1, 4, 2.0), *evaluated])
    assert "eval_loss 2.5000, lowest 1.5000 at step 2" in run_curves(tmp_path).summary


def test_what_is_drawn_is_the_data(tmp_path: Path) -> None:
    write_run(tmp_path, "20261121-101500", [*steps(1, 4, 2.0), {"step": 4, "eval_loss": 2.5}])
    picture = viz.run_curves(tmp_path)
    drawn = {axes.get_ylabel(): axes for axes in picture.figure.axes}
    labels = ["loss per trained token", "learning rate", "gradient norm", "tokens/s"]
    assert list(drawn) == labels
    for label, name in zip(labels[1:], ("learning_rate", "grad_norm", "tokens_per_second"), strict=True):
        assert np.array_equal(drawn[label].lines[0].get_ydata(), picture.data[name])
    curves = {line.get_label(): line for line in drawn[labels[0]].lines}
    assert np.array_equal(curves["eval_loss (held out)"].get_ydata(), [2.5])
    assert picture._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "holds no run"), ([], "has finished a step yet"), ([{"step": 0, "eval_loss": 1}], "yet")],
)
def test_nothing_to_draw_is_said(content: list[dict[str, Any]] | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        write_run(tmp_path, "20261121-101500", content)
    with pytest.raises(UsageError, match=said):
        run_curves(tmp_path)


@pytest.mark.slow
def test_a_picture_goes_where_it_can(tmp_path: Path) -> None:
    write_run(tmp_path, "20261121-101500", steps(1, 2, 3.0))
    for name, start in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.pdf", b"%PDF")):
        assert plot(tmp_path, tmp_path / name)["file"] == str(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(UsageError, match="kind of picture"):
        plot(tmp_path, tmp_path / "a.docx")
    with pytest.raises(UsageError, match="cannot write"):
        plot(tmp_path, tmp_path / "nowhere" / "a.png")


@pytest.mark.slow
def test_the_command_draws_a_real_run_and_prints_the_same_numbers(
    own_home: Path, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(model_folder, chats, data={"holdout": 0.2}, train={"max_steps": 3})
    result = train(recipe, tmp_path / "w", say=lambda line: None)
    status, output = run_command(["plot", "w", "--json"], tmp_path)
    assert status == 0, output
    facts = json.loads(output)
    assert facts["loss"] == [line["loss"] for line in result.metrics]
    assert facts["tokens_per_second"] == [line["tokens_per_second"] for line in result.metrics]
    assert dict(zip(facts["eval_steps"], facts["eval_loss"], strict=True)) == result.eval_losses
    assert (tmp_path / "w" / "plot.png").is_file()
    status, output = run_command(["plot", "w", "-o", "curves.svg"], tmp_path)
    assert status == 0, output
    assert output.splitlines()[-1] == "curves.svg"
    status, output = run_command(["plot", "elsewhere"], tmp_path)
    assert status == 2
    assert "elsewhere holds no run" in output
