"""What is really run: the probe's steps are the recipe's own, and one rank holds what the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest

from minituner import estimate
from minituner.data.prepare import prepare
from minituner.errors import UsageError
from minituner.model.loading import load_tokenizer
from minituner.plan.probe import real_steps
from minituner.train.feed import Feed
from minituner.train.ranks import Ranks
from minituner.train.weigh import weigh
from tests.tiny import tiny_recipe


@pytest.mark.slow
def test_its_steps_are_those_of_the_recipe(model_folder: Path, chats: Path, own_home: Path) -> None:
    recipe = tiny_recipe(model_folder, chats)
    seen = real_steps(recipe, steps=2)
    feed = Feed(prepare(recipe.data, load_tokenizer(model_folder), say=lambda line: None), recipe)
    assert list(seen.tokens) == [sum(batch.tokens for batch in feed.window(step)) for step in range(2)]
    assert len(seen.seconds) == 2
    assert min(seen.seconds) > 0
    assert seen.flops_per_second == pytest.approx(seen.flops[1] / seen.seconds[1])
    assert 0 < seen.program_bytes <= seen.peak_bytes


def test_no_steps_are_refused(model_folder: Path, chats: Path) -> None:
    with pytest.raises(UsageError, match="at least one step"):
        real_steps(tiny_recipe(model_folder, chats), steps=0)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_one_rank_holds_what_a_real_run_holds(method: str, model_folder: Path, chats: Path, own_home: Path) -> None:
    recipe = tiny_recipe(model_folder, chats, method={"name": method})
    held = weigh(Ranks(), recipe.model_dump(mode="json"))
    plan = estimate(recipe, device="cpu")
    for part in ("weights", "gradients", "optimizer"):
        assert plan.parts[part] == pytest.approx(held[part], rel=0.02), part
