"""Exercises of lesson 01: layouts, your own format, bad records, supervised tokens, mixing weights.

    1.1 format_of(record)        the name of its layout
    1.2 messages_of(record)      question, context, reply -> messages
    1.3 usable(line)             whether a line of a file can be trained on
    1.4 trained_tokens(tokens)   how many of a chat's tokens are trained
    1.5 weight(big, small)       the weight that makes half of an epoch yours

Every right value is computed with the functions that training uses. Lesson: notebook 01.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from minituner.camp.core import Exercise
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import encode
from minituner.data.formats import detect_format, to_conversation
from minituner.data.records import BadRecords, read_records
from minituner.errors import DataError

WORDS = ("茶", "画蛇添足", "Is 91 prime?", "Say it twice:\nhello", "你好！", "A quokka.", "Ping", "7 times 13", "再见")
STOP, NEWLINE = "<|im_end|>", "Ċ"
RECORD = {"conversations": [{"from": "human", "value": "几点了？"}, {"from": "gpt", "value": "我看不到钟。"}]}
OWN = {"question": "Shorten this.", "context": "The meeting is on Monday, not Tuesday.", "reply": "Meeting: Monday."}
TOKENS = ["<|im_start|>", "user", NEWLINE, "Hi", STOP, NEWLINE]
TOKENS += ["<|im_start|>", "ass", "istant", NEWLINE, "Hello", "!", STOP, NEWLINE]
LINE = '{"messages": [{"role": "user", "content": "谢谢！"}, {"role": "asistant", "content": "不客气。"}]}'


def _record(draw: Random) -> tuple[dict[str, Any]]:
    asked, told = draw.choice(WORDS), draw.choice(WORDS)
    layouts: list[dict[str, Any]] = [
        {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]},
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]},
        {"instruction": asked, "input": draw.choice(["", "Context."]), "output": told},
        {"system_prompt": "Be brief.", "question": asked, "response": told},
    ]
    return (draw.choice(layouts),)


def _format_of(record: dict[str, Any]) -> str:
    return detect_format([record])[0]


def _own(draw: Random) -> tuple[dict[str, str]]:
    context = draw.choice(["", draw.choice(WORDS)])
    return ({"question": draw.choice(WORDS), "context": context, "reply": draw.choice(WORDS)},)


def _messages(record: Mapping[str, str]) -> list[dict[str, Any]]:
    """alpaca's three columns under other names."""
    names = {"instruction": "question", "input": "context", "output": "reply"}
    return to_conversation({ours: record[theirs] for ours, theirs in names.items()}, "alpaca").to_dicts()


def _asked(record: Mapping[str, str], text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": record["reply"]}]


def _line(draw: Random) -> tuple[str]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "请简短回答。"}] * draw.randint(0, 1)
    for _ in range(draw.randint(1, 2)):
        messages.append({"role": "user", "content": draw.choice(WORDS)})
        messages.append({"role": "assistant", "content": draw.choice(WORDS)})
    defect = draw.choice(["none", "none", "bracket", "no answer", "role", "null"])
    if defect == "no answer":
        messages = [message for message in messages if message["role"] != "assistant"]
    if defect == "role":
        messages[-1]["role"] = draw.choice(["asistant", "Assistant", "bot"])
    if defect == "null":
        draw.choice(messages)["content"] = None
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    return (line[:-1] if defect == "bracket" else line,)


