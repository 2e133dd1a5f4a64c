"""Wrong answers to lesson 07."""

PLANTED = {
    "7.1": [
        ("2 / ranks + 12", "2 + 12", "That is stage 1"),
        ("2 + 2 / ranks", "2 / ranks + 2 / ranks", "That is stage 3"),
        ("/ 1e9", "/ 2**30", "other unit"),
    ],
    "7.2": [
        ("for stage in range(4):", "for stage in (3, 2, 1, 0):", "A smaller stage would do"),
        ("/ 1e9 <= room", "/ 1e9 >= room", "entries are wanted|is too|largest stage"),
    ],
    "7.3": [
        ("len(supervised) * tokens", "tokens", "if the ranks' gradients were summed"),
        ("len(supervised) * tokens / sum(supervised)", "1", "mean of means"),
    ],
    "7.4": [
        ("np.split(sum(rows), len(rows))[rank]", "sum(rows)", "an all-reduce"),
        ("sum(rows)", "rows[rank]", "summed over all rows"),
        ("sum(rows)", "sum(rows) / len(rows)", "asked is the sum"),
    ],
    "7.5": [
        ("3 * micro_batches / 2", "3 / 2", "Right for one micro-batch"),
        ("3 * micro_batches / 2", "2 / (3 * micro_batches)", "other way round"),
    ],
    "7.6": [
        ('"outside": (tokens // group, heads)', '"outside": (tokens, heads)', "Outside attention the tokens are cut"),
        ('"inside": (tokens, heads // group)', '"inside": (tokens, heads)', "Inside attention the heads are cut"),
    ],
}
