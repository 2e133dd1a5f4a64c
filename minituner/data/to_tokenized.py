"""A recipe's data as InternEvo's `.bin` and `.bin.meta`: tokenise here, train anywhere.

    minituner tokenize my_recipe.yaml --out tokenized/     ->  tokenized/tokens.bin, tokenized/tokens.bin.meta

The documents are the very ones that training would see (the same preparation, the same cache), in the order of the mix,
before they are packed. Lesson: notebook 04.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from minituner.data.prepare import Prepared, prepare
from minituner.data.target import tokenizer_of
from minituner.data.tokenized import write_tokenized
from minituner.recipe import Recipe


def tokenize(recipe: Recipe, out: str | Path, say: Callable[[str], None] = print) -> Path:
    """Prepare the recipe's data and write it for InternEvo; returns the `.bin` file.

    Raises:
        DataError: a record cannot be used, or nothing is left to train on.
    """
    prepared = prepare(recipe.data, tokenizer_of(recipe, say), seed=recipe.train.seed, say=say)
    for line in prepared.ledger.lines():
        say(line)
    written = write_tokenized(out, _samples(prepared))
    say(f"{len(prepared.rows):,} documents written to {written}, the table beside it")
    return written


def _samples(prepared: Prepared) -> Iterator[dict[str, np.ndarray]]:
    for row in prepared.rows.tolist():
        item = prepared.dataset[row]
        yield {"input_ids": item["input_ids"], "labels": item["labels"]}
