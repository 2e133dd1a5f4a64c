"""Formats: what is refused and how it is said, which layout is recognised, and a fuzz over everything."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.data.conversation import ROLES, Conversation, Message, from_turns, to_turns
from minituner.data.formats import FORMATS, detect_format, find_format, to_conversation
from minituner.data.records import Record, read_records
from minituner.errors import DataError, UsageError
from tests.data.test_formats import chat, human_gpt
from tests.shared_data import SHARED, needs_shared

# --- errors -----------------------------------------------------------------------------------------------------------

BAD: list[tuple[str, Any, str]] = [
    ("alpaca", {"instruction": "x"}, "output: missing"),
    ("alpaca", {"instruction": None, "output": "y"}, "instruction: expected text, found null"),
    ("alpaca", {"instruction": "x", "input": 3, "output": "y"}, "input: expected text, found a number"),
    ("default", {"input": "x", "output": ["y"]}, "output: expected text, found a list"),
    ("default", ["x"], "record: expected an object, found a list"),
    ("pretrain", {"text": None}, "text: expected text, found null"),
    ("openai", {"prompt": "x"}, "messages: missing"),
    ("openai", {"messages": []}, "messages: empty"),
    ("openai", {"messages": "x"}, "messages: not valid JSON"),
    ("openai", {"messages": {"role": "user"}}, "messages: expected a list of messages, found an object"),
    ("openai", {"messages": ["hi"]}, "messages[0]: expected an object, found text"),
    ("openai", chat(("user", "q"), ("asistant", "a")), "messages[1].role: unknown role 'asistant'"),
    ("openai", {"messages": [{"content": "x"}]}, "messages[0].role: missing"),
    ("openai", chat(("user", None), ("assistant", "a")), "messages[0].content: expected text or a list"),
    ("openai", {"messages": [{"role": "user"}]}, "messages[0].content: missing"),
    (
        "openai",
        chat(("user", []), ("assistant", "a")),
        "messages[0].content: expected text or a list of parts, found an e",
    ),
    ("openai", chat(("user", [{"type": "text"}]), ("assistant", "a")), "messages[0].content[0].text: expected text"),
    ("openai", chat(("user", "q")), "messages: no assistant message"),
    ("openai", chat(("assistant", "a"), ("user", "q")), "messages[0].role: out of order"),
    ("openai", chat(("user", "q"), ("tool", "r"), ("assistant", "a")), "messages[1].role: out of order: a tool result"),
    ("openai", {"messages": [{"role": "user", "content": "q", "loss": True}]}, "messages[0].loss: only assistant"),
    *(
        (
            "openai",
            {"messages": [{"role": "assistant", "content": "q", "loss": x}]},
            "messages[0].loss: expected true or",
        )
        for x in (1, "true", 0.0, [])
    ),
    (
        "openai",
        {"messages": [{"role": "assistant", "content": "q", "weight": 0.5}]},
        "messages[0].weight: expected 0 or 1",
    ),
    (
        "openai",
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages[0].tool_calls[0].function.arguments: not valid JSON",
    ),
    ("openai", chat(("user", "q"), ("assistant", "a")) | {"tools": {"a": 1}}, "tools: expected a list of objects"),
    ("sharegpt", {"conversations": [{"from": "humam", "value": "q"}]}, "conversations[0].from: unknown role 'humam'"),
    (
        "sharegpt",
        {"conversations": [{"from": "gpt", "value": None}]},
        "conversations[0].value: expected text, found null",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "f()"}]},
        "conversations[0].value: not valid JSON",
    ),
    ("wizardlm", {"conversations": [{"from": "system", "value": "s"}]}, "conversations[0].from: unknown role 'system'"),
    ("llava_image_only", human_gpt("no picture", "a"), "conversations[0].value: no <image>"),
    ("conversation", {"conversation": [{"input": "x"}]}, "conversation[0].output: missing"),
    ("conversation", {"conversation": [{"inptu": "x", "output": "y"}]}, "conversation[0].inptu: unknown key"),
    (
        "conversation",
        {"conversation": [{"output": "y", "output_with_loss": 1}]},
        "conversation[0].output_with_loss: expec",
    ),
    ("msagent_react", {"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from: unknown role 'bot'"),
    ("moss_003_sft", {"chat": {}, "num_turns": 1}, "chat.turn_1: expected an object, found null"),
    ("moss_003_sft", {"chat": {"turn_1": {}}}, "chat.turn_1.Human: expected text, found null"),
    ("auto", {"messages": None}, "format: unknown layout with the columns messages"),
]


@pytest.mark.parametrize(("name", "record", "message"), BAD, ids=[f"{name}-{message}" for name, _, message in BAD])
def test_unusable_records_name_the_field_and_the_place(name: str, record: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        to_conversation(record, name)
    assert caught.value.what.startswith(message)
    if isinstance(record, dict):
        with pytest.raises(DataError) as caught:
            to_conversation(Record(record, "train.jsonl:7"), name)
        assert str(caught.value).startswith(f"train.jsonl:7: {message}")


def test_unknown_formats_suggest_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'alpaca'"):
        to_conversation({}, "alpacca")
    assert find_format("crime_kg_assitan") is FORMATS["crime_kg_assistant"]


# --- detection --------------------------------------------------------------------------------------------------------

COINCIDE = {
    "wizardlm": "sharegpt",
    "crime_kg_assistant": "default",
    "medical": "alpaca",
    "llava_image_only": "llava",
}


@pytest.mark.parametrize("name", FORMATS)
def test_examples_work_and_are_recognised(name: str) -> None:
    entry = FORMATS[name]
    for strict in (False, True) if entry.strict else (False,):
        assert to_conversation(entry.example, name, strict_xtuner=strict).messages
    assert set(entry.columns) <= set(entry.example)
    found, why = detect_format([entry.example] * 3)
    assert found == COINCIDE.get(name, name) == (entry.detected_as or name)
    assert why.startswith("3 of 3 records have ")
    assert to_conversation(entry.example, "auto") == to_conversation(entry.example, found)


def test_detection_says_why() -> None:
    rows = [{"instruction": "a", "input": "", "output": "b", "text": "all", "history": []}, {"broken": 1}]
    assert detect_format(rows) == (
        "alpaca",
        "1 of 2 records have instruction, output, input; not read: broken, history, text",
    )
    assert "adds the system text" in detect_format([FORMATS["sql"].example])[1]


def test_detection_refuses_to_guess() -> None:
    cases: list[tuple[list[dict[str, Any]], str]] = [
        ([], "no record"),
        ([{"chosen": "a", "rejected": "b"}], "unknown layout with the columns chosen, rejected"),
        (
            [FORMATS["openai"].example | FORMATS["tiny_codes"].example],
            "ambiguous, the columns fit openai .*; tiny_codes",
        ),
        ([FORMATS["alpaca"].example, Record(FORMATS["openai"].example, "a.jsonl:2")], r"differs: a\.jsonl:2"),
        # a system text about code or law is not put in front of any question and answer
        (
            [{"question": "Why is grass green?", "answer": "Chlorophyll."}],
            "those of law_reference, but the texts are not",
        ),
        ([{"prompt": "Write a poem.", "completion": "Roses are red"}], "those of code_alpaca, but the texts are not"),
    ]
    for rows, message in cases:
        with pytest.raises(DataError, match=message):
            detect_format(rows)


@needs_shared
def test_real_files_are_recognised_and_whole() -> None:
    for name, expected in (("alpaca_en", "alpaca"), ("alpaca_zh", "alpaca"), ("glaive_toolcall_en", "sharegpt")):
        records = list(read_records(SHARED / "data" / f"{name}_demo.json"))
        assert detect_format(records[:20])[0] == expected
        for record in records:
            conversation = to_conversation(record, expected)
            if expected == "alpaca":
                user, assistant = conversation.messages
                assert user.text == "\n".join(filter(None, (record["instruction"], record["input"])))
                assert assistant.text == record["output"]
            else:
                assert len(conversation.messages) == len(record["conversations"])
                assert any(message.role == "assistant" for message in conversation.messages)


# --- turns, and fuzz --------------------------------------------------------------------------------------------------

TURN = st.fixed_dictionaries(
    {"input": st.text(min_size=1), "output": st.text()},
    optional={"system": st.text(min_size=1), "output_with_loss": st.booleans(), "need_eos_token": st.booleans()},
)


@given(st.lists(TURN, min_size=1, max_size=4))
def test_turns_survive_the_round_trip(turns: list[dict[str, Any]]) -> None:
    for conversation in (to_conversation({"conversation": turns}, "conversation"), from_turns(turns)):
        assert to_turns(conversation) == turns


SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
MARKS = st.sampled_from(
    [
        *("### Human: a", "### Assistant: b", "###", "<image>", "<nooutput>", "<|startofthink|>", "<|endofthink|>"),
        *("<|startofexec|>", "<|endofexec|>", "```JSON", '{"api_name": "a", "parameters": {}}', "Final Answer:"),
        *('{"name": "a", "description": "b"}', "<eor>\n", "<|Results|>:", "你好", "\n", ":", "\ud800", "\0", "[[[["),
        *('[{"from": "user"}]', "[]", "{}"),
    ]
)
TEXT = st.lists(MARKS, max_size=6).map("".join) | st.text(max_size=20)
WHO = st.sampled_from([*ROLES, "human", "gpt", "function_call", "observation", "bot", "", None, 3]) | SCALAR
ITEM = st.dictionaries(
    st.sampled_from(
        ["role", "content", "from", "value", "loss", "weight", "tool_calls", "name", "input", "output", "system"]
    ),
    WHO
    | TEXT
    | st.lists(SCALAR | st.dictionaries(st.sampled_from(["type", "text", "function", "name"]), TEXT), max_size=2),
) | st.builds(lambda who, text: {"role": who, "from": who, "content": text, "value": text}, WHO, TEXT)
COLUMNS = sorted({column for entry in FORMATS.values() for column in (*entry.columns, *entry.optional)})
TURNS = st.dictionaries(
    st.sampled_from(["turn_1", "turn_2"]), SCALAR | st.dictionaries(st.sampled_from(["Human", "MOSS"]), TEXT)
)
RECORD = st.dictionaries(
    st.sampled_from(COLUMNS), SCALAR | TEXT | st.lists(ITEM | SCALAR, max_size=5) | TURNS, max_size=6
)


def usable(record: Any, name: str, strict: bool) -> None:
    try:
        conversation = to_conversation(record, name, strict_xtuner=strict)
    except DataError:
        return
    assert isinstance(conversation, Conversation)
    for message in conversation.messages:
        assert isinstance(message, Message)
        assert message.role in ROLES
        assert isinstance(message.content, str | list) or (strict and message.content is None)
        assert message.loss in (None, True, False)
    assert all(
        set(turn) <= {"system", "input", "output", "output_with_loss", "need_eos_token", "sep"}
        for turn in to_turns(conversation)
    )


@settings(max_examples=300, deadline=None)
@given(RECORD | SCALAR)
def test_any_record_gives_a_conversation_or_a_data_error(record: Any) -> None:
    before = json.dumps(record, default=str)
    for name, entry in FORMATS.items():
        usable(record, name, strict=False)
        if entry.strict:
            usable(record, name, strict=True)
    usable(record, "auto", strict=False)
    assert json.dumps(record, default=str) == before


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_examples_with_one_column_changed(name: str, data: st.DataObject) -> None:
    record = dict(FORMATS[name].example)
    record[data.draw(st.sampled_from(sorted(record)))] = data.draw(
        SCALAR | TEXT | st.lists(ITEM | SCALAR, max_size=5) | TURNS
    )
    usable(record, name, strict=False)
    if FORMATS[name].strict:
        usable(record, name, strict=True)
