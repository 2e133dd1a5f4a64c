"""`bos_policy: xtuner` gives XTuner's ids and labels; where it departs, the case names the trap it avoids."""

from __future__ import annotations

from typing import Any

import pytest

from minituner.catalog.lookup import load
from minituner.data import encode, from_turns
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import encode_many
from minituner.data.xtuner_encoding import bos_eos_ids
from minituner.errors import DataError, UsageError
from tests.golden_tokenizers import byte_tokenizer, smollm2_gguf_tokenizer
from tests.shared_data import golden_lines, needs_shared

# Cases of encode_options that we do not repeat, and why.
DEPARTURES = {
    "ids/Qwen2Tokenizer": "a missing BOS is no BOS; XTuner keeps None and crashes on it (trap 5)",
    "encode/Qwen2Tokenizer/multi": "as above",
    "ids/no_bos": "as above",
    "encode/no_bos/multi": "as above",
    "ids/no_eos": "a missing end token is said when an answer needs it, as a DataError (XTuner: TypeError)",
    "encode/no_eos/multi": "as above",
    "ids/qwen_no_eos": "as above (XTuner: AssertionError)",
    "encode/qwen_no_eos/multi": "as above",
    "option/loss_none_is_false/smollm2": "a null loss is an unset one; XTuner masks the turn (trap 2)",
    "option/need_eos_none_is_false/smollm2": "a null need_eos_token is an unset one (trap 2)",
    "option/input_only/smollm2": "input_ids_with_output is for evaluation; encode_prompt makes prompts here",
    "option/input_only_multi_asserts/smollm2": "as above",
    "option/image_token/smollm2": "images are a later room; `<image>` is text until then",
    "option/two_images_assert/smollm2": "as above",
    "option/image_second_turn/smollm2": "as above",
    "option/output_none/smollm2": "a null output is an empty one (XTuner: TypeError)",
    "option/sep_none/smollm2": "a null sep is no sep (XTuner: TypeError)",
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """The two tokenizers of the cases."""
    return {"byte": byte_tokenizer(), "smollm2": smollm2_gguf_tokenizer()}


@needs_shared
@pytest.mark.parametrize("key", sorted(load("templates")))
def test_every_template_gives_xtuners_ids_and_labels(key: str, tokenizers: dict[str, Any]) -> None:
    checked = 0
    for case in golden_lines("templates_encode.jsonl"):
        if case["template"] != key:
            continue
        for name, want in case.get("encoded", {}).items():
            tokenizer, max_length = name.split("@")
            conversation = from_turns(case["conversation"])
            got = encode(conversation, tokenizers[tokenizer], key, int(max_length), "xtuner")
            assert got == want, (case["id"], name)
            checked += 1
    assert checked >= 8


def options(kind: str) -> list[Any]:
    """The encode_options cases of a kind."""
    return [pytest.param(c, id=c["id"]) for c in golden_lines("encode_options.jsonl") if c["kind"] == kind]


def tokenizer_of(case: dict[str, Any], tokenizers: dict[str, Any]) -> Any:
    """The tokenizer a case asks for."""
    if "tokenizer" in case:
        return tokenizers[case["tokenizer"]]
    return byte_tokenizer(case["tokenizer_class"], case["bos_token_id"], case["eos_token_id"])


@needs_shared
@pytest.mark.parametrize("case", options("get_bos_eos_token_ids"))
def test_bos_and_eos_by_class_name(case: dict[str, Any]) -> None:
    got = [list(ids) for ids in bos_eos_ids(tokenizer_of(case, {}))]
    if case["id"] in DEPARTURES:
        want = case.get("output", [None, None])
        assert got == [ids or [] for ids in want]
    else:
        assert got == case["output"]


@needs_shared
@pytest.mark.parametrize("case", options("encode_fn"))
def test_turn_options(case: dict[str, Any], tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(case, tokenizers)
    limit = case.get("kwargs", {}).get("max_length", case.get("max_length", 2048))

    def got() -> dict[str, list[int]]:
        return encode(from_turns(case["conversation"]), tokenizer, None, limit, "xtuner")

    if case["id"] in ("encode/no_eos/multi", "encode/qwen_no_eos/multi"):
        with pytest.raises(DataError, match="has no end token"):
            got()
    elif case["id"] in DEPARTURES:
        assert got() != case.get("output")
        assert got()["input_ids"]
    elif "error" in case:
        with pytest.raises(TypeError):
            got()
    else:
        assert got() == case["output"]


@needs_shared
def test_every_departure_is_still_one() -> None:
    ids = {case["id"] for case in golden_lines("encode_options.jsonl")}
    assert set(DEPARTURES) <= ids


@needs_shared
@pytest.mark.parametrize("case", [pytest.param(c, id=c["id"]) for c in golden_lines("arrow_effects.jsonl")])
def test_nulls_that_arrow_adds_change_nothing(case: dict[str, Any], tokenizers: dict[str, Any]) -> None:
    """Trap 2: Arrow fills missing keys with null, XTuner reads a null loss as false and masks the turn."""
    from minituner.data import to_conversation

    layout = "openai" if "messages" in case["input"][0] else "conversation"
    for before, stored in zip(case["input"], case["as_stored_by_datasets"], strict=True):
        one, other = to_conversation(before, layout), to_conversation(stored, layout)
        for policy in ("once", "xtuner"):
            ids = encode(one, tokenizers["byte"], "internlm2_chat", bos_policy=policy)
            assert ids == encode(other, tokenizers["byte"], "internlm2_chat", bos_policy=policy)
        assert any(label >= 0 for label in ids["labels"]) or before["conversation"][0]["output_with_loss"] is False


@needs_shared
def test_rows_are_those_of_xtuners_pipeline() -> None:
    """process_hf_dataset without packing: the same rows, cut at max_length; rows without a label are dropped."""
    checked = 0
    for case in golden_lines("process_hf_dataset.jsonl"):
        kwargs = case["kwargs"]
        unpacked = kwargs.get("pack_to_max_length") is False and kwargs.get("input_ids_with_output", True)
        if "error" in case or not unpacked or "max_dataset_length" in kwargs:
            continue
        rows = [
            encode(from_turns(turns), byte_tokenizer(), None, kwargs["max_length"], "xtuner")
            for turns in case["conversations"]
        ]
        want = case["output"]["data"]
        kept = [row for row in rows if any(label >= 0 for label in row["labels"])]
        for column in ("input_ids", "labels"):
            assert [row[column] for row in kept] == want[column], case["id"]
        checked += 1
    assert checked >= 3


def test_what_the_policy_cannot_do_is_said() -> None:
    chat = Conversation([Message("user", "a"), Message("assistant", "b")])
    with pytest.raises(UsageError, match="named templates"):
        encode(chat, byte_tokenizer(), "native", bos_policy="xtuner")
    with pytest.raises(UsageError, match="loss_on is 'last_assistant'"):
        encode_many([chat], byte_tokenizer(), "qwen_chat", "xtuner", loss_on="last_assistant")
    chat.messages[1].tool_calls = [{"function": {"name": "f"}}]
    with pytest.raises(DataError, match="tool calls"):
        encode(chat, byte_tokenizer(), "qwen_chat", bos_policy="xtuner")
