"""The data benchmark: figures of fresh processes, the same work on both sides, and nothing left behind."""

from __future__ import annotations

import datetime
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from minituner.cli import app
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import encode
from minituner.data.formats import to_conversation
from minituner.data.packing import pack
from minituner.errors import MinitunerError, UsageError
from minituner.plan.bench_data import BenchOptions, bench_data, measure, median_run, ratios, time_inspect
from minituner.plan.bench_trl import MARK, to_messages, with_generation_marks
from minituner.plan.bench_worker import draw_lengths
from minituner.plan.machine import machine_facts, peak_rss_mb
from tests.tiny import CHATML, tiny_tokenizer

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "help<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BACKSLASHES = SMOLLM.replace("\n", "\\n")  # a template file may write the line break as \n
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def quiet(_: str) -> None:
    pass


@pytest.mark.slow
def test_every_part_is_measured_and_nothing_is_left(model_folder: Path, own_home: Path) -> None:
    said: list[str] = []
    options = BenchOptions(
        records=40, runs=1, pack_lengths=(500, 2000), file_mb=1, max_length=4096, model=str(model_folder)
    )
    figures = bench_data(options, say=said.append)
    assert json.loads(json.dumps(figures)) == json.loads(json.dumps(figures, allow_nan=False))
    assert figures["settings"]["records"] == 40
    for side in ("minituner", "minituner_one_thread"):
        row = figures["prepare"][side]
        assert row["records"] == 40
        assert 0 < row["supervised_tokens"] < row["tokens"]
        assert row["records_per_second"] == pytest.approx(40 / row["seconds"], rel=0.05)
        assert row["peak_rss_mb"] >= row["rss_before_mb"] > 0
        assert row["seconds_of_each_run"] == [row["seconds"]]
    assert "ratios" not in figures["prepare"]
    rows = [(row["distribution"], row["max_length"], row["records"]) for row in figures["pack"]]
    assert rows == [("alpaca", 4096, 500), ("alpaca", 4096, 2000), ("uniform", 8192, 500), ("uniform", 8192, 2000)]
    assert all(0 < row["fill"] <= 1 for row in figures["pack"])
    first = figures["first_sample"]
    assert first["file_mb"] >= 1
    assert first["tokens"] > 0
    assert 0 < first["seconds"] < first["inspect_seconds"]
    assert not own_home.exists()
    assert any("minituner_one_thread" in line for line in said)


def test_only_the_parts_asked_for() -> None:
    figures = bench_data(BenchOptions(parts=("pack",), pack_lengths=(100,), runs=1), say=quiet)
    assert set(figures) == {"machine", "settings", "pack"}


def test_peak_memory_is_the_child_s_own(tmp_path: Path) -> None:
    """getrusage in a child would report the peak of the process that started it."""
    block = np.ones(60_000_000)  # 480 MB here
    assert peak_rss_mb() > block.nbytes / 1e6
    spec = {"job": "pack", "distribution": "alpaca", "max_length": 4096, "count": 1000, "seed": 1}
    assert measure(spec, tmp_path)["peak_rss_mb"] < 200
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_failed_process_says_its_last_words(tmp_path: Path) -> None:
    spec = {"job": "pack", "distribution": "uniform", "max_length": 0, "count": 10, "seed": 1}
    with pytest.raises(MinitunerError, match=r"\(pack\) failed with exit status 1.*\n.*why:"):
        measure(spec, tmp_path)
    spec = {"job": "first_sample", "tokenizer": str(tmp_path), "path": "x.jsonl", "max_length": 8}
    with pytest.raises(MinitunerError, match="cannot load a tokenizer"):
        measure(spec, tmp_path)
    assert not list(tmp_path.iterdir())


def test_inspect_without_a_sample_is_an_error(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(MinitunerError, match=r"showed no sample of none\.jsonl"):
        time_inspect(tmp_path / "none.jsonl", str(model_folder), tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"parts": ("packs",)}, "did you mean 'pack'"),
        ({"against": "axolotl"}, "one of trl"),
        ({"records": 0}, "nothing to measure"),
        ({"runs": 0}, "nothing to measure"),
    ],
)
def test_impossible_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        BenchOptions(**options).check()


def test_a_rival_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "data", "--against", "trl"])
    assert isinstance(result.exception, UsageError)
    assert "pip install --no-deps trl" in str(result.exception)


def run_of(seconds: float, peak: float, tokens: int = 500) -> dict[str, Any]:
    return {"seconds": seconds, "cpu_seconds": seconds, "peak_rss_mb": peak, "records": 10, "tokens": tokens, "fill": 1}


