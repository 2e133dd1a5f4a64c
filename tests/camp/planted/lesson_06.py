"""Wrong answers to lesson 06."""

PLANTED = {
    "6.1": [
        ("a[1] * of_a + b[1] * of_b", "a[1] + b[1]", "is too|bring it to the new one"),
        ("a[2] * of_a + b[2] * of_b", "a[2] + b[2]", "The weighted sum must be brought"),
        ("np.exp(a[0] - m), np.exp(b[0] - m)", "np.exp(m - a[0]), np.exp(m - b[0])", "wrong sign"),
    ],
    "6.2": [
        ('rows * layer["tokens"] * layer["bytes_per_weight"]', 'rows * layer["tokens"]', "asked are bytes"),
        ('rows * layer["bytes_per_logsumexp"]', 'layer["tokens"] * layer["bytes_per_logsumexp"]', "one for each row"),
    ],
    "6.3": [
        ("max(row)", "sum(row)", "the longest document"),
        ("(window - 1, 0)", "(window, 0)", "the token itself is one"),
        ("(window - 1, 0)", "(window - 1, window - 1)", "must not be seen"),
        ('"cu_seq_q": borders', '"cu_seq_q": borders[1:]', "cu_seq_q begins with 0"),
    ],
    "6.4": [
        ("n * (n + 1) // 2", "n * n", "above the diagonal"),
        ("-(-length // block)", "length // block", "round up"),
        ("for length in documents", "for length in [sum(documents)]", "one causal row"),
    ],
    "6.5": [
        ("max(abs(behind).max(), abs(in_front).max())", "abs(behind).max()", "in the other direction only"),
        ("max(abs(behind).max(), abs(in_front).max())", "abs(in_front).max()", "in the other direction only"),
        ("row[border:] - call([first + 5, second])[border:]", "row - call([first + 5, second])", "changed itself"),
    ],
}
