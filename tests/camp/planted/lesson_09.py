"""Wrong answers of lesson 09, as a learner would get them wrong: edits of the solutions, and words of the outcome."""

from __future__ import annotations

PLANTED = {
    "9.1": [
        ("alpha / len(a) * b @ a", "alpha * b @ a", "the rank is the number of rows of a"),
        ("weight + alpha / len(a) * b @ a", "alpha / len(a) * b @ a", "added to the weight"),
        ("alpha / len(a) * b @ a", "b @ a", "alpha is missing"),
    ],
    "9.2": [
        ("(m * np.log(m / t))", "(t * np.log(t / m))", "KL(merged || trained)"),
        ("(t * np.log(t / b))", "(b * np.log(b / t))", "KL(trained || base), in this order"),
        ("kl_merge / kl_training", "kl_merge", "as a share"),
    ],
    "9.3": [
        ("values[:, None] / np.abs(values).max()", "values[:, None]", "shares of the block's largest"),
        ("(places(before) != places(before + np.array(updates)))", "(np.array(updates) != 0)", "Not every change"),
    ],
    "9.4": [
        ('program in ("vLLM", "LMDeploy")', "True", "do not look at the tokenizer"),
        ("ids.add(tokenizer)", "pass", "also stop on the tokenizer"),
    ],
    "9.5": [
        (" + answer <=", " <=", "The answer needs room"),
        ("<= context", "< context", "exactly full is fine"),
        ("+ message + answer", "+ answer", "takes room"),
    ],
}
