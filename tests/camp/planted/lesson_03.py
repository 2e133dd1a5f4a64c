"""Wrong answers to lesson 03."""

PLANTED = {
    "3.1": [
        ("[-100] * len(ids)", "list(ids)", "Nobody asks the model to produce a prompt"),
        ('list(ids) if kind == "answer"', 'list(ids[:-1]) + [-100] if kind == "answer"', "The stop token that ends"),
        ("return labels", "return labels[1:] + [-100]", "shifted already"),
    ],
    "3.2": [
        ("[*labels[1:], -100]", "labels", "before the shift"),
        ("[*labels[1:], -100]", "[-100, *labels[:-1]]", "the wrong way"),
        (
            "[label for labels in documents for label in [*labels[1:], -100]]",
            "[label for labels in documents for label in labels][1:] + [-100]",
            "must not predict the first of the next document",
        ),
    ],
    "3.3": [
        (
            "labels[row, length:]",
            "labels[row, length - 1:]",
            "The last real token of each row is masked too|A stop token is real text",
        ),
        ("labels[row, length:] = -100", "labels[labels == 2] = -100", "A stop token is real text"),
        ("labels[row, length:] = -100", "pass", "The padding still has labels"),
    ],
    "3.4": [
        ("place in chosen if flag is None else flag", "place in chosen", "flag wins over loss_on"),
        ("place in chosen if flag is None else flag", "bool(flag)", "takes it for False"),
        ("answers[-1:]", "answers", "only the last answer is trained"),
    ],
    "3.5": [
        ("min(count, room)", "count", "Cut first|15 is too large"),
        ("in parts:", "in reversed(parts):", "loses its beginning"),
    ],
}