def _usable(line: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.jsonl"
        file.write_text(line + "\n", encoding="utf-8")
        records = list(read_records(file, on_error="skip", report=BadRecords()))
    try:
        return bool([to_conversation(record, "openai") for record in records])
    except DataError:
        return False


def _loads(line: str) -> list[dict[str, Any]]:
    try:
        return list(json.loads(line)["messages"])
    except ValueError:
        return []


def _roles(line: str) -> list[str]:
    return [message["role"] for message in _loads(line)]


def _no_null(line: str) -> bool:
    return all(message["content"] is not None for message in _loads(line))


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from minituner.model.loading import load_tokenizer
    from minituner.model.sources import fetch

    return load_tokenizer(fetch("smollm2-135m-instruct", say=lambda _: None))


def _encoded(messages: Sequence[tuple[str, str]]) -> tuple[list[str], list[int]]:
    """The tokens of a chat under the embedded model's template, and their labels."""
    tokenizer = _tokenizer()
    ids = encode(Conversation([Message(role, text) for role, text in messages]), tokenizer)
    return tokenizer.convert_ids_to_tokens(ids["input_ids"]), ids["labels"]


def _tokens(draw: Random) -> tuple[list[str]]:
    messages = [("system", "Be brief.")]
    for _ in range(draw.randint(1, 3)):
        messages += [("user", draw.choice(WORDS)), ("assistant", draw.choice(WORDS))]
    return (_encoded(messages)[0],)


def _trained_tokens(tokens: Sequence[str]) -> int:
    """By encoding again what the tokens say: turns are between <|im_start|> and the newline after <|im_end|>."""
    tokenizer = _tokenizer()
    text = tokenizer.decode(tokenizer.convert_tokens_to_ids(list(tokens)))
    turns = [turn.split(STOP)[0].split("\n", 1) for turn in text.split("<|im_start|>")[1:]]
    return sum(label >= 0 for label in _encoded([(role, said) for role, said in turns])[1])


def _answers(tokens: Sequence[str]) -> int:
    return sum(tokens[place : place + 2] == ["ass", "istant"] for place in range(len(tokens)))


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        name="format_of",
        minutes=5,
        example=(RECORD,),
        draw=_record,
        right=_format_of,
        mistakes={
            "Both sharegpt and openai hold a list of messages; they differ in the column and in the keys inside": (
                lambda record: "openai" if "conversations" in record else _format_of(record)
            ),
            "A system_prompt is no column of alpaca: which format reads system_prompt, question and response?": (
                lambda record: "alpaca" if "question" in record else _format_of(record)
            ),
            "Look at the column names, not at what is in the columns": lambda record: "alpaca",
        },
        hints=(
            "Look at the column names first. data.FORMATS[name].columns says what a format reads.",
            "conversations, messages, instruction and question tell the four apart.",
            "if 'conversations' in record: return 'sharegpt', and so on.",
        ),
    ),
    "2": Exercise(
        name="messages_of",
        minutes=10,
        example=(OWN,),
        draw=_own,
        right=_messages,
        mistakes={
            "A stray newline: where the context is empty, nothing follows the question": (
                lambda record: _asked(record, f"{record['question']}\n{record['context']}")
            ),
            "The context is lost": lambda record: _asked(record, record["question"]),
            "The question ends and the context begins on the next line; yours are on one line": (
                lambda record: _asked(record, f"{record['question']} {record['context']}".rstrip(" "))
            ),
            "The order of the messages: the user asks first, then the assistant replies": (
                lambda record: _messages(record)[::-1]
            ),
        },
        hints=(
            "Two messages: user, then assistant. The context, when there is one, follows the question on a new line.",
            "f'{question}\\n{context}' leaves a newline behind when the context is empty. Ask first whether it is.",
        ),
    ),
    "3": Exercise(
        name="usable",
        minutes=10,
        example=(LINE,),
        draw=_line,
        right=_usable,
        mistakes={
            "That the line is JSON is not enough: it needs an answer, known roles, and text in every message": (
                lambda line: bool(_loads(line))
            ),
            "A role is misspelt in one of the lines that you let pass: only three words are roles here": (
                lambda line: "assistant" in _roles(line) and _no_null(line)
            ),
            "A content of null is not a text": (
                lambda line: "assistant" in _roles(line) and set(_roles(line)) <= {"system", "user", "assistant"}
            ),
            "Without an answer there is nothing to learn": (
                lambda line: (
                    bool(_roles(line)) and set(_roles(line)) <= {"system", "user", "assistant"} and _no_null(line)
                )
            ),
            "No line at all can be used in your eyes; most are fine": lambda line: False,
        },
        hints=(
            "Four things can be wrong: not JSON, no answer, an unknown role, a null where text should be.",
            "try: json.loads(line) except ValueError: return False. Then look at role and content of each message.",
            "roles = [m['role'] for m in messages]; 'assistant' in roles and set(roles) <= {'system', 'user', ...}",
        ),
        cases=16,
    ),
    "4": Exercise(
        name="trained_tokens",
        minutes=10,
        example=(TOKENS,),
        draw=_tokens,
        right=_trained_tokens,
        mistakes={
            "That is every token of the record; the prompt is masked": len,
            "The answers' text is right, but an answer has one more token that must be learned: its stop token": (
                lambda tokens: _trained_tokens(tokens) - _answers(tokens)
            ),
            "The newline after an answer belongs to the template: nobody has to learn it": (
                lambda tokens: _trained_tokens(tokens) + _answers(tokens)
            ),
            "The head of an answer is given to the model, not learned: <|im_start|>, the role, and a newline": (
                lambda tokens: _trained_tokens(tokens) + 4 * _answers(tokens)
            ),
        },
        hints=(
            "Trained are the assistant's answers and the stop token after each; everything else has the label -100.",
            "Behind <|im_start|> comes a role, maybe several tokens, up to a newline; then the text, to <|im_end|>.",
            "Gather the tokens between <|im_start|> and Ċ into a text; if it is 'assistant', count up to <|im_end|>.",
        ),
    ),
    "5": Exercise(
        name="weight",
        minutes=3,
        example=(520, 40),
        draw=lambda draw: (draw.randint(50, 900), draw.randint(5, 1200)),
        right=lambda big, small: big / small,
        mistakes={
            "The other way round: weight 2.0 means every record twice": lambda big, small: small / big,
            "That is the share of the other source in the data; a weight says how often each record is taken": (
                lambda big, small: big / (big + small)
            ),
            "That is how many records more there are; a weight multiplies": lambda big, small: big - small,
        },
        hints=("weight 2.0 means every record twice.", "You need as many records out of yours as the other has."),
        rel=1e-3,
    ),
}
