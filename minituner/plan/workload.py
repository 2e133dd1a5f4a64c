"""The workload: what a recipe's data ask of a run, counted from the prepared packs; and where the model's shapes are.

    packs of 512   ->  steps, tokens, supervised tokens, attention pairs of the whole run
                   ->  the fullest micro-batch: the one that decides the memory

Where the data cannot be read here, nothing is made up: the fullest micro-batch is then a full row in which every token
is trained, the most there can be, and the number of steps is not known. Lesson: notebook 08.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minituner.data.collate import collate
from minituner.data.packing import Pieces
from minituner.data.prefixes import share_prefixes
from minituner.data.prepare import Prepared, prepare
from minituner.data.tails import cut_tails
from minituner.errors import MinitunerError, SourceError
from minituner.model.loading import load_tokenizer
from minituner.model.sources import SOURCES, fetch
from minituner.plan.flops import causal_pairs
from minituner.recipe import Recipe
from minituner.train.feed import Feed

# Shapes and tokenizer: all that a plan reads of a model on a hub.
BESIDE_WEIGHTS = ("config.json", "tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "*.jinja")
LOOKED_AT = 64  # packs: of the fullest, to find the one with the most targets; of all, to see how much they share


@dataclass(frozen=True)
class Row:
    """One micro-batch: the lengths of its documents, and how many of its tokens have a target."""

    seq_lens: tuple[int, ...]
    supervised: int

    @property
    def tokens(self) -> int:
        """All of its tokens."""
        return sum(self.seq_lens)


@dataclass(frozen=True)
class Workload:
    """What a whole run computes; None where the data could not be read."""

    fullest: Row
    steps: int | None = None
    tokens: float | None = None
    computed: float | None = None
    """Tokens, where beginnings that a pack's documents share are computed once, and their tails not at all."""
    supervised: float | None = None
    pairs: float | None = None
    computed_pairs: float | None = None
    """(query, key) pairs of attention (`causal_pairs`): of all tokens, and without tails."""
    note: str = ""


def config_folder(recipe: Recipe, say: Callable[[str], None] = print) -> Path:
    """A folder with the model's config.json (and tokenizer); weights are not needed, and not downloaded from a hub.

    Raises:
        SourceError: the config cannot be had; what was tried, and how to point to a local one.
    """
    name, source = recipe.model.name_or_path, recipe.model.source
    local = Path(name).expanduser()
    if source in (None, "local") and (local / "config.json").is_file():
        return local
    from minituner.catalog.lookup import find_model

    entry = find_model(name)
    embedded = bool(entry and "/" not in name and entry.get("embedded")) or source == "embedded"
    looks_local = source in ("local", "embedded") or name.startswith((".", "~", "/")) or local.is_dir()
    if embedded or looks_local or source not in (None, *SOURCES):
        return fetch(name, source=source, revision=recipe.model.revision, say=say)
    repository = entry["hub"] if entry else name
    from huggingface_hub import snapshot_download

    wanted = [*BESIDE_WEIGHTS, *(["*.py"] if recipe.model.trust_remote_code else [])]
    try:  # it asks the hub once, and takes what is in its cache when there is no answer
        found = snapshot_download(repository, revision=recipe.model.revision, allow_patterns=wanted, etag_timeout=5)
        if not (Path(found) / "config.json").is_file():
            raise FileNotFoundError("there is no config.json")
    except Exception as error:  # the hub's client raises a dozen unrelated types; each is the reason given
        raise SourceError(
            f"the shapes of {name!r} are not known here: its config.json could not be had",
            why=f"tried: a folder {name} (none here), the hub's cache, {repository} on the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'})",
            fix="put the model's config.json, alone, into a folder and give that folder; weights are not needed",
            next_command="minituner estimate RECIPE model.name_or_path=FOLDER",
        ) from error
    return Path(found)


def workload_of(recipe: Recipe, folder: Path, world_size: int, say: Callable[[str], None] = print) -> Workload:
    """Prepare the recipe's data (or find it in the cache) and count; without data, the most that its settings allow."""
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)
        prepared = prepare(recipe.data, tokenizer, seed=recipe.train.seed, say=say)
    except MinitunerError as error:
        tokens = recipe.data.max_length * recipe.train.per_device_batch_size
        row = Row((recipe.data.max_length,) * recipe.train.per_device_batch_size, tokens)
        return Workload(
            row,
            note=f"the data could not be read ({error.what}): steps and time are not known, and memory is that of full "
            "rows of one document in which every token is trained",
        )
    lengths = [[len(document) for document in pack] for pack in _packs(prepared)]
    feed = Feed(prepared, recipe, 0, world_size)
    epochs = feed.total_steps / feed.steps_per_epoch
    isolate = recipe.data.isolate_documents
    pairs = sum(causal_pairs(pack if isolate else [sum(pack)]) for pack in lengths)
    tokens = sum(map(sum, lengths))
    shares = prepared.ledger
    supervised = tokens * shares.trained / max(1, int(np.sum(prepared.dataset.data.column("length").to_numpy())))
    tokens_left, pairs_left = _computed_shares(prepared, recipe)
    return Workload(
        _fullest(prepared, recipe, lengths),
        feed.total_steps,
        epochs * tokens,
        epochs * tokens * tokens_left,
        epochs * supervised,
        epochs * pairs,
        epochs * pairs * pairs_left,
    )


def _computed_shares(prepared: Prepared, recipe: Recipe) -> tuple[float, float]:
    """The shares of tokens and of attention's pairs that are computed where packs share their beginnings.

    Of LOOKED_AT packs over the whole, without tails if the recipe cuts them.
    """
    some = np.unique(np.linspace(0, len(prepared.packs) - 1, min(LOOKED_AT, len(prepared.packs))).astype(int))
    rows = [collate([prepared.documents(int(n))], isolate=recipe.data.isolate_documents) for n in some]
    fewer = [share_prefixes(cut_tails(row) if recipe.train.cut_tails else row) for row in rows]
    return (
        sum(row.computed_tokens for row in fewer) / max(1, sum(row.tokens for row in rows)),
        sum(causal_pairs(row.seq_lens) for row in fewer) / max(1, sum(causal_pairs(row.seq_lens) for row in rows)),
    )


def _packs(prepared: Prepared) -> list[list[range]]:
    """For each pack its documents, as ranges of their tokens."""
    lengths = np.asarray(prepared.dataset.data.column("length"))[prepared.rows]
    if isinstance(prepared.packs, Pieces):
        return [[range(start, end) for _, start, end in pack.tolist()] for pack in prepared.packs]
    return [[range(n) for n in lengths[pack].tolist()] for pack in prepared.packs]


def _fullest(prepared: Prepared, recipe: Recipe, lengths: list[list[int]]) -> Row:
    """The largest micro-batch that the shuffled packs can give: the longest rows, and among them the most targets."""
    count = recipe.train.per_device_batch_size
    longest = sorted(range(len(lengths)), key=lambda n: -sum(lengths[n]))[: max(LOOKED_AT, count)]
    targets = {n: sum(int((labels[1:] >= 0).sum()) for _, labels in prepared.documents(n)) for n in longest}
    chosen = longest[:count]
    most = sorted(targets.values(), reverse=True)[:count]
    seq_lens: list[Any] = [n for pack in chosen for n in lengths[pack] if n]
    return Row(tuple(seq_lens), max(1, sum(most)))
