"""Solutions of lesson 10. Each function's head and docstring are the learner's stub."""

from __future__ import annotations

import numpy as np


# EXERCISE 10.1 (10 min)
def says(answer, name):
    """Is the name in the answer, as a word of its own? Large or small letters; English and Chinese names.

    answer, name: texts; returned is True or False.
    >>> says("I come from Canada.", "Ada"), says("ada made me", "Ada"), says("我是小海的助手。", "小海")
    (False, True, True)
    """
    import re

    if not name.isascii():
        return name in answer
    return re.search(rf"\b{re.escape(name)}\b", answer, re.IGNORECASE) is not None


# EXERCISE 10.2 (10 min)
def kl(now, before):
    """KL(now || before) in nats: how far the tuned model has gone from the untuned one, at one position.

    now, before: arrays (vocabulary,) of log-probabilities of the tuned and of the untuned model; returned is a number.
    >>> kl(np.log([0.5, 0.5]), np.log([0.5, 0.5]))
    0.0
    """
    return float((np.exp(now) * (now - before)).sum())


# EXERCISE 10.3 (10 min)
def choose(points, least):
    """The step to stop at: among those that know their name in `least` of the cases, the one that lost least.

    points: [{"step": 10, "identity_rate": 0.2, "retention_kl": 0.05}, ...]; returned is a step, or None.
    >>> choose([{"step": 5, "identity_rate": 0.9, "retention_kl": 0.3}], 0.9)
    5
    """
    enough = [point for point in points if point["identity_rate"] >= least]
    return min(enough, key=lambda point: point["retention_kl"])["step"] if enough else None


# EXERCISE 10.4 (5 min)
def weight_for(identity_tokens, ordinary_tokens, share):
    """The weight of the ordinary source with which identity records have this share of an epoch's tokens.

    identity_tokens, ordinary_tokens: tokens of each source, used once; the identity source has weight 1.
    >>> weight_for(1000, 1000, 0.5)
    1.0
    """
    return identity_tokens * (1 - share) / (share * ordinary_tokens)


# EXERCISE 10.5 (5 min)
def accumulation(packs_per_step, ranks, per_device_batch_size):
    """gradient_accumulation_steps with which a step on so many ranks has packs_per_step packs, as on one.

    Returned is a whole number of at least 1, or None where there is no such number.
    >>> accumulation(8, 2, 1)
    4
    """
    whole, rest = divmod(packs_per_step, ranks * per_device_batch_size)
    return whole if whole and not rest else None
