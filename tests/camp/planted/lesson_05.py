"""Wrong answers to lesson 05."""

PLANTED = {
    "5.1": [
        ("rank * (out + into)", "out * into", "stay frozen"),
        ("rank * (out + into)", "rank * out", "A is trained too"),
    ],
    "5.2": [
        ("alpha / A.shape[0] * ", "", "The scaling alpha / r is missing"),
        ("A.shape[0]", "A.shape[1]", "not of its columns"),
        ("alpha / A.shape[0]", "alpha / np.sqrt(A.shape[0])", "rsLoRA"),
        ("return W", "return A", "raises ValueError|is wanted|entries"),
    ],
    "5.3": [
        ("max(abs(value) for value in block)", "max(block)", "largest *absolute* value|raises"),
        ("value / absmax", "value", "Divide by absmax"),
    ],
    "5.4": [
        ("[packed >> 4, packed & 15]", "[packed & 15, packed >> 4]", "yours comes second"),
        ("np.stack([packed >> 4, packed & 15], axis=1)", "np.concatenate([packed >> 4, packed & 15])", "wrong order"),
    ],
    "5.5": [
        ('model["lora"] * 16', 'model["lora"] * 8', "two averages are missing"),
        ('model["linear"] * model["bits"] / 8', 'model["linear"] * model["bits"]', "too large"),
        ('model["other"] * 2', 'model["other"] * model["bits"] / 8', "not quantised"),
    ],
}
