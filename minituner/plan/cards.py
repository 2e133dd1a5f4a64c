"""Cards: what a named GPU has, as its maker says, for plans made on a machine without it.

    card("a100-80gb")   81,920 MiB, 312e12 bfloat16 FLOP/s at most, bfloat16: yes

Memory is what `nvidia-smi` shows as the card's total, in binary units: a "24 GB" card has 24,564 MiB = 25.8e9 bytes,
and a number of bytes someone typed as 24GB means 24e9. The rate is the data sheet's for dense matrix products with
float32 accumulation, which no training reaches. Lesson: notebook 08.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from minituner.errors import UsageError, nearest

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Card:
    """One GPU model."""

    name: str
    mebibytes: int
    peak_flops: float
    """FLOP/s of half-precision matrix products on the data sheet (bfloat16, or float16 where there is none)."""
    bfloat16: bool = True

    @property
    def memory_bytes(self) -> int:
        """All of its memory, in bytes."""
        return self.mebibytes * 2**20


CARDS = {
    card.name: card
    for card in (
        Card("t4", 15_360, 65e12, bfloat16=False),
        Card("v100-16gb", 16_384, 125e12, bfloat16=False),
        Card("v100-32gb", 32_768, 125e12, bfloat16=False),
        Card("rtx3090", 24_576, 71e12),
        Card("rtx4090", 24_564, 165e12),
        Card("a10", 23_028, 125e12),
        Card("l40s", 46_068, 362e12),
        Card("a100-40gb", 40_960, 312e12),
        Card("a100-80gb", 81_920, 312e12),
        Card("h100-80gb", 81_559, 989e12),
        Card("h200-141gb", 143_771, 989e12),
    )
}


def find_card(name: str) -> Card:
    """The card of that name, however it is written (`A100 80GB`, `a100-80gb`).

    Raises:
        UsageError: unknown; the known ones are listed.
    """
    key = re.sub(r"[\s_-]+", "", name.lower())
    for card in CARDS.values():
        if card.name.replace("-", "") == key:
            return card
    raise UsageError(
        f"no card is called {name!r}",
        why=f"known: {', '.join(CARDS)}",
        fix=nearest(name.lower(), list(CARDS)) or "give its memory instead, e.g. --gpu-memory 24GiB",
    )


def parse_bytes(text: str | int | float) -> int:
    """`24GB` is 24e9 bytes, `24GiB` is 24 * 2**30; a plain number is bytes.

    Raises:
        UsageError: not a size above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2] not in UNITS or float(match[1]) <= 0:
        raise UsageError(
            f"{text!r} is no amount of memory", fix="write it like 24GB (24e9 bytes) or 24GiB (24 * 2**30)"
        )
    return int(float(match[1]) * UNITS[match[2]])
