"""Wrong answers to lesson 08."""

PLANTED = {
    "8.1": [
        ("3 * hidden", "2 * hidden", "three matrices, not two"),
        (" + 2 * hidden\n", "\n", "The norms are missing|is too small"),
        ('(1 if config["tied"] else 2)', "2", "counted once"),
    ],
    "8.2": [
        ("16 * trained", "4 * trained", "the weights alone"),
        (" / 1e9", "", "divide by 1e9"),
    ],
    "8.3": [
        ("mebibytes * 2**20 / 1e9", "mebibytes / 1000", "A MiB is not a MB"),
        ("mebibytes * 2**20 / 1e9", "mebibytes / 1024", "That is in GiB"),
    ],
    "8.4": [
        (' * row["bytes"]', "", "each has bytes"),
        ('row["tokens"] * ', "", "one position"),
    ],
    "8.5": [
        ("stage >= 2", "stage >= 3", "is too large|one part more"),
        ("averages = 8", "averages = 0", "AdamW's two averages are missing"),
        ("(world_size if stage >= 1 else 1)", "world_size", "is too small|At stage 0"),
    ],
}
