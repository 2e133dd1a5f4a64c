"""Check: read everything once, and say what is wrong with it, record by record.

    train.jsonl:7: messages[1].content: expected text, found null            bad record     training refuses
    train.jsonl:9: the same as train.jsonl:2                                 duplicate
    train.jsonl:12: messages[0].content: unfilled placeholder {{name}}       placeholder
    train.jsonl:15: no answer in the record                                  no trained token

Only a bad record (under `on_error: stop`), data whose layout is not known, or data without any trained token would make
training refuse; the rest is for you to judge. Memory grows by 16 bytes a record, for finding duplicates. Lesson:
notebook 01.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from minituner.data.conversation import Conversation
from minituner.data.formats import detect_format
from minituner.data.ledger import Ledger
from minituner.data.records import BadRecords, Record, read_records
from minituner.data.target import recipe_of, tokenizer_of
from minituner.data.walk import Walked, unreadable, walk
from minituner.errors import DataError
from minituner.recipe import Recipe, SourceSection

DETECT = 20  # records that the layout is recognised from, as in training
MOST_LISTED = 10_000  # findings kept of each kind; all are counted
MOST_LAYOUTS = 1000  # different sets of columns that are told apart
PLACEHOLDER = re.compile(r"\{\{[^{}\n]{0,60}\}\}")
BAD, DUPLICATE, PLACE, UNTRAINED, LONG, MIXED = (
    "bad record",
    "duplicate",
    "placeholder",
    "no trained token",
    "over-long",
    "mixed layouts",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: its kind, `file:line`, and what it is."""

    kind: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass(slots=True)
class Check:
    """What `check` found. `refusal` says why training would refuse, empty if it would not."""

    target: str
    recipe: Recipe
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    ledger: Ledger = field(default_factory=Ledger)
    records: int = 0
    longest: tuple[int, str] = (0, "")
    refusal: str = ""

    @property
    def exit_code(self) -> int:
        """2 when training would refuse, else 0."""
        return 2 if self.refusal else 0

    def to_dict(self) -> dict[str, Any]:
        """All facts as plain values for JSON."""
        return {
            "target": self.target,
            "records": self.records,
            "counts": dict(self.counts),
            "findings": [{"kind": f.kind, "where": f.where, "text": f.text} for f in self.findings],
            "layouts": dict(self.layouts),
            "longest": {"tokens": self.longest[0], "where": self.longest[1]},
            "max_length": self.recipe.data.max_length,
            "ledger": self.ledger.to_dict(),
            "refusal": self.refusal,
            "exit_code": self.exit_code,
        }

    def summary(self) -> list[str]:
        """The lines after the findings: counts, lengths, ledger, verdict."""
        limit = self.recipe.data.max_length
        lines = ["", *self.ledger.lines(), f"layouts: {', '.join(f'{n} {c:,}' for n, c in self.layouts.most_common())}"]
        if self.longest[1]:
            lines.append(f"longest: {self.longest[0]:,} tokens, {self.longest[1]} (max_length {limit:,})")
        if self.counts[LONG]:
            what = {"drop": "dropped", "split": "split if pre-training text, else cut"}.get(
                self.recipe.data.too_long, "cut"
            )
            lines.append(f"over-long: {self.counts[LONG]:,} records are longer than max_length and are {what}")
        for kind in (BAD, DUPLICATE, PLACE, UNTRAINED, MIXED):
            lines.append(f"{kind}: {self.counts[kind]:,}")
        return [*lines, f"training would refuse: {self.refusal}" if self.refusal else "training would accept this data"]


def check(
    target: str | Path,
    *,
    model: str | None = None,
    template: str | None = None,
    format: str | None = None,
    overrides: Iterable[str] = (),
    tokenizer: Any = None,
    on_finding: Callable[[Finding], None] | None = None,
    say: Callable[[str], None] = print,
) -> Check:
    """Read and tokenise everything that a recipe names, or a file, folder or data set, and report what is wrong.

    Args:
        on_finding: is told each finding as it is made (over-long records are counted only).

    Raises:
        UsageError: no such recipe or template. SourceError: a hub data set or the tokenizer cannot be had.
    """
    recipe = recipe_of(target, model=model, template=template, format=format, overrides=overrides)
    inspector = _Inspector(Check(str(target), recipe), on_finding, say)
    for source in recipe.data.sources:
        try:
            records = inspector.read(source)
            first = list(islice(records, 1))
            # After the file is open: a wrong path should not cost the download of a model.
            if first and tokenizer is None:
                tokenizer = tokenizer_of(recipe, say)
            for item in walk(chain(first, records), recipe.data, tokenizer):
                inspector.enter(item)
        except DataError as error:  # the whole source: no such file, no known layout
            inspector.refuse(source.path, " ".join(error.text().split()))
    return inspector.close()


