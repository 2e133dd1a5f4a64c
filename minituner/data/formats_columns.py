"""Column layouts: records that hold one question and one answer, or one document, in named columns.

    {"instruction": "Add", "input": "1 2", "output": "3"}  --alpaca-->  user "Add\\n1 2", assistant "3"
    {"text": "Once upon a time"}                           --pretrain->  text "Once upon a time"

Some add a fixed system text from the catalog, because the models that were trained on them met it. A column that is
missing, null or no text is an error that names it; XTuner prints the word `None` instead. Lesson: notebook 01.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from minituner.data.conversation import Conversation, Message
from minituner.errors import DataError

Row = Mapping[str, Any]
COLON = re.compile("[:：]")


def kind_of(value: Any) -> str:
    """What a value is, in JSON's words (`a list`, `null`)."""
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def get_text(record: Row, column: str) -> str:
    """The text in a column.

    Raises:
        DataError: the column is missing, null, or holds something else than text.
    """
    value = record.get(column)
    if isinstance(value, str):
        return value
    if column in record:
        raise DataError(f"{column}: expected text, found {kind_of(value)}")
    columns = ", ".join(sorted(map(str, record))) or "none"
    raise DataError(
        f"{column}: missing",
        why=f"this record has the columns {columns}",
        fix="name the format that these columns have",
        next_command="minituner list-formats",
    )


@cache
def system_prompts() -> dict[str, str]:
    """The catalog's system texts by key, read once."""
    path = Path(__file__).resolve().parents[1] / "catalog" / "system_prompts.yaml"
    texts: dict[str, str] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return texts


def _pair(question: str, answer: str, system: str | None = None) -> Conversation:
    messages = [Message("user", question), Message("assistant", answer)]
    if system:
        messages.insert(0, Message("system", system))
    return Conversation(messages)


def _under_instruction(record: Row, instruction: str, extra: str) -> str:
    """Instruction and input, one under the other; XTuner's trap is a stray newline, or the word None, without input."""
    task = get_text(record, instruction)
    if record.get(extra) is None or not (more := get_text(record, extra)):
        return task
    return f"{task}\n{more}" if task else more


def alpaca(record: Row) -> Conversation:
    """instruction, input (may be empty, null or absent), output; `<nooutput>` gives an empty conversation."""
    answer = get_text(record, "output")
    if answer == "<nooutput>":
        return Conversation([])
    return _pair(_under_instruction(record, "instruction", "input"), answer)


def alpaca_zh(record: Row) -> Conversation:
    """The same with `_zh` column names; an unanswered row is dropped here too."""
    answer = get_text(record, "output_zh")
    if answer == "<nooutput>":
        return Conversation([])
    return _pair(_under_instruction(record, "instruction_zh", "input_zh"), answer)


def arxiv(record: Row) -> Conversation:
    """A paper's abstract asks for its title."""
    return _pair(get_text(record, "abstract"), get_text(record, "title"), system_prompts()["arxiv_gentile"])


def code_alpaca(record: Row) -> Conversation:
    """prompt, completion, under the coder's system text."""
    return _pair(get_text(record, "prompt"), get_text(record, "completion"), system_prompts()["coder"])


def tiny_codes(record: Row) -> Conversation:
    """prompt, response, under the coder's system text."""
    return _pair(get_text(record, "prompt"), get_text(record, "response"), system_prompts()["coder"])


def colors(record: Row) -> Conversation:
    """`Sky Blue: a light blue` asks for the colour's code.

    The name before the first colon is left out, as it was in training. XTuner knows only the ASCII colon and loses a
    description without one; here a Chinese colon counts, and without any colon all of it is the question.
    """
    parts = COLON.split(get_text(record, "description"), maxsplit=1)  # no colon: one part, the whole
    return _pair(parts[-1].strip() or parts[0].strip(), get_text(record, "color"), system_prompts()["colorist"])


def crime_kg_assistant(record: Row) -> Conversation:
    """input, output, under the lawyer's system text."""
    return _pair(get_text(record, "input"), get_text(record, "output"), system_prompts()["lawyer"])


def law_reference(record: Row) -> Conversation:
    """question, answer, under the lawyer's system text."""
    return _pair(get_text(record, "question"), get_text(record, "answer"), system_prompts()["lawyer"])


def medical(record: Row) -> Conversation:
    """instruction, input, output, under the doctor's system text."""
    question = _under_instruction(record, "instruction", "input")
    return _pair(question, get_text(record, "output"), system_prompts()["medical"])


def sql(record: Row) -> Conversation:
    """CREATE TABLE statements over a question ask for a query."""
    context, question = get_text(record, "context"), get_text(record, "question")
    return _pair(f"{context}\n{question}" if context else question, get_text(record, "answer"), system_prompts()["sql"])


def openorca(record: Row) -> Conversation:
    """question, response, and the record's own system_prompt, which may be empty."""
    system = get_text(record, "system_prompt") if record.get("system_prompt") is not None else None
    return _pair(get_text(record, "question"), get_text(record, "response"), system)


def stack_exchange(record: Row) -> Conversation:
    """question, response, nothing else."""
    return _pair(get_text(record, "question"), get_text(record, "response"))


def default(record: Row) -> Conversation:
    """input, output, nothing else."""
    return _pair(get_text(record, "input"), get_text(record, "output"))


def pretrain(record: Row) -> Conversation:
    """A document, stripped; one without text is an empty conversation, like any record with nothing to learn."""
    text = get_text(record, "text").strip()
    return Conversation([Message("text", text)] if text else [])
