"""Conversations in files: OpenAI messages, so what was said in chat can be looked at, and trained on.

    save(session, "good.jsonl")     adds one line: {"messages": [{"role": "user", "content": "Hi"}, ...]}
    minituner inspect good.jsonl    the same file as training records (format openai)

A `.jsonl` file grows by one record each time; any other file is new, and none is overwritten. Lesson: notebook 09.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from minituner.data.conversation import Conversation, Message
from minituner.errors import DataError, UsageError

if TYPE_CHECKING:
    from minituner.chat.session import Session


def save(session: Session, path: str | Path) -> Path:
    """Write the whole conversation, turns that are no longer sent included, and return the file.

    Raises:
        UsageError: nothing was said yet; the file exists and is no `.jsonl`; it cannot be written.
    """
    file = Path(path).expanduser()
    if not session.messages:
        raise UsageError("there is nothing to save yet")
    head = [Message("system", session.system)] if session.system else []
    record = {"messages": Conversation([*head, *session.messages]).to_dicts()}
    lines = file.suffix.lower() in (".jsonl", ".ndjson")
    text = json.dumps(record if lines else [record], ensure_ascii=False, indent=None if lines else 1) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a" if lines else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UsageError(f"{file} exists", fix="another name, or one that ends in .jsonl: it grows") from None
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror or error}") from None
    return file


def load(session: Session, path: str | Path) -> int:
    """Go on with the last conversation of a file (its system text too); returns the number of its turns.

    Raises:
        UsageError: the file cannot be read, or holds no conversation that ends with an answer; the session is as it
            was.
    """
    from minituner.data.formats_messages import openai
    from minituner.data.readers import BadRecord, read_file

    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    last = None
    for last in read_file(file):  # noqa: B007  (only the last record counts)
        pass
    if last is None or isinstance(last, BadRecord):
        raise UsageError(f"{last or f'{file} is empty'}", fix="give a file that /save wrote")
    try:
        messages = openai(last).messages
    except DataError as error:
        raise UsageError(f"{file}: {error.what}", fix='a record is {"messages": [{"role": ..., ...}]}') from None
    if messages[-1].role != "assistant":
        raise UsageError(f"{file} ends with a message of the {messages[-1].role}, and chat goes on after an answer")
    # No system text in the file means none, not the one this model was trained with.
    system = messages.pop(0).text if messages[0].role == "system" else ""
    session.reset()
    session.system = system
    session.messages[:] = messages
    return sum(message.role == "user" for message in messages)
