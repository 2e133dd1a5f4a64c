"""A dry run: everything that can go wrong before the first step, without loading the model."""

from __future__ import annotations

from collections.abc import Callable

from minituner.data.prepare import prepare
from minituner.model.loading import load_tokenizer
from minituner.model.sources import fetch
from minituner.recipe import Recipe
from minituner.train.context import refuse_longer_than_model
from minituner.train.feed import Feed


def dry_run(recipe: Recipe, say: Callable[[str], None] = print) -> None:
    """Print the resolved recipe, the ledger, and how many steps there would be."""
    say(recipe.dump())
    folder = fetch(recipe.model.name_or_path, source=recipe.model.source, revision=recipe.model.revision, say=say)
    tokenizer = load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)
    prepared = prepare(recipe.data, tokenizer, seed=recipe.train.seed, say=say)
    for line in prepared.ledger.lines():
        say(line)
    refuse_longer_than_model(prepared, recipe, folder)
    feed = Feed(prepared, recipe)
    say(f"{len(prepared.packs)} packs, {prepared.packs.fill:.1%} full; {feed.steps_per_epoch} steps an epoch")
    say(f"{feed.total_steps} optimizer steps in all; nothing was trained (--dry-run)")
