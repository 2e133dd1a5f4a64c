"""Formats: parity with XTuner in strict mode, its traps avoided by default, and never an exception but DataError."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest

from minituner.data.conversation import Conversation, to_turns
from minituner.data.formats import FORMATS, to_conversation
from minituner.errors import DataError, UsageError
from tests.shared_data import golden_lines, needs_shared

MAP_FNS = golden_lines("map_fns.jsonl")


def says(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in conversation.messages]


def chat(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def human_gpt(*texts: str, first: str = "human") -> dict[str, Any]:
    whos = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return {"conversations": [{"from": whos[i % 2], "value": text} for i, text in enumerate(texts)]}


# --- strict: what XTuner returns --------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("case", MAP_FNS, ids=[case["id"] for case in MAP_FNS])
def test_strict_equals_xtuner(case: dict[str, Any]) -> None:
    record = copy.deepcopy(case["input"])
    if "error" in case:
        with pytest.raises(DataError):
            to_conversation(record, case["map_fn"], strict_xtuner=True)
        return
    conversation = to_conversation(record, case["map_fn"], strict_xtuner=True)
    assert to_turns(conversation) == case["output"]["conversation"]
    assert record == case["input"]  # XTuner's llava writes into the record


@needs_shared
def test_arrow_fills_gaps_with_null_and_strict_masks_them() -> None:
    """Trap 2: `loss` on one message gives all others null, which XTuner reads as false; by default null is unset."""
    for case in golden_lines("arrow_effects.jsonl")[:2]:
        for stored, mapped in zip(case["as_stored_by_datasets"], case["mapped"], strict=True):
            assert to_turns(to_conversation(stored, "openai", strict_xtuner=True)) == mapped
            assert to_conversation(stored, "openai").messages[1].loss in (None, True)
    system, loss = golden_lines("arrow_effects.jsonl")[2:]
    turns = to_turns(to_conversation(loss["as_stored_by_datasets"][0], "conversation", strict_xtuner=True))
    assert [turn["output_with_loss"] for turn in turns] == [False, False]
    kept = to_conversation(loss["as_stored_by_datasets"][0], "conversation")
    assert [message.loss for message in kept.messages] == [None, False, None, None]
    assert (
        to_turns(to_conversation(system["as_stored_by_datasets"][0], "conversation"))
        == (system["input"][0]["conversation"])
    )


@needs_shared
def test_strict_moss_trains_what_mosssftdataset_trains() -> None:
    """The golden samples are bytes + 3 between a bos and an eos around the meta instruction; -100 is masked."""
    case = golden_lines("moss_sft.jsonl")[0]
    for record, sample in zip(case["records"], case["samples"], strict=False):
        conversation = to_conversation(record, "moss_003_sft", strict_xtuner=True)
        ids: list[int] = []
        labels: list[int] = []
        for message in conversation.messages:
            text = [byte + 3 for byte in message.text.encode()]
            text = [1, *text, 2] if message.role == "system" else text
            ids += text
            labels += text if message.loss else [-100] * len(text)
        assert (ids, labels) == (sample["input_ids"], sample["labels"])
    assert to_conversation(case["records"][3], "moss_003_sft", strict_xtuner=True) == Conversation(
        []
    )  # a turn is missing


def test_strict_has_no_format_that_xtuner_lacks() -> None:
    with pytest.raises(UsageError, match="XTuner has no 'sharegpt'"):
        to_conversation(FORMATS["sharegpt"].example, "sharegpt", strict_xtuner=True)
    assert [name for name, entry in FORMATS.items() if entry.strict is None] == ["sharegpt", "tokenized"]


def test_data_is_never_executed(tmp_path: Any) -> None:
    """Trap 14: XTuner passes msagent text to eval."""
    attack = {"conversations": f"__import__('pathlib').Path({str(tmp_path / 'x')!r}).touch() or []"}
    for strict in (True, False):
        with pytest.raises(DataError, match="neither JSON nor a Python literal"):
            to_conversation(attack, "msagent_react", strict_xtuner=strict)
    assert not (tmp_path / "x").exists()
    literal = {"conversations": str([{"from": "user", "value": "你好"}, {"from": "assistant", "value": "您好"}])}
    assert says(to_conversation(literal, "msagent_react")) == [("user", "你好"), ("assistant", "Final Answer:您好")]


def test_strict_reads_a_long_answer_without_a_call_in_linear_time() -> None:
    record = {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "x" * 1_000_000}]}
    assert to_turns(to_conversation(record, "msagent_react", strict_xtuner=True))[0]["output"].startswith(
        "Final Answer:x"
    )


# --- the default: where it departs, and why ---------------------------------------------------------------------------

TRAPS = {
    # format -> the traps that the default avoids; every other format is the same in both modes, errors aside
    "alpaca": "an empty or null input leaves a newline or the word None",
    "alpaca_zh": "an empty or null input leaves a newline or the word None",
    "medical": "an empty or null input leaves a newline or the word None",
    "colors": "a description without an ASCII colon, or nothing after it, is lost",
    "llava": "all but one image are deleted; an empty record is no error",
    "llava_image_only": "an empty record is no error",
    "msagent_react": "records vanish, results become system texts, parameters print as Python",
    "oasst1": "### cuts answers, roles are shifted by position, an empty record is no error",
    "openai": "an absent loss is true, an empty system text appears, user texts are glued, null loss masks",
    "openorca": "an empty system text appears",
    "pretrain": "an empty document stays a row",
    "wizardlm": "a first gpt message is skipped, human texts are glued, no answer is no error",
}
NULLS = ("default", "code_alpaca", "tiny_codes", "arxiv", "stack_exchange", "law_reference", "crime_kg_assitan", "sql")


@needs_shared
def test_the_default_equals_xtuner_outside_the_named_traps() -> None:
    same = Counter[str]()
    for case in MAP_FNS:
        try:
            turns = to_turns(to_conversation(case["input"], case["map_fn"]))
        except DataError:
            turns = None
        strict = case.get("output", {}).get("conversation")
        if case["map_fn"] in NULLS and any(value is None for value in case["input"].values()):
            assert turns is None  # null content is an error, XTuner passes it on
        elif case["map_fn"] == "openai" and turns is not None:
            assert [turn["output"] for turn in turns] == [turn["output"] for turn in strict]
        elif turns != strict:
            assert case["map_fn"] in TRAPS, case["id"]
        same[case["map_fn"]] += turns == strict
    assert same.total() > 60


@pytest.mark.parametrize("empty", [{"input": ""}, {"input": None}, {}])
def test_trap_empty_input_leaves_no_newline_and_no_none(empty: dict[str, Any]) -> None:
    for name in ("alpaca", "medical"):
        conversation = to_conversation({"instruction": "讲个笑话", "output": "好"} | empty, name)
        assert says(conversation)[-2:] == [("user", "讲个笑话"), ("assistant", "好")]
    with_input = {"instruction": "Add", "input": "1 2", "output": "3"}
    assert says(to_conversation(with_input, "alpaca")) == [("user", "Add\n1 2"), ("assistant", "3")]


def test_no_answer_is_an_empty_conversation() -> None:
    for strict in (True, False):
        record = {"instruction": "x", "input": "", "output": "<nooutput>"}
        assert to_conversation(record, "alpaca", strict_xtuner=strict) == Conversation([])
    assert to_conversation({"text": " \n"}, "pretrain") == Conversation([])


def test_trap_oasst1_headings_stay_and_roles_are_checked() -> None:
    """Trap 6."""
    text = "### Human: How?### Assistant: Like this:\n### Step 1\nread\n#### Human: a heading\n### Human: Thanks"
    assert says(to_conversation({"text": text}, "oasst1")) == [
        ("user", "How?"),
        ("assistant", "Like this:\n### Step 1\nread\n#### Human: a heading"),
        ("user", "Thanks"),
    ]
    strict = to_turns(to_conversation({"text": text}, "oasst1", strict_xtuner=True))
    assert strict == [{"input": "How?", "output": "Like this:"}]
    two = to_conversation({"text": "### Human: a### Human: b### Assistant: c"}, "oasst1")
    assert says(two) == [("user", "a"), ("user", "b"), ("assistant", "c")]
    first = to_conversation({"text": "### Assistant: hi### Human: 问### Assistant: 答"}, "oasst1")
    assert says(first) == [("assistant", "hi"), ("user", "问"), ("assistant", "答")]
    for text, why in (("plain", "no '### Human:'"), ("Title ### Human: a### Assistant: b", "'Title' stands before")):
        with pytest.raises(DataError, match=why):
            to_conversation({"text": text}, "oasst1")


def test_trap_messages_are_neither_glued_nor_lost() -> None:
    record = chat(
        ("system", "s1"), ("system", "s2"), ("user", "u1"), ("user", "u2"), ("assistant", "a"), ("user", "end")
    )
    conversation = to_conversation(record, "openai")
    assert says(conversation) == [(m["role"], m["content"]) for m in record["messages"]]
    assert to_turns(conversation) == [{"system": "s1\ns2", "input": "u1\nu2", "output": "a"}]
    assert to_turns(to_conversation(human_gpt("hello", "q", "a", first="gpt"), "wizardlm"))[1] == {
        "input": "q",
        "output": "a",
    }


@pytest.mark.parametrize(("loss", "expected"), [(True, True), (False, False), (None, None)])
def test_trap_null_loss_is_unset(loss: bool | None, expected: bool | None) -> None:
    record = chat(("user", "q"), ("assistant", "a"))
    record["messages"][1]["loss"] = loss
    assert to_conversation(record, "openai").messages[1].loss is expected
    for value, weight in ((True, 1), (False, 0)):
        weighted = chat(("user", "q"), ("assistant", "a"))
        weighted["messages"][1]["weight"] = weight
        assert to_conversation(weighted, "openai").messages[1].loss is value


def test_colors_without_a_colon_is_whole() -> None:
    for text, expected in (
        ("Sky: light: blue", "light: blue"),
        ("天蓝：浅：蓝", "浅：蓝"),
        ("teal", "teal"),
        ("teal:", "teal"),
    ):
        assert says(to_conversation({"description": text, "color": "#0"}, "colors"))[1] == ("user", expected)


def test_llava_keeps_its_images_and_the_record() -> None:
    record = human_gpt("What is it? <image>", "A cat.")
    before = copy.deepcopy(record)
    assert says(to_conversation(record, "llava"))[0] == ("user", "<image>\nWhat is it?")
    assert says(to_conversation(human_gpt("<image> or <image>?", "b"), "llava"))[0] == ("user", "<image> or <image>?")
    assert says(to_conversation(record, "llava_image_only"))[0] == ("user", "<image>")
    assert record == before


def test_msagent_steps_keep_every_result() -> None:
    answer = (
        '先查。<|startofthink|>```JSON\n{"api_name": "a", "parameters": {"x": true}}\n```<|endofthink|>'
        '<|startofexec|>{"r": 1}<|endofexec|><|startofthink|>{"api_name": "b", "parameters": {}}<|endofthink|>'
        '<|startofexec|>{"r": "二"}<|endofexec|>完成。'
    )
    record = {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": answer}]}
    assert says(to_conversation(record, "msagent_react")) == [
        ("user", "q"),
        ("assistant", 'Thought:先查。\nAction:a\nAction Input:{"x": true}'),
        ("tool", 'Response:{"r": 1}'),
        ("assistant", "Action:b\nAction Input:{}"),
        ("tool", 'Response:{"r": "二"}'),
        ("assistant", "Final Answer:完成。"),
    ]
    assert to_conversation(record, "msagent_react", strict_xtuner=True) == Conversation([])  # two results: gone
    for broken in ("<|startofthink|>{oops}<|endofthink|>", "<|startofexec|>{}<|endofexec|>", "a <|startofthink|> b"):
        record["conversations"][1]["value"] = broken
        with pytest.raises(DataError, match=r"conversations\[1\].value"):
            to_conversation(record, "msagent_react")


def test_moss_human_and_results_are_not_trained() -> None:
    conversation = to_conversation(FORMATS["moss_003_sft"].example, "moss_003_sft")
    assert [role for role, _ in says(conversation)] == ["system", "user", "assistant", "tool", "assistant"]
    assert says(conversation)[1] == ("user", "你好")
    assert says(conversation)[-1] == ("assistant", "<|MOSS|>: 你好！<eom>\n")


def test_tool_calls_and_reasoning() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"数": [1, 2]}'}}
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+2?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "must add"},
            {"role": "tool", "content": "3", "tool_call_id": "1", "name": "add"},
            {"role": "assistant", "content": "3", "tool_calls": None},
        ],
        "tools": '[{"name": "add", "parameters": {}}]',
    }
    conversation = to_conversation(record, "openai")
    user, asked, tool, _ = conversation.messages
    assert user.text == "1+2?"
    assert asked.tool_calls == [{**call, "function": {"name": "add", "arguments": {"数": [1, 2]}}}]
    assert (asked.content, asked.reasoning_content, tool.name, tool.tool_call_id) == ("", "must add", "add", "1")
    assert conversation.tools == [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    shared = {
        "conversations": [
            {"from": "human", "value": "1+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3"},
        ],
        "system": "Be brief.",
    }
    conversation = to_conversation(shared, "sharegpt")
    assert [m.role for m in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.messages[2].tool_calls == [{"type": "function", "function": {"name": "add", "arguments": {}}}]
