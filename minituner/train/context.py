"""How long a document may be: positions beyond those a model was made for give nonsense, without an error.

    row of 4,096 tokens, documents of 900, 1,200 and 1,996     positions restart at each: the longest document counts
    the same row with data.isolate_documents=false             positions run through: the row counts

Lesson: notebook 08.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minituner.data.prepare import Prepared
from minituner.errors import UsageError
from minituner.recipe import Recipe


def context_length(folder: str | Path, *, trust_remote_code: bool = False) -> int | None:
    """How many positions the model in this folder was made for; None where its config does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code).get_text_config()
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(length) if length else None


def longest_run_of_positions(prepared: Prepared, recipe: Recipe) -> int:
    """The highest number of positions in a row that the model will see."""
    if not recipe.data.isolate_documents and recipe.data.packing != "none":
        return recipe.data.max_length
    lengths = prepared.dataset.with_format("numpy", columns=["length"])[:]["length"]
    return int(np.max(lengths, initial=0))


def refuse_longer_than_model(prepared: Prepared, recipe: Recipe, folder: str | Path) -> None:
    """Stop before the model is loaded if a document is longer than it can tell positions apart.

    Raises:
        UsageError: naming both lengths.
    """
    context = context_length(folder, trust_remote_code=recipe.model.trust_remote_code)
    longest = longest_run_of_positions(prepared, recipe)
    if context is not None and longest > context:
        raise UsageError(
            f"the longest document has {longest:,} tokens, the model was made for {context:,} positions",
            why=f"data.max_length={recipe.data.max_length} cuts later than that",
            fix=f"data.max_length={context} (data.too_long says what happens to what is longer), or another model",
        )
