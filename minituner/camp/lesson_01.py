"""Exercises of lesson 01: layouts, your own format, bad records, supervised tokens, mixing weights.

What an exercise gives is a constant here, so that notebook and check cannot fall out of step:

    LAYOUTS     three records        ->  01.1 asks for their formats
    OWN         one record           ->  01.2 asks for a function that makes a Conversation of any such record
    LINES       six lines of a file  ->  01.3 asks which of them cannot be used
    CHAT        a conversation       ->  01.4 asks how many of its tokens are trained
    COUNTS      two sources          ->  01.5 asks for the weight that makes them equal

Every right answer is computed with the functions that training uses. Lesson: notebook 01.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from minituner.camp.core import Exercise, Wrong
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import encode
from minituner.data.formats import FORMATS, detect_format, to_conversation
from minituner.data.mixing import mix
from minituner.data.readers import Record
from minituner.data.records import BadRecords, read_records
from minituner.errors import DataError

LAYOUTS: tuple[dict[str, Any], ...] = (
    {"conversations": [{"from": "human", "value": "几点了？"}, {"from": "gpt", "value": "我看不到钟。"}]},
    {"system_prompt": "Be brief.", "question": "Is 91 a prime number?", "response": "No, it is 7 times 13."},
    {"messages": [{"role": "user", "content": "Ping?"}, {"role": "assistant", "content": "Pong."}]},
)
OWN: dict[str, str] = {"question": "What is a quokka?", "context": "", "reply": "A small marsupial from Australia."}
HIDDEN: tuple[dict[str, str], ...] = (
    {"question": "Shorten this.", "context": "The meeting is on Monday, not Tuesday.", "reply": "Meeting: Monday."},
    OWN,
    {"question": "这句话是什么意思？", "context": "画蛇添足", "reply": "做了多余的事，反而不好。"},
    {"question": "Say it twice:\nhello", "context": "", "reply": "hello\nhello"},
)
LINES: tuple[str, ...] = (
    '{"messages": [{"role": "user", "content": "谢谢你！"}, {"role": "assistant", "content": "不客气。"}]}',
    '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]',
    '{"messages": [{"role": "user", "content": "Anyone there?"}]}',
    '{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},'
    ' {"role": "assistant", "content": "Hello, you."}]}',
    '{"messages": [{"role": "user", "content": "Hi"}, {"role": "asistant", "content": "Hello!"}]}',
    '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "You said nothing."}]}',
)
CHAT = Conversation(
    [
        Message("user", "用一个词形容大海。"),
        Message("assistant", "辽阔。"),
        Message("user", "And in English?"),
        Message("assistant", "Vast."),
    ]
)
COUNTS: tuple[int, int] = (520, 40)


def _check_layouts(answer: Sequence[str]) -> None:
    if isinstance(answer, str) or len(answer) != len(LAYOUTS):
        raise Wrong(f"a list of {len(LAYOUTS)} names is wanted, e.g. ['alpaca', ...]")
    for number, (name, record) in enumerate(zip(answer, LAYOUTS, strict=True), 1):
        if name not in FORMATS:
            raise Wrong(f"there is no format called {name!r}; minituner.data.FORMATS has them all")
        if name != detect_format([record])[0]:
            columns = ", ".join(FORMATS[name].columns)
            raise Wrong(f"record {number}: {name} reads {columns}, and this record has {', '.join(record)}")


def _expected(record: Mapping[str, str]) -> Conversation:
    """What `OWN`'s layout means: alpaca's three columns under other names."""
    names = {"instruction": "question", "input": "context", "output": "reply"}
    return to_conversation({ours: record[theirs] for ours, theirs in names.items()}, "alpaca")


def _check_own(answer: Callable[[dict[str, str]], Conversation]) -> None:
    if not callable(answer):
        raise Wrong("a function is wanted: it takes a record and returns a Conversation")
    for record in HIDDEN:
        given, expected = answer(dict(record)), _expected(record)
        if not isinstance(given, Conversation):
            raise Wrong(f"the function returned {type(given).__name__}, not a Conversation")
        roles, wanted = [m.role for m in given.messages], [m.role for m in expected.messages]
        if roles != wanted:
            raise Wrong(f"roles: for {record} there should be {wanted}, yours are {roles}")
        for mine, right in zip(given.messages, expected.messages, strict=True):
            if mine.content != right.content:
                raise Wrong(_difference(mine, record))


def _difference(message: Message, record: Mapping[str, str]) -> str:
    text = message.content
    if isinstance(text, str) and text.endswith("\n") and not record["context"]:
        return f"the {message.role} message {text!r} ends with a stray newline: the context is empty here"
    return f"the {message.role} message is {text!r}, which is not right for {dict(record)}"


def _unusable() -> set[int]:
    """The numbers of `LINES`, from 1, that reading or the openai format refuses."""
    bad: set[int] = set()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.jsonl"
        file.write_text("\n".join(LINES) + "\n", encoding="utf-8")
        listed = BadRecords()
        for record in read_records(file, on_error="skip", report=listed):
            try:
                to_conversation(record, "openai")
            except DataError:
                bad.add(_line(record))
        return bad | {int(where.rpartition(":")[2]) for where, _, _ in listed.items}


def _line(record: Record) -> int:
    return int(record.where.rpartition(":")[2])


def _check_lines(answer: Collection[int]) -> None:
    bad, given = _unusable(), set(answer)
    if outside := given - set(range(1, len(LINES) + 1)):
        raise Wrong(f"lines count from 1 to {len(LINES)}; there is no line {min(outside)}")
    if good := given - bad:
        raise Wrong(f"line {min(good)} can be used: {json.loads(LINES[min(good) - 1])['messages'][-1]['content']!r}")
    if missed := len(bad - given):
        raise Wrong(f"these lines are bad indeed, but {missed} more cannot be used")


def _check_trained(answer: int) -> None:
    from minituner.model.loading import load_tokenizer
    from minituner.model.sources import fetch

    tokenizer = load_tokenizer(fetch("smollm2-135m-instruct"))
    encoded = encode(CHAT, tokenizer)
    right = sum(label >= 0 for label in encoded["labels"])
    answers = [m.text for m in CHAT.messages if m.role == "assistant"]
    typical = {
        len(encoded["input_ids"]): "that is every token of the record; the prompt is masked",
        sum(map(len, answers)): "that counts characters; one Chinese character may take several tokens",
        right - len(answers): "the answers' text is right, but an answer has one more token that must be learned",
        right - 1: "one answer ends with a stop token in your count; do both?",
        right + len(answers): "the newline after an answer belongs to the template: nobody has to learn it",
    }
    if answer != right:
        raise Wrong(typical.get(answer, f"{answer} is not the number of labels that differ from -100"))


def _check_weight(answer: float) -> None:
    weight = float(answer)
    if weight <= 0:
        raise Wrong("a weight is above 0")
    rows = mix(COUNTS, [1.0, weight], seed=42)
    own = int((rows >= COUNTS[0]).sum())
    if own != COUNTS[0]:
        raise Wrong(
            f"with weight {weight:g} an epoch takes {own} of its {len(rows)} records from the small source"
            f" ({own / len(rows):.0%}); half is wanted"
        )


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        "Name the formats of the three records in LAYOUTS, as a list.",
        _check_layouts,
        (
            "Look at the column names first. FORMATS[name].columns says what a format reads.",
            "detect_format([record]) gives a name and its reason; predict it before you ask.",
        ),
    ),
    "2": Exercise(
        "Write a function that turns a record with question, context and reply into a Conversation.",
        _check_own,
        (
            "Two messages: user, then assistant. The context, when there is one, follows the question on a new line.",
            "f'{question}\\n{context}' leaves a newline behind when the context is empty. Ask first whether it is.",
        ),
    ),
    "3": Exercise(
        "Which of the six LINES cannot be used? Give their numbers, counted from 1.",
        _check_lines,
        (
            "Four things can be wrong: not JSON, no answer, an unknown role, a null where text should be.",
            "Count the brackets of line 2, and read every role letter by letter.",
        ),
    ),
    "4": Exercise(
        "How many tokens of CHAT are trained under the model's own template?",
        _check_trained,
        (
            "Trained are the assistant's answers and the stop token after each; everything else has the label -100.",
            "encode(CHAT, tokenizer) returns labels: count those that are not -100.",
        ),
    ),
    "5": Exercise(
        "The big source has 520 records, yours has 40. Which weight of yours makes half an epoch yours?",
        _check_weight,
        ("weight 2.0 means every record twice.", "You need 520 records out of 40."),
    ),
}
