"""Look: the facts that `minituner inspect` shows, before anything is trained.

    look("train.jsonl").samples[0].tokens      id, visible text and role of every token of the first record
                       .survey.ledger          where the tokens of the first 1,000 records would go
                       .survey.packs           how they would be packed

Everything is read lazily from the front, so a 1 GB file answers in seconds; the facts are about the records that were
read, and say how many those are. `report_text.py` and `report_html.py` draw them. Lesson: notebook 01.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from minituner.data.ledger import Ledger
from minituner.data.packing import Packs, Pieces, pack, seq_lens
from minituner.data.prepare import resolve_format
from minituner.data.records import BadRecords, Record, read_records
from minituner.data.target import recipe_of, tokenizer_of
from minituner.data.token_view import TokenView, token_views
from minituner.data.walk import Walked, unreadable, walk
from minituner.recipe import Recipe, SourceSection

DETECT = 20  # records that the layout is recognised from, as in training
MOST_TOKENS = 2_000_000  # of the survey: some seconds
MOST_SHOWN = 2000  # tokens of one sample
MOST_PACKS = 10  # packs drawn
MOST_BAD = 20  # bad records listed
BINS = 12  # bars of the histogram


@dataclass(slots=True)
class Sample:
    """One record as training sees it: `tokens` are those shown, `length` is the whole document's before any cut."""

    where: str
    length: int
    tokens: list[TokenView]
    fate: str