class _Inspector:
    """Takes records in and enters what is wrong with them."""

    def __init__(self, report: Check, on_finding: Callable[[Finding], None] | None, say: Callable[[str], None]) -> None:
        self.report, self.on_finding, self.say = report, on_finding, say
        self.seen = _Seen()
        self.source_layouts: Counter[str] = Counter()
        self.known: dict[frozenset[str], str] = {}
        self.last = time.monotonic()

    def find(self, kind: str, where: str, text: str) -> None:
        self.report.counts[kind] += 1
        if self.report.counts[kind] <= MOST_LISTED:
            self.report.findings.append(Finding(kind, where, text))
        if self.on_finding:
            self.on_finding(Finding(kind, where, text))

    def refuse(self, where: str, why: str) -> None:
        self.find(BAD, where, why.removeprefix(f"{where}: "))
        self.report.refusal = self.report.refusal or f"{where}: {why.removeprefix(f'{where}: ')}"

    def read(self, source: SourceSection) -> Iterator[tuple[Record, str]]:
        """The source's records, each with the format to read it by."""
        self.source_layouts, first_of = Counter(), {}
        records = read_records(source.path, split=source.split, on_error="skip", report=_Listener(self))
        first = list(islice(records, DETECT))
        layout = source.format
        if first and layout == "auto":
            try:
                layout, why = detect_format(first)
                self.say(f"{source.path}: format {layout} ({why})")
            except DataError as error:
                self.refuse(source.path, " ".join(error.text().split()))
                layout = ""
        for record in chain(first, records):
            own = self.layout_of(record)
            self.source_layouts[own] += 1
            first_of.setdefault(own, record.where)
            if layout or own != "unknown":
                yield record, layout or own
            else:
                self.report.records += 1
        if len(self.source_layouts) > 1:
            parts = (f"{name} {count:,} (first {first_of[name]})" for name, count in self.source_layouts.most_common())
            self.find(MIXED, source.path, f"mixed layouts: {', '.join(parts)}")
        self.report.layouts.update(self.source_layouts)

    def layout_of(self, record: Record) -> str:
        """The layout that a record's own columns show, looked up once for each set of columns."""
        columns = frozenset(key for key, value in record.items() if value is not None)
        if columns not in self.known:
            try:
                name = detect_format([record])[0]
            except DataError:
                name = "unknown"
            if len(self.known) >= MOST_LAYOUTS:
                return name
            self.known[columns] = name
        return self.known[columns]

    def enter(self, item: Walked) -> None:
        """Enter one record with everything that is wrong with it."""
        report, where = self.report, item.record.where
        report.records += 1
        if item.ledger is not None:
            report.ledger.add(item.ledger)
        if item.problem:
            self.find(BAD, where, ": ".join(filter(None, item.problem[1:])))
        elif item.conversation is not None:
            self.enter_conversation(item, item.conversation)
        now = time.monotonic()
        if now - self.last > 5:
            self.last = now
            self.say(f"{report.records:,} records read, {sum(report.counts.values()):,} findings")

    def enter_conversation(self, item: Walked, conversation: Conversation) -> None:
        report, where = self.report, item.record.where
        for number, message in enumerate(conversation.messages):
            for match in dict.fromkeys(PLACEHOLDER.findall(message.text)):
                self.find(PLACE, where, f"messages[{number}].content: unfilled placeholder {match}")
        if item.document is None or not item.parts:
            reasons = ", ".join(item.ledger.dropped_records) if item.ledger else ""
            self.find(UNTRAINED, where, reasons)
        if item.document is not None:
            self.seen.add(conversation, where)
            length = len(item.document)
            report.longest = max(report.longest, (length, where), key=lambda entry: entry[0])
            report.counts[LONG] += length > report.recipe.data.max_length and report.recipe.data.packing != "concat"

    def close(self) -> Check:
        """Find duplicates and reach the verdict."""
        report = self.report
        for first, again in self.seen.duplicates():
            self.find(DUPLICATE, again, f"the same as {first}")
        report.ledger.check()
        if not report.refusal and report.counts[BAD] and report.recipe.data.on_error == "stop":
            first_bad = next(finding for finding in report.findings if finding.kind == BAD)
            report.refusal = (
                f"{report.counts[BAD]:,} bad records, the first: {first_bad} (data.on_error=skip passes over)"
            )
        if not report.refusal and not report.ledger.trained:
            report.refusal = "nothing is left to train on: no record has a trained token"
        report.counts = +report.counts
        return report


class _Listener(BadRecords):
    """Takes what the reader cannot read straight to the inspector, so that no list grows."""

    def __init__(self, inspector: _Inspector) -> None:
        super().__init__()
        self.inspector, self.number = inspector, 0

    @property
    def count(self) -> int:
        return self.number

    def add(self, where: str, field: str, why: str) -> None:
        self.number += 1
        self.inspector.report.records += 1
        self.inspector.report.ledger.add(unreadable())
        self.inspector.find(BAD, where, f"{field}: {why}")


class _Seen:
    """Fingerprints of conversations: 8 bytes of hash and 8 of place each, so that millions fit in memory.

    Among ten million different conversations, two share a fingerprint with a chance of 3 in a million.
    """

    def __init__(self) -> None:
        self.hashes, self.places = array("Q"), array("Q")
        self.files: dict[str, int] = {}

    def add(self, conversation: Conversation, where: str) -> None:
        """Enter a conversation; columns that training does not read make no difference."""
        content = [[m.to_dict(), m.loss] for m in conversation.messages], conversation.tools
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        file, _, place = where.rpartition(":")
        number = re.search(r"\d+$", place)
        # `train.jsonl:17` and `train.parquet:record 17`: the words go with the file's name.
        name = f"{file}:{place[: number.start()]}" if number else where
        self.hashes.append(int.from_bytes(digest, "little"))
        self.places.append(self.files.setdefault(name, len(self.files)) << 40 | (int(number[0]) if number else 0))

    def duplicates(self) -> Iterator[tuple[str, str]]:
        """(where it stood first, where it stands again), in the order of the second."""
        hashes, places = np.frombuffer(self.hashes, dtype=np.uint64), np.frombuffer(self.places, dtype=np.uint64)
        if not len(hashes):
            return
        order = np.argsort(hashes, kind="stable")
        starts = np.append(True, hashes[order][1:] != hashes[order][:-1])
        first = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
        names = list(self.files)
        for again, original in sorted(zip(order[~starts].tolist(), first[~starts].tolist(), strict=True)):
            yield _place(names, int(places[original])), _place(names, int(places[again]))


def _place(names: list[str], code: int) -> str:
    number = code & (1 << 40) - 1
    return f"{names[code >> 40]}{number}" if number else names[code >> 40]
