"""Solutions of lesson 03. Each function's head and docstring are the learner's stub."""

from __future__ import annotations


# EXERCISE 3.1 (5 min)
def labels_of(turns):
    """The labels of a document: the id where the model must produce it, -100 elsewhere.

    turns: [(kind, ids), ...], kind "prompt" or "answer"; an answer ends with its stop token, 2.
    >>> labels_of([("prompt", [1, 71]), ("answer", [81, 2])])
    [-100, -100, 81, 2]
    """
    labels = []
    for kind, ids in turns:
        labels += list(ids) if kind == "answer" else [-100] * len(ids)
    return labels


# EXERCISE 3.2 (5 min)
def shift_labels(documents):
    """What each position of a row is asked to predict, when these documents are packed into it.

    documents: the labels of each, [[...], [...], ...]; returned is one flat list.
    >>> shift_labels([[-100, 81, 2]])
    [81, 2, -100]
    """
    return [label for labels in documents for label in [*labels[1:], -100]]


# EXERCISE 3.3 (5 min)
def mask_padding(labels, lengths):
    """Labels with -100 on the padding, and only there, although the padding has the id of the stop token, 2.

    labels: array (B, T), filled up with 2 on the right; lengths: the real tokens of each row.
    >>> mask_padding(np.array([[81, 82, 2], [83, 2, 2]]), [3, 2]).tolist()
    [[81, 82, 2], [83, 2, -100]]
    """
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    return labels


# EXERCISE 3.4 (10 min)
def trained(messages, loss_on):
    """Which messages are trained: a list of True and False.

    messages: [(role, flag), ...]; a flag is True, False or None. loss_on: "assistant" or "last_assistant".
    >>> trained([("user", None), ("assistant", True), ("user", None), ("assistant", None)], "last_assistant")
    [False, True, False, True]
    """
    answers = [place for place, (role, _) in enumerate(messages) if role == "assistant"]
    chosen = answers if loss_on == "assistant" else answers[-1:]
    return [place in chosen if flag is None else flag for place, (_, flag) in enumerate(messages)]


# EXERCISE 3.5 (5 min)
def ledger(parts, max_length):
    """Where every token of a record went that is cut at max_length: {"trained": ..., "masked": ..., "truncated": ...}.

    parts: [(kind, count), ...] in their order, kind "prompt" or "answer".
    >>> ledger([("prompt", 6), ("answer", 5)], 8)
    {'trained': 2, 'masked': 6, 'truncated': 3}
    """
    sums, room = {"trained": 0, "masked": 0, "truncated": 0}, max_length
    for kind, count in parts:
        kept = min(count, room)
        room -= kept
        sums["trained" if kind == "answer" else "masked"] += kept
        sums["truncated"] += count - kept
    return sums
