"""Solutions of lesson 09. Each function's head and docstring are the learner's stub."""

from __future__ import annotations

import numpy as np


# EXERCISE 9.1 (5 min)
def merged(weight, a, b, alpha):
    """The weight of the layer that computes W x + (alpha / rank) B A x, all in one matrix.

    weight: array (out, in); a: array (rank, in); b: array (out, rank).
    >>> merged(np.eye(2), np.array([[1, 1]]), np.array([[1], [0]]), 3).tolist()
    [[4.0, 3.0], [0.0, 1.0]]
    """
    return weight + alpha / len(a) * b @ a


# EXERCISE 9.2 (10 min)
def share_lost(base, trained, merged):
    """KL(merged || trained) as a share of KL(trained || base): what a merge changed of what the training changed.

    Each is a list of rows, one a position, with the probabilities of all tokens; a KL is the mean over the rows.
    >>> round(share_lost([[0.5, 0.5]], [[0.9, 0.1]], [[0.8, 0.2]]), 3)
    0.121
    """
    b, t, m = (np.array(rows) for rows in (base, trained, merged))
    kl_merge = (m * np.log(m / t)).sum(-1).mean()
    kl_training = (t * np.log(t / b)).sum(-1).mean()
    return float(kl_merge / kl_training)


# EXERCISE 9.3 (10 min)
def kept(weights, updates, levels):
    """For each weight of a block: does it lie on another level after `updates` are merged in and all is rounded?

    A block, before and after, is divided by its own largest absolute value; then each weight goes to the nearest level.
    >>> kept([2.0, 0.6, -0.4], [0.0, 0.1, 0.45], [-1, -0.2, 0, 0.3, 1])
    [False, False, True]
    """

    def places(values):
        return np.abs(values[:, None] / np.abs(values).max() - np.array(levels)).argmin(1)

    before = np.array(weights)
    return (places(before) != places(before + np.array(updates))).tolist()


# EXERCISE 9.4 (10 min)
def stops(program, generation_config, tokenizer):
    """The token ids that end an answer, as a sorted list.

    program: "transformers", "transformers serve", "vLLM" or "LMDeploy"; generation_config: a dictionary, eos_token_id
    in it may be missing, one id, or a list; tokenizer: the tokenizer's own end token.
    >>> stops("transformers", {"eos_token_id": 7}, 2), stops("vLLM", {"eos_token_id": [7, 9]}, 2)
    ([7], [2, 7, 9])
    """
    ids = generation_config.get("eos_token_id", [])
    ids = set(ids if isinstance(ids, list) else [ids])
    if program in ("vLLM", "LMDeploy"):
        ids.add(tokenizer)
    return sorted(ids)


# EXERCISE 9.5 (10 min)
def first_sent(turns, message, answer, context):
    """Which turn is the oldest that is still sent? len(turns) if only the message is; None if that does not fit.

    turns: tokens of each turn so far; message: tokens of the new one; answer: room for the answer; context: the most.
    >>> first_sent([40, 30, 20], 10, 20, 80), first_sent([40], 70, 20, 80)
    (1, None)
    """
    for first in range(len(turns) + 1):
        if sum(turns[first:]) + message + answer <= context:
            return first
