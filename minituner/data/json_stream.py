"""A `.json` list of any size, read record by record: a window moves over the text and parses one value at a time.

    [ {"text": "a"},
      {"text": "b"}, ...       window: `{"text": "b"}, ...`  ->  one record; the window moves on, counting lines

`json.load` would hold the whole file in memory before the first record is seen. Lesson: notebook 01.
"""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Iterator
from gzip import GzipFile
from io import BufferedReader
from pathlib import Path
from typing import Any

from minituner.data.readers import (
    SUSPECT_ESCAPE,
    BadRecord,
    Record,
    broken,
    invalid_json,
    make_record,
    not_utf8,
    open_bytes,
)

CHUNK = 1 << 20  # bytes; large enough that parsing again after a refill costs little
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class _Window:
    """A window that moves over a JSON file's text: `text[position:]` is unread, `line` is the line at `position`."""

    def __init__(self, path: Path, handle: BufferedReader | GzipFile) -> None:
        self.path, self.handle = path, handle
        self.text, self.position, self.line, self.offset = "", 0, 1, 0
        self.ended = False
        self.damage: BadRecord | None = None
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode

    def refill(self) -> None:
        """Drop what was read and append more; doubling keeps one huge record linear. What is good is kept at damage."""
        unread = self.text[self.position :]
        raw = self.read(max(CHUNK, len(unread)))
        try:
            more = self.decode(raw, final=not raw and self.damage is None)
        except UnicodeDecodeError as error:
            # error.object may begin with bytes that the decoder held back from the chunk before
            offset = self.offset + len(raw) - len(error.object) + error.start
            more = error.object[: error.start].decode()
            line = self.line + unread.count("\n") + more.count("\n")
            self.damage = not_utf8(self.path, line, offset, error.object[error.start])
        self.text, self.position = unread + more, 0
        self.offset += len(raw)
        self.ended = not raw or self.damage is not None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, in steps: one large read of a cut gzip would lose the good bytes before the cut."""
        raw = bytearray()
        try:
            while len(raw) < size and (piece := self.handle.read1(size - len(raw))):
                raw += piece
        except (OSError, EOFError, zlib.error) as error:
            line = self.line + self.text.count("\n", self.position) + raw.count(b"\n")
            self.damage = broken(self.path, line, error)
        return bytes(raw)

    def move(self, position: int) -> None:
        """Step to `position`, counting lines."""
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def peek(self) -> str:
        """Skip white space; return the next character, or an empty string at the end."""
        while True:
            match = _SPACE.match(self.text, self.position)
            self.move(match.end() if match else self.position)
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.refill()

    def value(self) -> tuple[Any, str]:
        """Parse one value and step over it: (value, its source text). Raises ValueError or RecursionError."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
                if end < len(self.text) or self.ended:  # else a number could go on in the next chunk
                    source = self.text[self.position : end]
                    self.move(end)
                    return value, source
            except json.JSONDecodeError as error:
                # Cut off, or wrong? Only an error at the window's end, or an open string, can be cured by more text.
                cut = error.pos >= len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if self.ended or not cut:
                    raise
            self.refill()


def read_json_stream(path: Path) -> Iterator[Record | BadRecord]:
    """Read a list (or one object) record by record; a syntax error ends it, as what follows has no known meaning."""
    with open_bytes(path) as handle:
        window = _Window(path, handle)
        in_list = window.peek() == "["
        if in_list:
            window.move(window.position + 1)
        count = last_line = 0
        while (character := window.peek()) and not (in_list and character == "]"):
            if in_list and count:
                if character != ",":
                    break
                window.move(window.position + 1)
                window.peek()
            count += 1
            # several records on one line: the line would not tell them apart
            where = f"{path}:{window.line}" if window.line != last_line else f"{path}:record {count}"
            last_line = window.line
            try:
                value, source = window.value()
            except (ValueError, RecursionError) as error:
                end = window.position
                if isinstance(error, json.JSONDecodeError):
                    end = error.pos + 1
                    line = window.line + window.text.count("\n", window.position, error.pos)
                    where = where if line == window.line else f"{path}:{line}"
                yield window.damage or invalid_json(where, error, window.text[window.position : end])
                return
            yield make_record(value, where, SUSPECT_ESCAPE.search(source) is not None)
        here = f"{path}:{window.line}"
        if window.damage is not None:
            yield window.damage
        elif in_list and character != "]":
            why = "expected ',' between records" if character else "the list is not closed; the file is cut off"
            yield BadRecord(here, "JSON", why)
        elif in_list:
            window.move(window.position + 1)
            if window.peek():
                yield BadRecord(here, "JSON", "text after the closing ]")
