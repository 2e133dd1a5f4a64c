"""The chatml layout with tools: parity with XTuner's ftdp tool, and the places where the default departs from it ."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.data.ftdp_chatml import CHATML_TOKENS, add_chatml_tokens, chatml_sample, chatml_tokens
from minituner.errors import DataError, UsageError
from tests.golden_tokenizers import byte_tokenizer, smollm2_gguf_tokenizer
from tests.shared_data import golden_lines, needs_shared


@pytest.fixture(scope="module")
def smollm2() -> Any:
    tokenizer = smollm2_gguf_tokenizer()
    add_chatml_tokens(tokenizer)
    return tokenizer


@needs_shared
@pytest.mark.parametrize("case", golden_lines("ftdp/chatml_format.jsonl"), ids=lambda case: case["id"])
def test_chatml_parity(case: dict[str, Any], smollm2: Any) -> None:
    if case["kind"] == "added_tokens":
        assert add_chatml_tokens(smollm2) == case["added"]
        assert len(smollm2) == case["vocab_after"]
        return
    max_length = case.get("max_len", 32768)
    before = json.dumps(case["record"])
    if "error" in case:
        with pytest.raises(DataError):  # where XTuner has a KeyError or an IndexError
            chatml_tokens(case["record"], smollm2, max_length, strict_xtuner=True)
        return
    assert chatml_tokens(case["record"], smollm2, max_length, strict_xtuner=True) == case["tokens"]
    assert json.dumps(case["record"]) == before  # XTuner's folding changes the record it was given
    if not case["record"]:
        return
    # The default: the same ids without the second BOS, trained nowhere that XTuner masks.
    strict = chatml_sample(case["record"], smollm2, None, strict_xtuner=True)
    ours = chatml_sample(case["record"], smollm2, None)
    assert ours["input_ids"] == strict["input_ids"][1:]
    assert all(
        ours_label in (label, -100) for ours_label, label in zip(ours["labels"], strict["labels"][1:], strict=True)
    )


class MergingTokenizer:
    """Bytes, except that the six control tokens and a double newline are one token each: what BPE does, in small."""

    bos_token_id: int | None = 1
    parts = (*CHATML_TOKENS, "\n\n")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        while text:
            part = next((p for p in self.parts if text.startswith(p)), None)
            ids += (
                [1000 + self.parts.index(part)] if part else byte_tokenizer().encode(text[0], add_special_tokens=False)
            )
            text = text[len(part or text[0]) :]
        return ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.parts[i - 1000].encode() if i >= 1000 else bytes([i - 3]) for i in ids).decode()


def trained_text(messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = MergingTokenizer()
    ours = chatml_sample(messages, tokenizer, **options)
    return tokenizer.decode([label for label in ours["labels"] if label != -100])


USER = {"role": "user", "content": "问"}


def test_a_masked_message_trains_nothing() -> None:
    for extra in ({"loss": False}, {"type": "prefix"}, {"loss": False, "type": "prefix"}):
        assert trained_text([USER, {"role": "assistant", "content": "答", **extra}]) == ""
    for extra in ({}, {"loss": None}, {"loss": True}, {"type": "icl"}):
        assert trained_text([USER, {"role": "assistant", "content": "答", **extra}]) == "答<|im_end|>\n"
    for role in ("system", "environment", "user"):
        assert trained_text([{"role": role, "content": "x", "name": "plugin"}]) == ""


def test_a_folded_message_keeps_its_own_loss() -> None:
    call = {"role": "tool", "name": "interpreter", "content": "1+1"}
    assert trained_text([USER, {**call, "loss": False}]) == ""
    opened = "<|action_start|><|interpreter|>\n1+1<|action_end|>\n<|im_end|>\n"
    assert trained_text([USER, call]) == opened
    assert trained_text([USER, {"role": "thought", "content": "嗯"}, call]) == "嗯" + opened
    with pytest.raises(DataError, match="message 2: loss, type"):
        trained_text([USER, {"role": "assistant", "content": "a"}, {**call, "loss": False}])


def test_content_that_merges_with_the_layout_is_kept_whole() -> None:
    assert trained_text([USER, {"role": "assistant", "content": "\n答"}]) == "\n答<|im_end|>\n"
    assert trained_text([USER, {"role": "assistant", "content": "\n"}]) == "\n<|im_end|>\n"


def test_bos_at_most_once_and_never_trained(smollm2: Any) -> None:
    messages = [USER, {"role": "assistant", "content": "答"}]
    ours = chatml_sample(messages, MergingTokenizer())
    assert (ours["input_ids"][0], ours["labels"][0]) == (1, -100)
    without = MergingTokenizer()
    without.bos_token_id = None
    assert chatml_sample(messages, without)["input_ids"] == ours["input_ids"][1:]
    assert chatml_tokens(messages, smollm2)[:2] == [-1, -4093]  # SmolLM2's BOS is <|im_start|> itself


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "no messages"),
        (["x"], "message 0: str"),
        ([{"role": "assistent", "content": "x"}], "did you mean 'assistant'"),
        ([{"content": "x"}], "message 0: role"),
        ([USER, {"role": "assistant", "content": None}], "message 1: content"),
        ([{**USER, "name": 3}], "message 0: name"),
        ([{**USER, "loss": "no"}], "message 0: loss"),
        ([{**USER, "type": "meta"}], "message 0: type"),
        ([{"role": "thought", "content": "x"}], "comes first"),
        ([{"role": "tool", "name": "plugin", "content": "x"}], "comes first"),
        ([USER, {"role": "tool", "content": "x"}], "message 1: name: missing"),
        ([{**USER, "content": "a<|im_end|>b"}], "message 0: content: contains"),
        ([{**USER, "name": "<|im_start|>"}], "message 0: name: contains"),
    ],
)
def test_messages_that_cannot_be_used(messages: list, text: str) -> None:
    with pytest.raises(DataError) as caught:
        chatml_sample(messages, MergingTokenizer())
    assert text in str(caught.value)


def test_control_tokens_can_be_allowed_and_must_exist_in_the_tokenizer() -> None:
    messages = [USER, {"role": "assistant", "content": "<|plugin|>"}]
    assert trained_text(messages, allow_control_tokens=True) == "<|plugin|><|im_end|>\n"
    with pytest.raises(UsageError, match="add_chatml_tokens"):
        chatml_sample([USER], byte_tokenizer())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(("system", "user", "assistant", "environment", "thought", "tool")), min_size=1), st.data()
)
def test_trained_text_is_what_assistants_say(roles: list[str], data: st.DataObject) -> None:
    text = st.text(st.characters(exclude_categories=("Cs",)), max_size=6).filter(lambda t: "<|" not in t)
    messages = [{"role": "user", "content": "q"}]
    said, before = "", "user"
    for role in roles:
        content = data.draw(text)
        messages.append({"role": role, "content": content, **({"name": "t"} if role == "tool" else {})})
        speaks = role in ("assistant", "thought", "tool")
        if before == "assistant" and (role == "assistant" or not speaks):
            said += "<|im_end|>\n"
        said += f"<|action_start|>t\n{content}<|action_end|>\n" if role == "tool" else content if speaks else ""
        before = "assistant" if speaks else role
    assert trained_text(messages) == said + ("<|im_end|>\n" if before == "assistant" else "")
