"""Wrong answers to lesson 01."""

PLANTED = {
    "1.1": [
        ('"conversations": "sharegpt"', '"conversations": "openai"', "Both sharegpt and openai hold a list"),
        ('"question": "openorca"', '"question": "alpaca"', "no column of alpaca"),
    ],
    "1.2": [
        ('    if record["context"]:\n        asked', "    asked", "A stray newline"),
        ('"\\n" + record["context"]', '" " + record["context"]', "on the next line"),
    ],
    "1.3": [
        (" and all(texts)", "", "null is not a text"),
        ('"assistant" in roles and set(roles)', "set(roles)", "nothing to learn"),
        (' and set(roles) <= {"system", "user", "assistant"}', "", "A role is misspelt"),
    ],
    "1.4": [
        ("            count += 1", '            count += piece != "<|im_end|>"', "one more token that must be learned"),
        ('role == "assistant"', "True", "is too large"),
        ('role, answer = "", False', 'role, answer, count = "", False, count + 1', "is too large"),
    ],
    "1.5": [
        ("big / small", "small / big", "other way round"),
        ("big / small", "big / (big + small)", "a weight says how often"),
    ],
}