def test_runs_become_a_median_with_the_highest_peak() -> None:
    one = median_run([run_of(2.0, 100.0), run_of(1.0, 300.0), run_of(9.0, 200.0)])
    assert (one["seconds"], one["peak_rss_mb"]) == (2.0, 300.0)
    assert (one["records_per_second"], one["tokens_per_second"]) == (5, 250)
    assert one["seconds_of_each_run"] == [2.0, 1.0, 9.0]
    assert ratios(one, one) == {"speed": 1.0, "speed_by_cpu_seconds": 1.0, "peak_rss": 1.0}


def test_runs_that_disagree_about_tokens_are_refused() -> None:
    with pytest.raises(MinitunerError, match="different counts"):
        median_run([run_of(1.0, 1.0), run_of(1.0, 1.0, tokens=501)])


@pytest.mark.parametrize(("distribution", "max_length"), [("alpaca", 4096), ("uniform", 8192)])
def test_drawn_lengths(distribution: str, max_length: int) -> None:
    lengths = draw_lengths(distribution, 200_000, max_length, 1)
    assert lengths.dtype == np.int32
    assert lengths.min() >= 1
    assert lengths.max() <= max_length
    assert np.array_equal(lengths, draw_lengths(distribution, 200_000, max_length, 1))
    assert not np.array_equal(lengths, draw_lengths(distribution, 200_000, max_length, 2))
    if distribution == "alpaca":
        assert 110 < np.median(lengths) < 130
        assert pack(lengths, max_length).fill >= 0.995


@pytest.mark.parametrize("template", [CHATML, SMOLLM, BACKSLASHES])
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text("ab 你好，\n{}%'<|>", max_size=12), min_size=1, max_size=4))
def test_marks_change_no_text_and_name_the_answers(template: str, texts: list[str]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    marked = with_generation_marks(template)
    assert MARK.search(marked)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    plain, _ = render_jinja_template(conversations=[messages], chat_template=template)
    text, marks = render_jinja_template(
        conversations=[messages], chat_template=marked, return_assistant_tokens_mask=True
    )
    assert text == plain
    assert [text[0][start:end] for start, end in marks[0]] == [f"{answer}<|im_end|>" for answer in texts[1::2]]


def test_marked_and_foreign_templates_stay_as_they_are() -> None:
    marked = with_generation_marks(SMOLLM)
    assert with_generation_marks(marked) == marked
    assert with_generation_marks("{{ messages[0].content }}") == "{{ messages[0].content }}"


@pytest.mark.parametrize("template", [CHATML, SMOLLM])
def test_the_rival_is_asked_to_train_the_tokens_that_we_train(template: str) -> None:
    """What TRL's tokeniser call gives for the marked template is what `encode` gives for the plain one."""
    row = {"instruction": "翻译：", "input": "good morning", "output": "早上好 {x}"}
    tokenizer = tiny_tokenizer(with_generation_marks(template))
    theirs = tokenizer.apply_chat_template(
        to_messages(row)["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    conversation = to_conversation(row, "alpaca")
    assert conversation.to_dicts() == to_messages(row)["messages"]
    ours = encode(conversation, tiny_tokenizer(template))
    assert ours["input_ids"] == theirs["input_ids"]
    assert [label != -100 for label in ours["labels"]] == [bool(mask) for mask in theirs["assistant_masks"]]
    assert to_conversation({**row, "input": ""}, "alpaca").to_dicts() == to_messages({**row, "input": ""})["messages"]
    assert conversation == Conversation([Message("user", "翻译：\ngood morning"), Message("assistant", "早上好 {x}")])


@pytest.mark.slow
@needs_trl
def test_trl_counts_the_same_tokens(model_folder: Path) -> None:
    options = BenchOptions(
        records=30, runs=1, against="trl", parts=("prepare",), max_length=4096, model=str(model_folder)
    )
    sides = bench_data(options, say=quiet)["prepare"]
    for key in ("records", "tokens", "supervised_tokens", "packs"):
        assert sides["trl"][key] == sides["minituner"][key]
    assert sides["trl"]["seconds_with_reading"] > sides["trl"]["seconds"]
    assert set(sides["ratios"]) == {"minituner", "minituner_one_thread"}


def test_machine_facts() -> None:
    facts = machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["tokenizers"][0].isdigit()
    assert datetime.date.fromisoformat(facts["date"])


def test_the_command_prints_json_and_nothing_else() -> None:
    result = CliRunner().invoke(app, ["bench", "data", "--only", "pack", "--pack-lengths", "300", "--runs", "1"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert [row["records"] for row in figures["pack"]] == [300, 300]
    assert "300 alpaca lengths" in result.stderr


def test_one_gb_is_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BenchOptions] = []
    monkeypatch.setattr("minituner.plan.bench_data.bench_data", lambda options, say: seen.append(options) or {})
    assert CliRunner().invoke(app, ["bench", "data", "--one-gb"]).exit_code == 0
    assert CliRunner().invoke(app, ["bench", "data", "--file-mb", "7"]).exit_code == 0
    assert [options.file_mb for options in seen] == [1000, 7]
    assert seen[0] == BenchOptions(file_mb=1000)