@dataclass(slots=True)
class Survey:
    """Numbers over the records that were read; `lengths` (documents,) are tokens before any cut."""

    records: int = 0
    ended: str = ""
    ledger: Ledger = field(default_factory=Ledger)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    packs: Packs | Pieces | None = None
    bad: BadRecords = field(default_factory=BadRecords)

    def some_packs(self, most: int = MOST_PACKS) -> list[tuple[int, list[int]]]:
        """(pack number, tokens of each of its documents) for up to `most` packs, evenly spread from first to last."""
        if self.packs is None:
            return []
        numbers = np.unique(np.linspace(0, len(self.packs) - 1, min(most, len(self.packs))).round().astype(int))
        return [(number, seq_lens(self.packs[number], self.kept).tolist()) for number in numbers.tolist()]

    def histogram(self) -> tuple[list[int], list[int]]:
        """Counts (b,) and the edges (b + 1,) of equal, whole-numbered bins over `lengths`."""
        if not len(self.lengths):
            return [], []
        low = int(self.lengths.min())
        width = -(-(int(self.lengths.max()) + 1 - low) // BINS)
        counts = np.bincount((self.lengths - low) // width)
        return counts.tolist(), [low + i * width for i in range(len(counts) + 1)]


@dataclass(slots=True, repr=False)
class Look:
    """What `inspect` shows of a recipe or a file; `layouts` are (path, format, why it was recognised)."""

    target: str
    recipe: Recipe
    layouts: list[tuple[str, str, str]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    survey: Survey | None = None

    def __repr__(self) -> str:
        records = f", {self.survey.records:,} records read" if self.survey else ""
        return f"Look({self.target}: {len(self.samples)} samples{records})"

    def to_dict(self) -> dict[str, Any]:
        """All facts as plain values for JSON."""
        data, survey = self.recipe.data, self.survey or Survey()
        counts, edges = survey.histogram()
        return {
            "target": self.target,
            "model": self.recipe.model.name_or_path,
            "template": data.template,
            "max_length": data.max_length,
            "packing": data.packing,
            "sources": [dict(zip(("path", "format", "why"), layout, strict=True)) for layout in self.layouts],
            "samples": [_sample_dict(sample) for sample in self.samples],
            "records_read": survey.records,
            "reading_ended": survey.ended,
            "ledger": survey.ledger.to_dict(),
            "lengths": {"histogram": {"counts": counts, "edges": edges}, **length_facts(survey.lengths)},
            "packs": {
                "count": len(survey.packs) if survey.packs is not None else 0,
                "fill": survey.packs.fill if survey.packs is not None else 0.0,
                "some": [{"pack": number, "document_lengths": lens} for number, lens in survey.some_packs()],
            },
            "bad_records": survey.bad.count,
            "bad": [dict(zip(("where", "field", "why"), item, strict=True)) for item in survey.bad.items[:MOST_BAD]],
        }


def _sample_dict(sample: Sample) -> dict[str, Any]:
    tokens = [{"id": t.id, "text": t.text, "role": t.role} for t in sample.tokens]
    return {"where": sample.where, "length": sample.length, "fate": sample.fate, "tokens": tokens}


def length_facts(lengths: np.ndarray) -> dict[str, float]:
    """Shortest, median, mean and longest of `lengths` (n,); empty without any."""
    if not len(lengths):
        return {}
    return {
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "longest": int(lengths.max()),
    }


def look(
    target: str | Path,
    *,
    n: int = 3,
    records: int = 1000,
    model: str | None = None,
    template: str | None = None,
    format: str | None = None,
    overrides: Iterable[str] = (),
    tokenizer: Any = None,
    on_samples: Callable[[Look], None] | None = None,
    say: Callable[[str], None] = print,
) -> Look:
    """Look at the data of a recipe, or at a data file, folder or data set.

    Args:
        n: samples shown.
        records: read from the front of each source, at most, for the survey.
        model, template, format: replace the recipe's. overrides: `key.path=value`.
        tokenizer: instead of the model's.
        on_samples: called as soon as the samples are known, before the survey.

    Raises:
        UsageError: no such recipe, template or file; no layout recognised.
    """
    recipe = recipe_of(target, model=model, template=template, format=format, overrides=overrides)
    found = Look(str(target), recipe)
    survey, broken = Survey(), BadRecords()
    readers = [_read(source, found, broken) for source in recipe.data.sources]
    # Only as many records as are shown are read and tokenised before the first picture stands.
    firsts = [list(islice(reader, max(n, 1))) for reader in readers]
    # After the files: a wrong path should not cost the download of a model.
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(recipe, say)
    heads = [list(walk(first, recipe.data, tokenizer)) for first in firsts]
    shown = islice(chain.from_iterable(heads), n)
    found.samples = [_sample(item, recipe, tokenizer) for item in shown]
    if on_samples:
        on_samples(found)
    limits = [max(records - len(first), 0) for first in firsts]
    rests = [walk(islice(r, limit), recipe.data, tokenizer) for r, limit in zip(readers, limits, strict=True)]
    _count(survey, [chain(head, rest) for head, rest in zip(heads, rests, strict=True)], recipe, records)
    for item in broken.items:
        survey.bad.add(*item)
        survey.records += 1
        survey.ledger.add(unreadable())
    if not survey.ended:
        more = any(next(reader, None) is not None for reader in readers)
        survey.ended = f"the first {records:,} of each source" if more else ""
    found.survey = survey
    return found


def _read(source: SourceSection, found: Look, bad: BadRecords) -> Iterator[tuple[Record, str]]:
    """`(record, format)` pairs of one source; enters how the format was recognised."""
    records = read_records(source.path, split=source.split, on_error="skip", report=bad)
    first = list(islice(records, DETECT))
    if not first:
        return
    reasons: list[str] = []
    layout = resolve_format(source, first, reasons.append)
    why = reasons[0].partition("(")[2].removesuffix(")") if reasons else "named in the recipe"
    found.layouts.append((source.path, layout, why))
    yield from ((record, layout) for record in chain(first, records))


def _count(survey: Survey, streams: list[Iterable[Walked]], recipe: Recipe, records: int) -> None:
    """Fill in the survey, walking until the records or the tokens are used up."""
    lengths: list[int] = []
    kept: list[int] = []
    for item in chain.from_iterable(streams):
        survey.records += 1
        if item.problem:
            survey.bad.add(*item.problem)
        if item.document is not None:
            lengths.append(len(item.document))
            kept.extend(len(part) for part in item.parts)
        if item.ledger is not None:
            survey.ledger.add(item.ledger)
        if survey.ledger.raw > MOST_TOKENS and survey.records < records * len(streams):
            survey.ended = f"the first {survey.records:,}, because they are {survey.ledger.raw:,} tokens"
            break
    survey.ledger.check()
    survey.lengths, survey.kept = np.array(lengths, dtype=np.int64), np.array(kept, dtype=np.int64)
    survey.packs = pack(survey.kept, recipe.data.max_length, recipe.data.packing)


def _sample(item: Walked, recipe: Recipe, tokenizer: Any) -> Sample:
    if item.document is None:
        reason = ": ".join(filter(None, item.problem[1:])) if item.problem else "no answer in the record"
        return Sample(item.record.where, 0, [], f"not trained: {reason}")
    # A record that is dropped is shown too: this is where one finds out why.
    document = item.parts[0] if len(item.parts) == 1 else item.document
    tokens = token_views(document, tokenizer, MOST_SHOWN)
    return Sample(item.record.where, len(item.document), tokens, _fate(item, recipe, len(document) - len(tokens)))


def _fate(item: Walked, recipe: Recipe, hidden: int) -> str:
    """What training does with the record, in words."""
    ledger, limit = item.ledger or Ledger(), recipe.data.max_length
    if not item.parts:
        fate = f"not trained: {', '.join(ledger.dropped_records)}"
    else:
        fate = f"{ledger.trained:,} trained"
        if len(item.parts) > 1:
            fate += f", split into {len(item.parts)} documents of at most {limit:,} tokens"
        elif ledger.truncated:
            fate += f", the last {ledger.truncated:,} cut off at max_length {limit:,}"
    return f"{fate}; the first {MOST_SHOWN:,} are shown" if hidden > 0 else fate
