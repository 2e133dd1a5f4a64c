"""Metrics say what happened: seconds add up, operations are those of the very windows, totals survive a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minituner import Recipe
from minituner.plan.flops import gemm_rate, model_flops
from minituner.train.callbacks import Callback
from minituner.train.loop import train
from minituner.train.metrics import BETWEEN_STEPS, summary_line
from minituner.train.run import Run
from minituner.train.stopwatch import OVERHEAD, PARTS, Stopwatch
from tests.tiny import tiny_recipe


@given(
    st.lists(
        st.tuples(st.sampled_from([*PARTS[:-1], None]), st.integers(0, 1000)), max_size=20
    ),  # None: time that no part claims
    st.integers(0, 20),
)
def test_no_second_is_lost(events: list[tuple[str | None, int]], at: int) -> None:
    now = 0

    def clock() -> float:
        return float(now)

    watch = Stopwatch(now=clock)
    expected = dict.fromkeys(PARTS, 0.0)
    for number, (part, seconds) in enumerate(events):
        if number == at:
            watch.lap()
        if part is None:
            now += seconds
        else:
            with watch(part):
                now += seconds
        expected[part or "loop"] += seconds
    watch.lap()
    assert watch.totals == expected
    shares = watch.shares()
    assert sum(shares[part] for part in PARTS) == pytest.approx(1.0 if now else 0.0)
    assert shares["overhead"] == pytest.approx(sum(shares[part] for part in OVERHEAD))


def test_a_part_that_fails_is_booked_all_the_same() -> None:
    times = iter([0.0, 1.0, 4.0, 5.0])
    watch = Stopwatch(now=lambda: next(times))
    with pytest.raises(ValueError, match="broken"), watch("model"):
        raise ValueError("broken")
    assert watch.lap() == {**dict.fromkeys(PARTS, 0.0), "model": 3.0, "loop": 2.0}


class Windows(Callback):
    """Documents (without their tails) and tokens of each step, read once more from the feed."""

    def __init__(self) -> None:
        self.lengths: list[list[int]] = []
        self.computed: list[int] = []
        self.tokens: list[int] = []

    def on_step(self, run: Run, metrics: dict[str, Any]) -> None:
        self.run, window = run, run.feed.window(run.step - 1)
        self.lengths.append([n for batch in window for n in batch.seq_lens])
        self.computed.append(sum(batch.input_ids.shape[1] for batch in window))
        documents = (run.prepared.documents(n) for numbers in run.feed.packs(run.step - 1) for n in numbers)
        self.tokens.append(sum(len(ids) for pack in documents for ids, _ in pack))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_number_of_a_line_follows_from_the_step(
    checkpointing: bool, own_home: Path, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    watch = Windows()
    recipe = tiny_recipe(
        model_folder,
        chats,
        train={"max_steps": 6, "activation_checkpointing": checkpointing},
        save={"every_steps": 2},
        evaluate={"every_steps": 3},
        data={"holdout": 0.2},
    )
    result = train(recipe, tmp_path / "w", callbacks=[watch], say=said.append)
    flops = model_flops(watch.run.model, flows_to_embedding=checkpointing)
    rate = gemm_rate(torch.float32)
    total = trained = 0
    seen = zip(result.metrics, watch.lengths, watch.tokens, watch.computed, strict=True)
    for line, lengths, tokens, computed in seen:
        assert line["tokens"] == tokens > sum(lengths)
        assert line["computed_tokens"] == computed < sum(lengths)
        trained += line["supervised_tokens"]
        assert line["trained_tokens"] == trained
        operations = flops.of(computed, line["supervised_tokens"], sum(n * (n + 1) / 2 for n in lengths))
        total += operations
        assert line["model_flops_per_second"] * line["seconds"] == pytest.approx(operations)
        assert line["gemm_share"] == pytest.approx(line["model_flops_per_second"] / rate)
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(line["tokens"])
        parts = {part: line[f"seconds_{part}"] for part in PARTS}
        assert line["seconds"] == pytest.approx(sum(s for part, s in parts.items() if part not in BETWEEN_STEPS))
        assert min(parts["data"], parts["model"], parts["optimizer"], parts["loop"]) > 0
        assert 0.05 < line["peak_memory_gb"] < 100
    assert [line["seconds_saving"] > 0 for line in result.metrics] == [False, False, True, False, True, False]
    assert [line["seconds_evaluation"] > 0 for line in result.metrics] == [True, False, False, True, False, False]

    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary == result.summary
    assert summary["model_flops"] == pytest.approx(total)
    assert summary["steps"] == 6
    assert summary["tokens"] == sum(watch.tokens)
    assert summary["computed_tokens"] == sum(watch.computed) < summary["tokens"]
    in_lines = sum(line[f"seconds_{part}"] for line in result.metrics for part in PARTS)
    assert in_lines < summary["seconds"], "after the last line it still saved and evaluated"
    for part in ("data", "model", "optimizer", "waiting"):
        booked = sum(line[f"seconds_{part}"] for line in result.metrics)
        assert summary["seconds_by_part"][part] == pytest.approx(booked)
    assert sum(share for part, share in summary["shares"].items() if part != "overhead") == pytest.approx(1)
    assert summary_line(summary) in said
    assert summary_line(summary) in (result.run_dir / "log.txt").read_text().splitlines()
    assert summary_line(summary).startswith("time: ")


def test_trained_tokens_go_on_counting_after_a_resume(
    own_home: Path, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(model_folder, chats, train={"max_steps": 3})
    first = train(recipe, tmp_path / "w", say=lambda line: None)
    longer = Recipe.load(tmp_path / "w" / "recipe.yaml", ["train.max_steps=4"])
    second = train(longer, tmp_path / "w", resume="auto", say=lambda line: None)
    (line,) = second.metrics
    assert line["trained_tokens"] == first.metrics[-1]["trained_tokens"] + line["supervised_tokens"]


def test_a_run_that_is_stopped_has_a_summary_too(
    own_home: Path, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    from minituner.errors import MinitunerError

    class Break(Callback):
        def on_step(self, run: Run, metrics: dict[str, Any]) -> None:
            raise MinitunerError("broken")

    with pytest.raises(MinitunerError, match="broken"):
        train(tiny_recipe(model_folder, chats), tmp_path / "w", callbacks=[Break()], say=lambda line: None)
    (run_dir,) = (tmp_path / "w" / "runs").iterdir()
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 1
