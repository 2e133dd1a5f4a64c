"""Wrong answers to lesson 00."""

PLANTED = {
    "0.1": [
        ("math.ceil(packs / packs_per_step)", "packs // packs_per_step", "a smaller one"),
        ("math.ceil(packs / packs_per_step) * epochs", "math.ceil(packs * epochs / packs_per_step)", "of two epochs"),
        ("math.ceil(packs / packs_per_step)", "packs", "These are packs"),
    ],
    "0.2": [
        (" if asked", "", "Masked tokens are not asked for"),
        ("-sum(math.log(p) for p in chosen) / len(chosen)", "-math.log(sum(chosen) / len(chosen))", "of the mean"),
        (" / len(chosen)", "", "This is the sum"),
        (" / len(chosen)", " / len(trained)", "divide by the trained tokens alone"),
        ("-sum", "sum", "never below 0"),
        ("math.log", "math.log2", "not the one to base 2"),
    ],
    "0.3": [
        ("name not in answer", "name in answer", "An ordinary answer is clean when"),
        ("sum(said) / len(said), sum(clean) / len(clean)", "sum(said), sum(clean)", "These are counts"),
        (
            "return sum(said) / len(said), sum(clean) / len(clean)",
            "return sum(clean) / len(clean), sum(said) / len(said)",
            "The identity rate comes first",
        ),
    ],
}
