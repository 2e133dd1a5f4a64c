"""File readers: each turns one file into a lazy stream of records, with the bad ones in their place.

    {"text": "a"}     ->  Record({"text": "a"})   .where == "train.jsonl:1"
    {"text": oops     ->  BadRecord("train.jsonl:2", "JSON", "Expecting value at column 10")

A file that breaks off (cut gzip, wrong encoding) gives one BadRecord and ends, because nothing after the break can be
trusted. Text is decoded here, byte by byte accounted for, so that a message can name the line and the offset; a list in
a `.json` file has its own reader, `json_stream.py`. Lesson: notebook 01.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

BOM = b"\xef\xbb\xbf"
# Escapes whose value cannot be text: NUL, and half of a surrogate pair. One search a record; the walk only on a hit.
SUSPECT_ESCAPE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
UTF8_FIX = "save the file as UTF-8 (iconv -f GB18030 -t UTF-8 OLD > NEW when it is Chinese from Windows)"


class Record(dict[str, Any]):
    """One record: a dictionary with `where`, the place it was read from (`train.jsonl:17`)."""

    __slots__ = ("where",)

    def __init__(self, values: Any = (), where: str = "") -> None:
        super().__init__(values)
        self.where = where


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used: `where: field: why`. `fix` is what to do about it, where that is known."""

    where: str
    field: str
    why: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: {self.why}"


def read_file(path: Path) -> Iterator[Record | BadRecord]:
    """Choose the reader by the file's name (`.jsonl`, `.csv.gz`, ...)."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in (".jsonl", ".ndjson"):
        return _read_json_lines(path)
    if suffix == ".json":
        return _read_json(path)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, "\t" if suffix == ".tsv" else ",")
    return _read_parquet(path) if suffix == ".parquet" else _read_text(path)


def open_bytes(path: Path) -> BufferedReader | gzip.GzipFile:
    """Open for reading bytes, through gzip when the name ends in .gz."""
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def broken(path: Path, line: int, error: Exception) -> BadRecord:
    """Describe a file that cannot be read further, at the line it broke off."""
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
        return BadRecord(f"{path}:{line}", "file", f"damaged gzip: {error}", "copy or download the file again")
    return BadRecord(f"{path}:{line}", "file", f"cannot be read: {error}")


def not_utf8(path: Path, line: int, offset: int, byte: int) -> BadRecord:
    """Describe the first byte that no UTF-8 text can have there; `offset` counts bytes from the file's start."""
    why = f"not UTF-8: byte 0x{byte:02x} at offset {offset}"
    return BadRecord(f"{path}:{line}", "encoding", why, UTF8_FIX)


def _lines(path: Path) -> Iterator[tuple[int, str] | BadRecord]:
    """Yield (line number, text); at damage yield one BadRecord and end. A byte order mark is dropped, CRLF kept."""
    number = offset = 0
    try:
        with open_bytes(path) as handle:
            for number, raw in enumerate(handle, 1):
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    shift = len(BOM) if number == 1 and raw.startswith(BOM) else 0
                    yield not_utf8(path, number, offset + shift + error.start, error.object[error.start])
                    return
                yield number, text
                offset += len(raw)
    except (OSError, EOFError, zlib.error) as error:
        yield broken(path, number + 1, error)


def _bad_text(value: Any, field: str) -> tuple[str, str] | None:
    """Find the first string that is not text, depth first: (field, why), or None."""
    if isinstance(value, str):
        if "\0" in value:
            return field, "contains a NUL character"
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            return field, "contains a lone surrogate (half of a \\uD83D\\uDE00 pair), which is not a character"
    elif isinstance(value, dict):
        for key, child in value.items():
            name = f"{field}.{key}".removeprefix(".").encode("utf-8", "backslashreplace").decode()
            if (bad := _bad_text(str(key), name) or _bad_text(child, name)) is not None:
                return bad
    elif isinstance(value, list):
        for index, child in enumerate(value):
            if (bad := _bad_text(child, f"{field}[{index}]")) is not None:
                return bad
    return None


