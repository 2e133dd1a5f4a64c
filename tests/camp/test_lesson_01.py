"""Lesson 01's exercises: right answers pass, typical wrong ones are told what differs."""

from __future__ import annotations

from typing import Any

import pytest

from minituner.camp import check, hint
from minituner.camp import lesson_01 as given
from minituner.data.conversation import Conversation, Message


def own(record: dict[str, str]) -> Conversation:
    asked = record["question"] + (f"\n{record['context']}" if record["context"] else "")
    return Conversation([Message("user", asked), Message("assistant", record["reply"])])


def with_stray_newline(record: dict[str, str]) -> Conversation:
    asked = f"{record['question']}\n{record['context']}"
    return Conversation([Message("user", asked), Message("assistant", record["reply"])])


def without_context(record: dict[str, str]) -> Conversation:
    return Conversation([Message("user", record["question"]), Message("assistant", record["reply"])])


def swapped(record: dict[str, str]) -> Conversation:
    return Conversation([Message("assistant", record["reply"]), Message("user", record["question"])])


RIGHT: dict[str, Any] = {
    "1": ["sharegpt", "openorca", "openai"],
    "2": own,
    "3": {2, 3, 5, 6},
    "5": 13,
}
WRONG: list[tuple[str, Any, str]] = [
    ("1", ["openai", "openorca", "openai"], "record 1: openai reads messages"),
    ("1", ["sharegpt", "orca", "openai"], "no format called 'orca'"),
    ("1", "sharegpt", "a list of 3 names"),
    ("2", with_stray_newline, "stray newline"),
    ("2", without_context, "not right for"),
    ("2", swapped, "roles"),
    ("2", lambda record: dict(record), "not a Conversation"),
    ("2", "function", "a function is wanted"),
    ("2", lambda record: record["instruction"], "KeyError"),
    ("3", {2, 3, 5}, "1 more"),
    ("3", {1, 2}, "line 1 can be used"),
    ("3", {0}, "no line 0"),
    ("5", 0.5, "half is wanted"),
    ("5", 1 / 13, "half is wanted"),
    ("5", -1, "above 0"),
]


@pytest.mark.parametrize("number", RIGHT)
def test_right(number: str) -> None:
    outcome = check(f"01.{number}", RIGHT[number])
    assert outcome, outcome


@pytest.mark.parametrize(("number", "answer", "says"), WRONG)
def test_wrong_is_told_what_differs(number: str, answer: Any, says: str) -> None:
    outcome = check(f"01.{number}", answer)
    assert not outcome
    assert says in outcome.text


def test_trained_tokens() -> None:
    from minituner.data import encode
    from minituner.model.loading import load_tokenizer
    from minituner.model.sources import fetch

    encoded = encode(given.CHAT, load_tokenizer(fetch("smollm2-135m-instruct", say=lambda _: None)))
    right = sum(label != -100 for label in encoded["labels"])
    assert check("01.4", right)
    wrong = {
        len(encoded["input_ids"]): "every token",
        sum(len(m.text) for m in given.CHAT.messages if m.role == "assistant"): "characters",
        right - 2: "one more token",  # no stop token
        right - 1: "do both",
        right + 2: "newline",
        1000: "-100",
    }
    assert len(wrong) == 6
    for count, says in wrong.items():
        outcome = check("01.4", count)
        assert not outcome
        assert says in outcome.text


@pytest.mark.parametrize("number", list("12345"))
def test_no_answer_yet_and_hints(number: str) -> None:
    assert "no answer yet" in check(f"01.{number}", ...).text
    assert hint(f"01.{number}")
