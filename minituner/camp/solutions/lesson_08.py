"""Solutions of lesson 08. Each function's head and docstring are the learner's stub."""

from __future__ import annotations


# EXERCISE 8.1 (10 min)
def parameters(config):
    """How many parameters a Llama has, with as many key-value heads as heads, norms included.

    config: {"vocab", "hidden", "intermediate", "layers", "tied"}; tied: the head is the embedding.
    >>> parameters({"vocab": 10, "hidden": 2, "intermediate": 3, "layers": 1, "tied": True})
    60
    """
    hidden = config["hidden"]
    layer = 4 * hidden * hidden + 3 * hidden * config["intermediate"] + 2 * hidden
    embeddings = (1 if config["tied"] else 2) * config["vocab"] * hidden
    return embeddings + config["layers"] * layer + hidden


# EXERCISE 8.2 (3 min)
def full_gigabytes(trained):
    """GB (1e9 bytes) held when so many numbers are trained in float32 with AdamW, without activations.

    >>> full_gigabytes(1_000_000_000)
    16.0
    """
    return 16 * trained / 1e9


# EXERCISE 8.3 (3 min)
def gigabytes(mebibytes):
    """The memory of a card in GB (1e9 bytes), from the MiB that nvidia-smi shows.

    >>> round(gigabytes(10_000), 3)
    10.486
    """
    return mebibytes * 2**20 / 1e9


# EXERCISE 8.4 (3 min)
def logits_gigabytes(row):
    """GB (1e9 bytes) of all logits of a row, if every position had a target and nothing went in pieces.

    row: {"tokens", "vocab", "bytes" of one logit}
    >>> logits_gigabytes({"tokens": 1000, "vocab": 50_000, "bytes": 4})
    0.2
    """
    return row["tokens"] * row["vocab"] * row["bytes"] / 1e9


# EXERCISE 8.5 (10 min)
def per_rank(parameters, world_size, stage):
    """Bytes of float32 weights, gradients and AdamW's two averages that each rank holds at a ZeRO stage, 0 to 3.

    >>> per_rank(100, 4, 1)
    1000.0
    """
    weights = 4 * parameters / (world_size if stage >= 3 else 1)
    gradients = 4 * parameters / (world_size if stage >= 2 else 1)
    averages = 8 * parameters / (world_size if stage >= 1 else 1)
    return weights + gradients + averages