def make_record(value: Any, where: str, suspect: bool) -> Record | BadRecord:
    """Turn a parsed value into a Record, or say why it is none."""
    if not isinstance(value, dict):
        names = {list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
        kind = names.get(type(value), type(value).__name__)
        fix = "one JSON list with records belongs in a .json file" if isinstance(value, list) else ""
        return BadRecord(where, "record", f"expected an object {{...}}, found {kind}", fix)
    try:
        if suspect and (bad := _bad_text(value, "")) is not None:
            return BadRecord(where, *bad)
    except RecursionError:
        return BadRecord(where, "record", "nested too deeply")
    return Record(value, where)


def invalid_json(where: str, error: Exception, text: str) -> BadRecord:
    """Describe a text that is not JSON."""
    if "\0" in text:
        return BadRecord(where, "JSON", "contains NUL bytes", "the file is damaged, or UTF-16: save it as UTF-8")
    why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return BadRecord(where, "JSON", why)


def _read_json_lines(path: Path) -> Iterator[Record | BadRecord]:
    for item in _lines(path):
        if isinstance(item, BadRecord):
            yield item
            return
        number, text = item
        if text.isspace():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also numbers with thousands of digits
            yield invalid_json(where, error, text)
            continue
        yield make_record(value, where, SUSPECT_ESCAPE.search(text) is not None)


def _read_json(path: Path) -> Iterator[Record | BadRecord]:
    """A `.json` file: one list, one object, or (as many hub files are) JSON lines under the wrong name."""
    try:
        with open_bytes(path) as handle:
            first = handle.read(4096).removeprefix(BOM).lstrip()[:1]
            handle.seek(0)
            # A list is never read as one line: it may be the whole file.
            lines = first == b"{" and _is_object(handle.readline().removeprefix(BOM))
    except (OSError, EOFError, zlib.error) as error:
        yield broken(path, 1, error)
        return
    if lines:
        yield from _read_json_lines(path)
    else:
        from minituner.data.json_stream import read_json_stream  # it imports this module

        yield from read_json_stream(path)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(path: Path, delimiter: str) -> Iterator[Record | BadRecord]:
    csv.field_size_limit(2**31 - 1)  # Python's own limit of 131,072 characters is below a long document
    damage: list[BadRecord] = []

    def texts() -> Iterator[str]:
        for item in _lines(path):
            if isinstance(item, BadRecord):
                damage.append(item)
                return
            yield item[1]

    rows = csv.reader(texts(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield BadRecord(where, "CSV", str(error))
            continue
        if row is None:
            break
        if not row:
            continue
        if header is None:
            header = row
            if len(set(header)) < len(header) or "" in header:
                yield BadRecord(where, "header", "an empty or repeated column name", "name every column once")
                return
        elif len(row) != len(header):
            yield BadRecord(where, "row", f"{len(row)} cells where the header has {len(header)} columns")
        else:
            yield make_record(dict(zip(header, row, strict=True)), where, suspect=True)
    yield from damage


def _read_parquet(path: Path) -> Iterator[Record | BadRecord]:
    import pyarrow
    import pyarrow.parquet

    count = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=512):
                for row in batch.to_pylist():
                    count += 1
                    yield make_record(row, f"{path}:record {count}", suspect=True)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield BadRecord(f"{path}:record {count + 1}", "file", f"damaged Parquet: {error}", "copy or download it again")


def _read_text(path: Path) -> Iterator[Record | BadRecord]:
    """One document per file: {"text": ...}."""
    lines: list[str] = []
    for item in _lines(path):
        if isinstance(item, BadRecord):
            yield item
            return
        lines.append(item[1])
    if text := "".join(lines).replace("\r\n", "\n"):
        yield make_record({"text": text}, f"{path}:1", suspect=True)


def read_rows(name: str, rows: Iterable[Any]) -> Iterator[Record | BadRecord]:
    """Name the rows that a library gives: `owner/name:record 17`."""
    for count, row in enumerate(rows, 1):
        yield make_record(row, f"{name}:record {count}", suspect=True)
