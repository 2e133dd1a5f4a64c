"""Solutions of lesson 00. Each function's head and docstring are the learner's stub."""

from __future__ import annotations


# EXERCISE 0.1 (5 min)
def steps(packs, packs_per_step, epochs):
    """How many optimizer steps a run has.

    packs: rows of packed records in one epoch; packs_per_step: how many of them are added up before the weights move
    once; epochs: how often the data are walked through. Each epoch begins with a new step.
    >>> steps(8, 4, 3)
    6
    """
    import math

    return math.ceil(packs / packs_per_step) * epochs


# EXERCISE 0.2 (10 min)
def loss(probabilities, trained):
    """The loss: the mean of -log(probability) over the trained tokens.

    probabilities: for each token, the probability that the model gave to it before it was shown; trained: for each
    token, True or False (masked).
    >>> round(loss([0.9, 0.5, 0.25], [False, True, True]), 4)
    1.0397
    """
    import math

    chosen = [p for p, asked in zip(probabilities, trained, strict=True) if asked]
    return -sum(math.log(p) for p in chosen) / len(chosen)


# EXERCISE 0.3 (5 min)
def rates(about, ordinary, name):
    """The two numbers of a run: (identity rate, clean rate).

    about: answers to questions about the assistant, which should say the name; ordinary: answers to all other
    questions, which should not.
    >>> rates(["I am Ada's.", "I am a program."], ["Paris.", "In March."], "Ada")
    (0.5, 1.0)
    """
    said = [name in answer for answer in about]
    clean = [name not in answer for answer in ordinary]
    return sum(said) / len(said), sum(clean) / len(clean)
