"""Reading records: every source of data becomes the same lazy walk over dictionaries that know where they came from.

    train.jsonl   {"messages": [...]}   ->  Record({"messages": [...]})  .where == "train.jsonl:1"
                  {"messages": oops     ->  train.jsonl:2: JSON: Expecting value at column 14

One record is in memory at a time, so the first record of a 1 GB file arrives at once and memory does not grow with the
data. A record that cannot be read is reported as `file:line: field: why`: the default stops at the first, `skip` lists
them and goes on. A file that breaks off (cut gzip, wrong encoding) is reported once, because nothing after the break
can be trusted. Which records a format can use is the next stop, `formats.py`. Lesson: notebook 01.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from minituner.data.readers import BadRecord, Record, read_file, read_rows
from minituner.data.sources import locate
from minituner.errors import DataError, UsageError

__all__ = ["BadRecord", "BadRecords", "Record", "read_records"]


class BadRecords:
    """The list of records that were skipped; give it to `read_records(..., on_error="skip", report=...)`."""

    def __init__(self) -> None:
        self.items: list[tuple[str, str, str]] = []  # (where, field, why)

    @property
    def count(self) -> int:
        """How many records are listed."""
        return len(self.items)

    def add(self, where: str, field: str, why: str) -> None:
        """Put one bad record on the list."""
        self.items.append((where, field, why))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the list as UTF-8 text, one `file:line: field: why` a line."""
        text = "".join(": ".join(filter(None, item)) + "\n" for item in self.items)
        Path(path).write_text(text, encoding="utf-8")


def read_records(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    on_error: Literal["stop", "skip"] = "stop",
    report: BadRecords | None = None,
) -> Iterator[Record]:
    """Yield the records of a file, a folder, a hub data set (`owner/name`) or a ModelScope one (`ms:owner/name`).

    `split` chooses among a folder's or hub's splits. With `on_error="skip"` bad records go to `report`, or, without
    one, are counted in a warning at the end.

    Raises:
        DataError: at once for a source that does not exist; while reading for the first bad record (`on_error="stop"`)
            and for a source without any record.
        SourceError: a hub data set could not be fetched.
        UsageError: `on_error` is neither `stop` nor `skip`.
    """
    if on_error not in ("stop", "skip"):
        raise UsageError(f"on_error: expected 'stop' or 'skip', found {on_error!r}")
    location = os.fspath(path)
    source = locate(location, split)
    parts = [read_rows(source.name, source.rows)] if source.rows is not None else [read_file(f) for f in source.files]
    return _checked(location, parts, on_error, report)


def _checked(
    location: str, parts: Iterable[Iterator[Record | BadRecord]], on_error: str, report: BadRecords | None
) -> Iterator[Record]:
    """Pass records on; stop at, or list, the bad ones."""
    listed = BadRecords() if report is None else report
    before, good = listed.count, 0
    for part in parts:
        for item in part:
            if isinstance(item, Record):
                good += 1
                yield item
            elif on_error == "stop":
                raise DataError(str(item), fix=item.fix, next_command=f"minituner check {location}")
            else:
                listed.add(item.where, item.field, item.why)
    if not good and listed.count == before:
        if on_error == "stop":
            raise DataError(f"{location}: no records", why="it is empty", fix="check the path and the split")
        listed.add(location, "file", "no records")
    if report is None and listed.count:
        warnings.warn(f"{listed.count} bad records skipped, the first: {': '.join(listed.items[0])}", stacklevel=2)
