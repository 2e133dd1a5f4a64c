"""The ledger: where every token went.

    raw = trained + masked (by reason) + truncated + dropped (by reason) + held out
    in batches: trained + masked + padding

Every count is made on the very arrays that are trained, and `check` refuses a ledger that does not add up to the token.
Nothing disappears unsaid. Lesson: notebook 03.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from minituner.data.encoding import KINDS, Encoded

MASKED = {
    "prompt": "prompt (system, user, template)",
    "answer": "answer not trained (loss_on, or loss: false)",
    "text": "text not trained (loss: false)",
    "eos": "end token of an answer not trained",
    "bos": "BOS",
}
COUNTS = ("raw", "trained", "truncated", "padding", "held_out")
FIRST = "first token of a document (nothing predicts it)"


@dataclass(slots=True)
class Ledger:
    """Counts in tokens, except `records`, `documents`, `held_out_documents` and `dropped_records`."""

    records: int = 0
    documents: int = 0
    raw: int = 0
    trained: int = 0
    masked: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    padding: int = 0
    held_out: int = 0
    held_out_documents: int = 0
    dropped_records: Counter[str] = field(default_factory=Counter)

    def keep(self, document: Encoded) -> None:
        """Enter a document that will be trained on."""
        self.documents += 1
        self.raw += len(document)
        first = int(bool(len(document)) and bool(document.trained[0]))
        self.trained += int(document.trained.sum()) - first
        if first:
            self.masked[FIRST] += 1
        counts = np.bincount(document.kinds[~document.trained], minlength=len(KINDS))
        for kind, count in zip(KINDS, counts.tolist(), strict=True):
            if count:
                self.masked[MASKED[kind]] += count

    def cut(self, tokens: int) -> None:
        """Enter tokens cut off at the right end of a document."""
        self.raw += tokens
        self.truncated += tokens

    def drop(self, reason: str, tokens: int = 0) -> None:
        """Enter a record, or what is left of it, that is not used at all."""
        self.raw += tokens
        if tokens:
            self.dropped[reason] += tokens
        self.dropped_records[reason] += 1

    def add(self, other: Ledger) -> None:
        """Enter everything another ledger holds."""
        for key in (*COUNTS, "records", "documents", "held_out_documents"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        for key in ("masked", "dropped", "dropped_records"):
            getattr(self, key).update(getattr(other, key))

    def hold_out(self, part: Ledger) -> None:
        """Move documents that are here as kept, and in `part` too, from trained and masked to held out."""
        self.documents -= part.documents
        self.trained -= part.trained
        self.masked -= part.masked
        self.held_out += part.raw
        self.held_out_documents += part.documents

    def check(self) -> None:
        """Raise AssertionError unless every token is accounted for."""
        accounted = self.trained + sum(self.masked.values()) + self.truncated + sum(self.dropped.values())
        accounted += self.held_out
        assert self.raw == accounted, f"the ledger is off by {self.raw - accounted} tokens: {self.to_dict()}"

    def to_dict(self) -> dict[str, Any]:
        """The ledger as plain values for JSON."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {key: dict(value) if isinstance(value, Counter) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ledger:
        """The inverse of `to_dict`."""
        return cls(**{key: Counter(value) if isinstance(value, dict) else value for key, value in values.items()})

    def lines(self) -> list[str]:
        """The ledger as a table, largest rows first within a group."""
        share = 100 / max(self.raw, 1)
        dropped = sum(self.dropped_records.values())
        rows = [("raw", self.raw), ("trained", self.trained)]
        rows += [(f"masked: {reason}", count) for reason, count in self.masked.most_common()]
        if self.truncated:
            rows.append(("truncated at max_length", self.truncated))
        rows += [(f"dropped: {reason}", count) for reason, count in self.dropped.most_common()]
        if self.held_out:
            rows.append(("held out for evaluation", self.held_out))
        if self.padding:
            rows.append(("padding (added)", self.padding))
        head = f"{counted(self.records, 'record')}, {counted(self.documents, 'document')} to train on, "
        head += f"{counted(dropped, 'record')} dropped"
        head += f", {counted(self.held_out_documents, 'document')} held out" if self.held_out_documents else ""
        lines = [head] + [f"  {count:>12,} tokens  {count * share:5.1f}%  {name}" for name, count in rows]
        why = self.dropped_records.most_common()
        return lines + [f"  {count:>12,} record{'s' * (count != 1)} dropped: {reason}" for reason, count in why]


def counted(count: int, noun: str) -> str:
    """`1 record`, `1,234 records`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
