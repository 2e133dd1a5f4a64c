"""Wrong answers to lesson 04."""

PLANTED = {
    "4.1": [
        ("sorted(range(len(lengths)), key=lambda r: -lengths[r])", "range(len(lengths))", "in the order of the file"),
        ("max(fitting", "min(fitting", "into the emptiest"),
        ("<= room", "<= room + 1", "there is room for"),
        ("packs = []", "packs = [[0]]", "there twice: [0]"),
    ],
    "4.2": [
        ("+= range(length)", "+= range(len(position_ids), len(position_ids) + length)", "counts from 0 again"),
        ('"cu_seqlens": borders', '"cu_seqlens": borders[1:]', "begins with 0"),
        ('"cu_seqlens"', '"cu_seq_lens"', "the key 'cu_seqlens' is missing"),
    ],
    "4.3": [
        ("(document[:, None] == document[None, :]) & ", "", "A leak"),
        (" & np.tri(len(document), dtype=bool)", "", "come"),
    ],
    "4.4": [
        ("np.append(starts, len(position_ids))", "starts", "The last document is missing"),
        ("return np.diff(np.append(starts, len(position_ids)))", "return starts", "the distance to the next"),
    ],
    "4.5": [
        (
            "sum(seq_lens) ** 2 / sum(length**2 for length in seq_lens)",
            "sum(length**2 for length in seq_lens) / sum(seq_lens) ** 2",
            "share which remains",
        ),
        ("sum(seq_lens) ** 2", "sum(seq_lens)", "is too small"),
    ],
}
