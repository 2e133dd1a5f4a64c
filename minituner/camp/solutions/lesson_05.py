"""Solutions of lesson 05. Each function's head and docstring are the learner's stub."""

from __future__ import annotations

import numpy as np


# EXERCISE 5.1 (5 min)
def lora_numbers(layers, rank):
    """How many numbers LoRA of this rank trains beside these layers.

    layers: {name: (out, in)} of each weight.
    >>> lora_numbers({"q_proj": (10, 20)}, 2)
    60
    """
    return sum(rank * (out + into) for out, into in layers.values())


# EXERCISE 5.2 (5 min)
def merged(W, A, B, alpha):
    """The one matrix that does what W and the adapter do together.

    W: array (out, in); A: (rank, in); B: (out, rank). The rank is not given; it need not be.
    >>> merged(np.zeros((1, 2)), np.ones((2, 2)), np.ones((1, 2)), 2.0).tolist()
    [[2.0, 2.0]]
    """
    return W + alpha / A.shape[0] * (B @ A)


# EXERCISE 5.3 (10 min)
def quantised(block, levels):
    """A block in NF4: {"absmax": ..., "indices": [...]}, for each value the index (0 to 15) of the nearest level.

    block: numbers; levels: the 16 levels of NF4 between -1 and 1, in rising order.
    >>> quantised([0.5, -2.0], [-1.0, 0.0, 0.3, 1.0])
    {'absmax': 2.0, 'indices': [2, 0]}
    """
    absmax = max(abs(value) for value in block)
    indices = [int(np.abs(np.array(levels) - value / absmax).argmin()) for value in block]
    return {"absmax": absmax, "indices": indices}


# EXERCISE 5.4 (5 min)
def unpacked(packed):
    """Two indices out of every byte, the first from its high four bits. packed: array of bytes.

    >>> list(map(int, unpacked(np.array([0x94], dtype=np.uint8))))
    [9, 4]
    """
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)


# EXERCISE 5.5 (10 min)
def qlora_gigabytes(model):
    """Gigabytes (1e9 bytes) of weights, gradients and optimizer states when a model is trained by QLoRA.

    model: {"linear": numbers in linear layers, in NF4 with "bits" each, "other": the rest of the base, in bfloat16,
    "lora": numbers of LoRA, in float32 with AdamW}. No activations.
    >>> qlora_gigabytes({"linear": 8e9, "bits": 4, "other": 1e9, "lora": 0})
    6.0
    """
    base = model["linear"] * model["bits"] / 8 + model["other"] * 2
    return (base + model["lora"] * 16) / 1e9
