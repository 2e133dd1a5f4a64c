"""Solutions of lesson 06. Each function's head and docstring are the learner's stub."""

from __future__ import annotations

import numpy as np


# EXERCISE 6.1 (10 min)
def merge(a, b):
    """The (m, z, acc) of a whole row, from those of its two halves: kernels for chatting do this, and several GPUs.

    m: the largest score; z: the sum of exp(score - m); acc: array (d,), that sum weighted by the values.
    >>> m, z, acc = merge((5.0, 1.0, np.array([2.0])), (5.0, 3.0, np.array([4.0])))
    >>> float(m), float(z), acc.tolist()
    (5.0, 4.0, [6.0])
    """
    m = np.maximum(a[0], b[0])
    of_a, of_b = np.exp(a[0] - m), np.exp(b[0] - m)
    return m, a[1] * of_a + b[1] * of_b, a[2] * of_a + b[2] * of_b


# EXERCISE 6.2 (5 min)
def kept_bytes(layer):
    """The bytes that a layer keeps for the backward: {"weights": ..., "logsumexp": ...}.

    layer: {"heads", "tokens", "bytes_per_weight", "bytes_per_logsumexp"}. weights: if it keeps all attention weights;
    logsumexp: if it keeps one logsumexp a row instead.
    >>> kept_bytes({"heads": 2, "tokens": 10, "bytes_per_weight": 2, "bytes_per_logsumexp": 4})
    {'weights': 400, 'logsumexp': 80}
    """
    rows = layer["heads"] * layer["tokens"]
    return {
        "weights": rows * layer["tokens"] * layer["bytes_per_weight"],
        "logsumexp": rows * layer["bytes_per_logsumexp"],
    }


# EXERCISE 6.3 (5 min)
def kernel_arguments(row, window):
    """What a variable-length kernel is given: {"cu_seq_q": [...], "max_q": ..., "window_size": (left, right)}.

    row: the lengths of its documents; window: how many tokens a token sees, itself included. Attention is causal.
    >>> kernel_arguments([2, 6], 3)["max_q"]
    6
    """
    borders = [0]
    for length in row:
        borders.append(borders[-1] + length)
    return {"cu_seq_q": borders, "max_q": max(row), "window_size": (window - 1, 0)}


# EXERCISE 6.4 (5 min)
def tiles(documents, block):
    """How many block x block tiles causal attention computes for packed documents of these lengths.

    >>> tiles([100], 50)
    3
    """
    blocks = [-(-length // block) for length in documents]
    return sum(n * (n + 1) // 2 for n in blocks)


# EXERCISE 6.5 (15 min)
def leaks(call):
    """Whether one of two packed documents sees the other: True or False.

    call([first, second]) -> logits (T, vocabulary) of the packed row; first, second: arrays of ids between 10 and 200,
    which you choose. Run it as often as you like. Kernels round differently: less than 1e-4 is nothing.
    >>> leaks(lambda documents: np.concatenate(documents)[:, None] * 1.0)
    False
    """
    first, second = np.arange(20, 30), np.arange(100, 104)
    row, border = call([first, second]), len(first)
    behind = row[border:] - call([first + 5, second])[border:]
    in_front = row[:border] - call([first, second + 5])[:border]
    return bool(max(abs(behind).max(), abs(in_front).max()) > 1e-4)
