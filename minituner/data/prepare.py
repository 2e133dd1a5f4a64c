"""Prepare: the whole walk from files to packs, on disk, once.

    files -> records -> conversations -> segments -> input_ids + labels -> Arrow file -> mix -> packs

Documents are written to one memory-mapped Arrow file as they are made, so memory does not grow with the data. The file
is kept in the cache under a fingerprint of the records' bytes and of every setting that touches a token; a second run
finds it and says so. Several processes give the same file as one. Lesson: notebooks 01 to 04.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minituner.data.encoding import Encoded, encode_many
from minituner.data.formats import detect_format, to_conversation
from minituner.data.holdout import held_out as choose_held_out
from minituner.data.holdout import subtract
from minituner.data.ledger import Ledger
from minituner.data.mixing import mix
from minituner.data.packing import Packs, Pieces, pack
from minituner.data.prepared_cache import fingerprint, publish
from minituner.data.records import BadRecords, Record, read_records
from minituner.errors import DataError
from minituner.home import home
from minituner.recipe import DataSection, SourceSection

if TYPE_CHECKING:
    import datasets

    from minituner.data.collate import Document

CHUNK = 1000  # records that are tokenised in one call
Say = Callable[[str], None]


@dataclass(slots=True)
class Prepared:
    """Documents on disk, and the plan of one epoch over them.

    `dataset` has the columns input_ids, labels, kinds, length and where; `rows` are its row numbers in the mix, and
    `packs` index into `rows`. `held_out` has the documents that `data.holdout` keeps away from training, each once.
    """

    dataset: datasets.Dataset
    rows: np.ndarray
    packs: Packs | Pieces
    ledger: Ledger
    bad: BadRecords
    from_cache: bool
    folder: Path
    held_out: Prepared | None = None

    def documents(self, number: int) -> list[Document]:
        """The documents of pack `number`, each as (input_ids, labels)."""
        documents = []
        for entry in self.packs[number]:
            row, start, end = entry if isinstance(self.packs, Pieces) else (entry, 0, None)
            item = self.dataset[int(self.rows[int(row)])]
            documents.append((item["input_ids"][start:end], item["labels"][start:end]))
        return documents


@dataclass(slots=True)
class _Chunk:
    """What one call of `_encode_chunk` gives back."""

    documents: list[Encoded] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    bad: list[tuple[str, str, str]] = field(default_factory=list)


def prepare(data: DataSection, tokenizer: Any, *, seed: int = 42, say: Say = print) -> Prepared:
    """Read, tokenise, cache, mix and pack everything that `data` names.

    Raises:
        DataError: a record cannot be used (`on_error: stop`), or nothing is left to train on.
    """
    key = fingerprint(data, tokenizer, seed)
    folder = home() / "prepared" / key
    cached = data.cache and (folder / "info.json").is_file()
    if cached:
        say(f"prepared data: found in the cache ({key})")
    else:
        _write(data, tokenizer, seed, folder, say)
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    ledger = Ledger.from_dict(info["ledger"])
    dataset = _open(folder)
    refuse_untrained(ledger, data)
    lengths = np.asarray(dataset.data.column("length"), dtype=np.int64)
    rows = mix(info["documents_per_source"], [source.weight for source in data.sources], seed)
    if any(source.weight != 1 for source in data.sources):
        say(f"mixed by weight: {len(rows):,} documents an epoch; the ledger counts each prepared document once")
    held = np.zeros(len(lengths), dtype=bool)
    if data.holdout:
        held = choose_held_out(dataset, info["documents_per_source"], data.holdout, seed)
        subtract(ledger, dataset, held)
        rows = rows[~held[rows]]
    packs = pack(lengths[rows], data.max_length, data.packing)
    if isinstance(packs, Pieces):
        _enter_cuts(ledger, dataset, rows, lengths, packs)
    ledger.check()
    bad = BadRecords()
    for where, what, why in info["bad"]:
        bad.add(where, what, why)
    documents = dataset.with_format("numpy")
    aside = _held_out(documents, held, lengths, ledger, data, folder) if held.any() else None
    return Prepared(documents, rows, packs, ledger, bad, cached, folder, aside)


def refuse_untrained(ledger: Ledger, data: DataSection) -> None:
    """Refuse data in which nothing is trained.

    Raises:
        DataError: with the reasons for which records were dropped.
    """
    if not ledger.trained:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in ledger.dropped_records.items())
        raise DataError(
            "nothing is left to train on: no record has a trained token",
            why=reasons or "the sources hold no records",
            fix="check loss_on, max_length and the format",
            next_command=f"minituner inspect {data.sources[0].path}",
        )


def _held_out(
    dataset: datasets.Dataset, held: np.ndarray, lengths: np.ndarray, ledger: Ledger, data: DataSection, folder: Path
) -> Prepared:
    """The documents that are not trained on, packed like the others; their mix has each document once."""
    rows = np.flatnonzero(held)
    packs = pack(lengths[rows], data.max_length, data.packing)
    return Prepared(dataset, rows, packs, ledger, BadRecords(), True, folder)


def _open(folder: Path) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_file(str(folder / "data.arrow"))


def source_records(source: SourceSection, on_error: str, bad: BadRecords, seed: int) -> Iterator[Record]:
    """The records of one source; under `limit` a seeded draw, in file order (memory: `limit` records)."""
    records = read_records(source.path, split=source.split, on_error=on_error, report=bad)
    if source.limit is None:
        yield from records
        return
    draw = np.random.default_rng([seed, 1])
    chosen: list[tuple[int, Record]] = []
    for number, record in enumerate(records):  # reservoir sampling: every record has the same chance
        if len(chosen) < source.limit:
            chosen.append((number, record))
        elif (place := int(draw.integers(number + 1))) < source.limit:
            chosen[place] = (number, record)
    yield from (record for _, record in sorted(chosen, key=lambda item: item[0]))


def resolve_format(source: SourceSection, first: list[Record], say: Say) -> str:
    """The source's record layout; `auto` recognises it from the first records and says why."""
    if source.format != "auto":
        return source.format
    name, why = detect_format(first)
    say(f"{source.path}: format {name} ({why})")
    return name


