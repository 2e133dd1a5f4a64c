"""Formats: the table of record layouts, and the two questions asked of it.

    to_conversation({"instruction": "Say hi", "input": "", "output": "Hi!"}, "alpaca")
        -> Conversation([Message("user", "Say hi"), Message("assistant", "Hi!")])
    detect_format([{"messages": [...]}, ...])
        -> ("openai", "20 of 20 records have messages")

The layouts themselves are short functions: columns (`formats_columns.py`), messages (`formats_messages.py`), agents
(`formats_agent.py`), and XTuner's exact behaviour (`formats_strict.py`). An unusable record is a DataError that says
`file:line: field: why`; a record that is fine but has no answer is an empty Conversation. Lesson: notebook 01.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from minituner.data import formats_agent as agent
from minituner.data import formats_messages as messages
from minituner.data.conversation import Conversation
from minituner.data.formats_columns import kind_of, system_prompts
from minituner.data.formats_table import FORMATS, Format
from minituner.errors import DataError, UsageError, nearest

__all__ = ["FORMATS", "Format", "detect_format", "find_format", "to_conversation"]

_BY_NAME = {name: entry for entry in FORMATS.values() for name in (entry.name, *entry.aliases)}
# Formats that columns alone can name; those sharing `conversations` or `text` are told apart by what is in them.
_REPRESENTATIVES = [
    e for e in FORMATS.values() if e.detected_as is None and e.name not in ("oasst1", "msagent_react", "llava")
]


def find_format(name: str) -> Format:
    """Look a format up by its name or alias.

    Raises:
        UsageError: there is none; the nearest name is given.
    """
    if (entry := _BY_NAME.get(name)) is None:
        why = nearest(name, list(_BY_NAME)) or f"known are auto, {', '.join(FORMATS)}"
        raise UsageError(f"format: unknown {name!r}", why=why, next_command="minituner list-formats")
    return entry


def to_conversation(record: Mapping[str, Any], format: str, *, strict_xtuner: bool = False) -> Conversation:
    """Turn one record into a conversation; one without an answer to learn gives an empty conversation.

    Args:
        record: the columns; when it has a `where` (see `records.py`) every error begins with it.
        format: a name or alias of `FORMATS`, or `auto`.
        strict_xtuner: exactly what XTuner v0.2.0 gives, traps included.

    Raises:
        DataError: `where: field: why`, the record does not fit the format.
        UsageError: there is no such format, or XTuner has none by that name.
    """
    entry = _BY_NAME.get(format)
    try:
        if not isinstance(record, Mapping):
            raise DataError(f"record: expected an object, found {kind_of(record)}")
        if entry is None:
            entry = find_format(detect_format([record])[0] if format == "auto" else format)
        if not strict_xtuner:
            return entry.function(record)
        if entry.strict is None:
            raise UsageError(f"format: XTuner has no {entry.name!r}", fix="leave strict_xtuner out")
        return entry.strict(record)
    except DataError as error:
        if where := getattr(record, "where", ""):
            error = DataError(
                f"{where}: {error.what}", why=error.why, fix=error.fix, next_command=error.next_command
            ).with_traceback(error.__traceback__)
        raise error from None


def detect_format(records: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Recognise the layout from the first records: (format name, why).

    Records that fit no format are left to the reading, which reports them, as long as one fits.

    Raises:
        DataError: no layout fits, several do, or the records differ.
    """
    rows = [record for record in records if isinstance(record, Mapping)]
    if not rows:
        raise DataError("format: there is no record to recognise a layout from")
    fits = [_candidates(row) for row in rows]
    votes = Counter(found for found in fits if found)
    if not votes:
        raise _unknown(rows[0])
    if len(votes) > 1:
        layouts = "; ".join(f"{' or '.join(names)} ({count} records)" for names, count in votes.most_common())
        first = next(row for row, found in zip(rows, fits, strict=True) if found and found != fits[0])
        raise DataError(
            f"format: the records have different layouts: {layouts}",
            why=f"the first that differs: {getattr(first, 'where', '') or ', '.join(map(str, first))}",
            fix="name the format, or put each layout in a source of its own",
            next_command="minituner list-formats",
        )
    names, count = votes.most_common(1)[0]
    if len(names) > 1:
        choices = "; ".join(f"{name} ({', '.join(FORMATS[name].columns)})" for name in names)
        raise DataError(f"format: ambiguous, the columns fit {choices}", fix="name the format in the recipe")
    entry, seen = _refined(FORMATS[names[0]], rows)
    read = [c for c in (*entry.columns, *entry.optional) if any(c in row for row in rows)]
    why = f"{count} of {len(rows)} records have {', '.join(read)}{seen}"
    if entry.system:
        why += f"; adds the system text {system_prompts()[entry.system].strip()[:60]!r}"
    if unread := sorted({str(key) for row in rows for key in row} - {*entry.columns, *entry.optional}):
        why += f"; not read: {', '.join(unread)}"
    return entry.name, why


def _candidates(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The formats whose columns this record has, without those that another one contains; `text` is the weakest."""
    fitting = [entry for entry in _REPRESENTATIVES if all(row.get(column) is not None for column in entry.columns)]
    present = {e.name: {c for c in (*e.columns, *e.optional) if c in row} for e in fitting}
    kept = [e.name for e in fitting if not any(present[e.name] < present[other.name] for other in fitting)]
    return tuple(name for name in kept if name != "pretrain") or tuple(kept)


def _refined(entry: Format, rows: Sequence[Mapping[str, Any]]) -> tuple[Format, str]:
    """Tell formats with the same columns apart by their content, and ask evidence of those that add a system text."""
    text = "\n".join(str([value for key, value in row.items() if key in entry.columns]) for row in rows)
    if entry.name == "sharegpt":
        if agent.START_THINK in text or agent.START_EXEC in text:
            return FORMATS["msagent_react"], f", with {agent.START_THINK} marks"
        if messages.IMAGE in text:
            return FORMATS["llava"], f", with {messages.IMAGE} marks"
    if entry.name == "pretrain":
        marked = sum(messages.MARKER.match(str(row.get("text")).lstrip()) is not None for row in rows)
        if 2 * marked > len(rows):
            return FORMATS["oasst1"], f", {marked} with '### Human:' marks"
    if entry.evidence is not None and not entry.evidence.search(text):
        raise DataError(
            f"format: the columns {', '.join(entry.columns)} are those of {entry.name}, but the texts are not",
            why=f"{entry.name} adds the system text {system_prompts()[entry.system or ''].strip()!r}",
            fix=f"name the format {entry.name} if you want that, or rename the columns to input and output (default)",
            next_command="minituner list-formats",
        )
    return entry, ""


def _unknown(row: Mapping[str, Any]) -> DataError:
    found = {str(key) for key in row}
    scored = sorted(_REPRESENTATIVES, key=lambda e: -len(found & set(e.columns)) / len(e.columns))
    near = "; ".join(f"{e.name} ({', '.join(e.columns)})" for e in scored[:3])
    return DataError(
        f"format: unknown layout with the columns {', '.join(sorted(found)) or 'none'}",
        why=f"the nearest formats are {near}",
        fix="rename the columns, or name the format",
        next_command="minituner list-formats",
    )
