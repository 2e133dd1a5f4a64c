"""Lesson 02's exercises: right answers pass, typical wrong ones are told what differs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minituner.camp import check, hint
from minituner.camp import lesson_02 as given
from minituner.data.templates import NamedTemplate, render_named

ORION = NamedTemplate(
    key="orion",
    system="<sys>{system}</sys>\n",
    instruction="[Q] {input}\n[A] ",
    suffix="<end>",
    suffix_as_eos=True,
    sep="\n",
)


def llama3(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    text = "".join(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in messages)
    return text + "<|start_header_id|>assistant<|end_header_id|>\n\n" * add_generation_prompt


def never_opened(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    return llama3(messages, False)


def always_opened(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    return llama3(messages, True)


def with_one_newline(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    return llama3(messages, add_generation_prompt).replace("\n\n", "\n")


RIGHT: dict[str, Any] = {
    "1": llama3,
    "2": ORION,
    "3": {"A", "C"},
    "4": {"llama3_chat", "gemma"},
    "5": (3, 5),
}
WRONG: list[tuple[str, Any, str]] = [
    ("1", never_opened, "stops too early"),
    ("1", always_opened, "goes on where it should end"),
    ("1", with_one_newline, "hidden chat 1"),
    ("1", lambda messages, opened: messages, "not a text"),
    ("1", "text", "a function is wanted"),
    ("2", replace(ORION, system=None), "{system}"),
    ("2", replace(ORION, instruction="[Q] {input}\n[A]"), "right up to"),
    ("2", replace(ORION, suffix_as_eos=False), "no end token should follow"),
    ("2", replace(ORION, suffix="<end>\n", sep=""), "does not end at <end>"),
    ("2", {"system": "x"}, "a NamedTemplate is wanted"),
    ("3", {"A", "B"}, "B is refused"),
    ("3", {"A"}, "1 more"),
    ("3", {"E"}, "no template 'E'"),
    ("4", {"llama3_chat"}, "one more family"),
    ("4", {"qwen_chat", "llama3_chat", "gemma"}, "<|im_end|>"),
    ("4", {"mistral"}, "not one of"),
    ("5", (2, 4), "one is missing"),
    ("5", (3, 3), "too few"),
    ("5", 3, "two numbers"),
]


@pytest.mark.parametrize("number", RIGHT)
def test_right(number: str) -> None:
    outcome = check(f"02.{number}", RIGHT[number])
    assert outcome, outcome


@pytest.mark.parametrize(("number", "answer", "says"), WRONG)
def test_wrong_is_told_what_differs(number: str, answer: Any, says: str) -> None:
    outcome = check(f"02.{number}", answer)
    assert not outcome
    assert says in outcome.text


def test_orion_is_printed_as_given() -> None:
    trained = [m.role == "assistant" for m in given.ORION_CHAT.messages]
    assert given.printed(render_named(given.ORION_CHAT, ORION, trained)) == given.ORION


@pytest.mark.parametrize("number", list("12345"))
def test_no_answer_yet_and_hints(number: str) -> None:
    assert "no answer yet" in check(f"02.{number}", ...).text
    assert hint(f"02.{number}")