def _write(data: DataSection, tokenizer: Any, seed: int, folder: Path, say: Say) -> None:
    """Write data.arrow and info.json aside, then rename the folder into place."""
    import pyarrow as pa

    schema = pa.schema(
        {
            "input_ids": pa.list_(pa.int32()),
            "labels": pa.list_(pa.int32()),
            "kinds": pa.list_(pa.uint8()),
            "length": pa.int32(),
            "where": pa.string(),
        }
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    ledger, bad, counts = Ledger(), BadRecords(), []
    try:
        with (aside / "data.arrow").open("wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
            for source in data.sources:
                before, unreadable = ledger.documents, BadRecords()
                for chunk in _chunks(source, data, tokenizer, seed, unreadable, say):
                    ledger.add(chunk.ledger)
                    for item in chunk.bad:
                        bad.add(*item)
                    if chunk.documents:
                        writer.write_batch(_to_arrow(chunk, schema))
                counts.append(ledger.documents - before)
                for item in unreadable.items:
                    bad.add(*item)
                    ledger.records += 1
                    ledger.drop("cannot be read (listed)")
        ledger.check()
        info = {"ledger": ledger.to_dict(), "documents_per_source": counts, "bad": bad.items}
        (aside / "info.json").write_text(json.dumps(info, ensure_ascii=False, indent=1), encoding="utf-8")
        publish(aside, folder, keep=data.cache)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _chunks(
    source: SourceSection, data: DataSection, tokenizer: Any, seed: int, bad: BadRecords, say: Say
) -> Iterator[_Chunk]:
    """Encoded chunks of one source, in order, by one process or several."""
    records = source_records(source, data.on_error, bad, seed)
    first = list(itertools.islice(records, 20))
    if not first:
        return
    layout = resolve_format(source, first, say)
    batches = _batched(itertools.chain(first, records), CHUNK)
    progress = _Progress(source.path, say)
    if data.num_proc == 1:
        for batch in batches:
            yield progress.count(_encode_chunk(batch, layout, data, tokenizer))
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(data.num_proc, initializer=_start_worker, initargs=(layout, data, tokenizer)) as pool:
        # Not pool.imap: it reads the whole source into memory, however slow the workers are.
        waiting: deque[Any] = deque()
        for batch in batches:
            waiting.append(pool.apply_async(_work, (batch,)))
            if len(waiting) > 2 * data.num_proc:
                yield progress.count(waiting.popleft().get())
        while waiting:
            yield progress.count(waiting.popleft().get())


def _batched(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    iterator = iter(records)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


class _Progress:
    """A line every two seconds: how many records, how many in a second."""

    def __init__(self, path: str, say: Say) -> None:
        self.path, self.say, self.records = path, say, 0
        self.start = self.last = time.monotonic()

    def count(self, chunk: _Chunk) -> _Chunk:
        self.records += chunk.ledger.records
        now = time.monotonic()
        if now - self.last > 2:
            self.last = now
            self.say(f"{self.path}: {self.records:,} records, {self.records / (now - self.start):,.0f} a second")
        return chunk


_worker: dict[str, Any] = {}  # filled once per worker process by _start_worker, never in the parent


def _start_worker(layout: str, data: DataSection, tokenizer: Any) -> None:
    _worker.update(layout=layout, data=data, tokenizer=tokenizer)


def _work(records: list[Record]) -> _Chunk:
    return _encode_chunk(records, _worker["layout"], _worker["data"], _worker["tokenizer"])


def _encode_chunk(records: list[Record], layout: str, data: DataSection, tokenizer: Any) -> _Chunk:
    """Records -> documents, with every token entered in the chunk's ledger."""
    from minituner.data.conversation import Message

    chunk, conversations, where = _Chunk(), [], []
    chunk.ledger.records = len(records)

    def bad(place: str, error: DataError) -> None:
        if data.on_error == "stop":
            raise error
        chunk.ledger.drop("cannot be used (listed)")
        chunk.bad.append((place, "", str(error).removeprefix(f"{place}: ")))

    for record in records:
        try:
            conversation = to_conversation(record, layout)
        except DataError as error:
            bad(record.where, error)
            continue
        if not conversation.messages:
            chunk.ledger.drop("no answer in the record")
            continue
        if data.system and not conversation.is_text and conversation.messages[0].role != "system":
            conversation.messages.insert(0, Message("system", data.system))
        conversations.append(conversation)
        where.append(record.where)

    failed: set[int] = set()

    def misfit(index: int, error: DataError) -> None:
        failed.add(index)
        bad(where[index], DataError(f"{where[index]}: {error.what}", why=error.why, fix=error.fix))

    documents = encode_many(
        conversations,
        tokenizer,
        data.template,
        data.bos_policy,
        loss_on=data.loss_on,
        allow_control_tokens=data.allow_control_tokens,
        on_error=misfit,
    )
    for index, document in enumerate(documents):
        if index not in failed:
            for part in fit(document, data, conversations[index].is_text, chunk.ledger):
                chunk.documents.append(part)
                chunk.where.append(where[index])
    return chunk


def fit(document: Encoded, data: DataSection, is_text: bool, ledger: Ledger) -> list[Encoded]:
    """The document, cut to `max_length` by the recipe's policy, as the parts that are trained on."""
    limit = len(document) if data.packing == "concat" else data.max_length
    if len(document) > limit and data.too_long == "drop":
        ledger.drop(f"longer than max_length ({data.max_length})", len(document))
        return []
    if is_text and data.too_long == "split":
        parts = [document[start : start + limit] for start in range(0, len(document), max(limit, 1))]
    else:
        parts = [document[:limit]]
        if len(document) > limit:
            ledger.cut(len(document) - limit)
    kept = []
    for part in parts:
        if part.trained[1:].any():
            ledger.keep(part)
            kept.append(part)
        else:
            ledger.drop("no trained token left", len(part))
    return kept


def _to_arrow(chunk: _Chunk, schema: Any) -> Any:
    """One Arrow record batch, built from flat arrays (no Python lists of ints)."""
    import pyarrow as pa

    lengths = np.array([len(document) for document in chunk.documents], dtype=np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))

    def column(arrays: list[np.ndarray]) -> Any:
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(arrays)))

    return pa.RecordBatch.from_arrays(
        [
            column([document.input_ids for document in chunk.documents]),
            column([document.labels for document in chunk.documents]),
            column([document.kinds for document in chunk.documents]),
            pa.array(lengths),
            pa.array(chunk.where),
        ],
        schema=schema,
    )


def _enter_cuts(ledger: Ledger, dataset: Any, rows: np.ndarray, lengths: np.ndarray, packs: Pieces) -> None:
    """Enter trained tokens that a cut made the first of a piece: nothing predicts them any more.

    Like all of the ledger it counts a document once, at its first place in the mix.
    """
    pieces = packs.pieces
    first = np.zeros(len(rows), dtype=bool)
    first[np.unique(rows, return_index=True)[1]] = True
    cut = pieces[(pieces[:, 1] > 0) & first[pieces[:, 0]]]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    places = np.sort(starts[rows[cut[:, 0]]] + cut[:, 1])
    lost = done = 0
    for part in dataset.data.column("labels").chunks:  # one at a time: all labels together may not fit in memory
        labels = part.flatten().to_numpy()
        here = places[slice(*np.searchsorted(places, [done, done + len(labels)]))]
        lost += int((labels[here - done] >= 0).sum())
        done += len(labels)
    ledger.trained -= lost
    if lost:
        ledger.masked["first token after a cut (nothing predicts it)"] += lost
