"""How an answer is drawn: its length, greedy or by chance, and what ends it early.

    logits -> repetition_penalty -> / temperature -> the top_k likeliest -> the likeliest that reach top_p -> draw
    temperature 0 takes the likeliest token each time, and top_k, top_p and seed change nothing

Checked when made, so that a wrong number is a message before a model is loaded. Lesson: notebook 09.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from minituner.errors import UsageError, nearest


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one answer.

    `max_new_tokens` in tokens. `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep every token. `stop_words` are
    texts that end an answer beside the trained stop token; they are not part of it. `seed` makes what is drawn depend
    on the seed and the number of turns so far only; None draws anew each time.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop_words: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, right, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 (1 changes nothing)"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "0 or more, below 2**63"),
        ):
            if not right:
                raise UsageError(f"{name} is {getattr(self, name)}", fix=f"{name} must be {allowed}")
        if "" in self.stop_words:
            raise UsageError("a stop word is empty, so every answer would be", fix="leave it out")

    def changed(self, **values: Any) -> Settings:
        """These settings with some replaced.

        Raises:
            UsageError: there is no such setting, or its value is out of range.
        """
        return replace(self, **checked_names(values))


def checked_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, every key of which is a setting.

    Raises:
        UsageError: one is not; the nearest is named.
    """
    known = list(Settings.__slots__)
    if unknown := [name for name in values if name not in known]:
        fix = nearest(unknown[0], known) or f"there are: {', '.join(known)}"
        raise UsageError(f"no setting of an answer is called {unknown[0]!r}", fix=fix)
    return dict(values)
