"""Wrong answers of lesson 10, as a learner would get them wrong: edits of the solutions, and words of the outcome."""

from __future__ import annotations

PLANTED = {
    "10.1": [
        (r'rf"\b{re.escape(name)}\b"', "re.escape(name)", "Ada is not in Canada"),
        (", re.IGNORECASE", "", "Large and small letters"),
        ("if not name.isascii():", "if False:", "Chinese puts no spaces"),
    ],
    "10.2": [
        ("np.exp(now) *", "np.exp(before) *", "not the untuned one's"),
        ("(np.exp(now) * (now - before)).sum()", "(np.exp(before) * (before - now)).sum()", "KL(before || now)"),
        (".sum()", ".mean()", "do not average"),
    ],
    "10.3": [
        (">= least", "> least", "Exactly `least` is enough"),
        ('["retention_kl"])["step"]', '["step"])["step"]', "not always the one that lost least"),
        ('if point["identity_rate"] >= least', "", "only points that reach `least`"),
    ],
    "10.4": [
        (
            "(1 - share) / (share * ordinary_tokens)",
            "share / ((1 - share) * ordinary_tokens)",
            "not of the ordinary ones",
        ),
        (" * (1 - share)", "", "compares identity with ordinary tokens"),
    ],
    "10.5": [
        ("ranks * per_device_batch_size", "ranks", "per_device_batch_size packs at once"),
        ("whole if whole and not rest else None", "max(1, whole)", "does not divide"),
    ],
}
