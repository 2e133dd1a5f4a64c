"""Named templates: text for text as XTuner's, and nothing of a conversation lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minituner.catalog.lookup import load
from minituner.data import from_turns, render
from minituner.data.conversation import Conversation, Message
from minituner.data.templates import NamedTemplate, Segment
from minituner.errors import DataError, UsageError
from tests.shared_data import golden_lines, needs_shared

KEYS = sorted(load("templates"))


def talk(*pairs: tuple[str, str], system: str = "") -> Conversation:
    """A chat of (question, answer) pairs."""
    head = [Message("system", system)] if system else []
    return Conversation(head + [Message(r, t) for p in pairs for r, t in zip(("user", "assistant"), p, strict=True)])


def text_of(segments: list[Segment], kind: str) -> list[str]:
    """The texts of all segments of a kind."""
    return [s.text for s in segments if s.kind == kind]


def test_there_are_xtuners_27_templates() -> None:
    assert len(KEYS) == 27


@needs_shared
@pytest.mark.parametrize("key", KEYS)
def test_texts_are_xtuners(key: str) -> None:
    """Every templated case, turn by turn: input, output, sep and whether the tokenizer's end token follows."""
    cases = [c for c in golden_lines("templates_encode.jsonl") if c["template"] == key and "templated" in c]
    checked = 0
    for case in cases:
        templated = case["templated"]["conversation"] if isinstance(case["templated"], dict) else case["templated"]
        conversation = from_turns(case["conversation"])
        if not templated or conversation.is_text:  # a pre-training text takes no template here (XTuner's would wrap it)
            continue
        segments = render(conversation, key)
        want = [text for turn in templated for text in (turn["input"], turn["output"], turn["sep"]) if text]
        assert [s.text for s in segments if s.text] == want, case["id"]
        assert text_of(segments, "eos") == [""] * sum(turn["need_eos_token"] for turn in templated), case["id"]
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("key", KEYS)
@given(question=st.sampled_from(["{input}", "{system} {round}", "{", "}{", "%s {0}", "合同{}😀", ""]))
def test_braces_in_a_text_stay(key: str, question: str) -> None:
    segments = render(talk((question, question)), key)
    assert question in segments[0].text
    assert text_of(segments, "answer") == [question + NamedTemplate.find(key).suffix]


def test_rounds_count_from_one() -> None:
    prompts = text_of(render(talk(("a", "b"), ("c", "d")), "chatglm2"), "prompt")
    assert "[Round 1]" in prompts[0]
    assert any("[Round 2]" in prompt for prompt in prompts[1:])


def test_several_system_and_user_texts_are_kept() -> None:
    conversation = Conversation(
        [
            Message("system", "一"),
            Message("system", "二"),
            Message("user", "a"),
            Message("user", "b"),
            Message("assistant", "c"),
            Message("user", "tail"),
        ]
    )
    segments = render(conversation, "qwen_chat")
    assert "一\n二" in segments[0].text
    assert "a\nb" in segments[0].text
    assert "tail" in segments[-1].text
    assert not segments[-1].trained


def test_a_system_text_without_a_place_is_refused() -> None:
    """XTuner: AttributeError (trap 7)."""
    with pytest.raises(DataError, match="'minicpm' has no place for a system text"):
        render(talk(("a", "b"), system="s"), "minicpm")


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (Message("assistant", "", tool_calls=[{"function": {"name": "f"}}]), "tool calls"),
        (Message("assistant", "a", reasoning_content="hm"), "reasoning_content"),
        (Message("text", "3"), "'text' messages"),
        (Message("user", [{"type": "image", "image": "a.png"}]), "images"),
    ],
)
def test_what_would_be_lost_is_refused(message: Message, what: str) -> None:
    with pytest.raises(DataError, match=what):
        render(Conversation([Message("user", "a"), message, Message("assistant", "b")]), "qwen_chat")


def test_a_tools_result_is_read_where_the_users_text_is() -> None:
    """A catalog recipe trains MOSS and MSAgent under its model's template; XTuner gives results as system texts."""
    asked, call, told, answer = Message("user", "rain?"), Message("assistant", "Action:weather"), "no", "It is dry."
    with_tool = [asked, call, Message("tool", told), Message("assistant", answer)]
    with_user = [asked, call, Message("user", told), Message("assistant", answer)]
    assert render(Conversation(with_tool), "qwen_chat") == render(Conversation(with_user), "qwen_chat")


def trained(conversation: Conversation, loss_on: str) -> list[tuple[str, str]]:
    """(kind, text) of what is trained."""
    segments = render(conversation, "default", loss_on=loss_on)
    return [(s.kind, s.text) for s in segments if s.trained]


def test_loss_on_and_the_messages_own_loss() -> None:
    plain = talk(("q1", "a1"), ("q2", "a2"))
    assert [t for k, t in trained(plain, "assistant") if k == "answer"] == ["a1", "a2"]
    assert [t for k, t in trained(plain, "last_assistant") if k == "answer"] == ["a2"]
    everything = trained(plain, "all")
    assert {k for k, _ in everything} == {"prompt", "answer", "eos"}
    assert sum(k == "prompt" for k, _ in everything) >= 2
    for loss_on in ("assistant", "last_assistant", "all"):
        plain.messages[1].loss, plain.messages[3].loss = True, False
        assert [t for k, t in trained(plain, loss_on) if k == "answer"] == ["a1"]
    plain.messages[0].loss = True  # a question's own flag trains nothing
    assert [t for k, t in trained(plain, "assistant") if k == "answer"] == ["a1"]


def test_an_end_token_goes_with_its_answer() -> None:
    conversation = talk(("q1", "a1"), ("q2", "a2"))
    conversation.messages[1].loss = False
    segments = render(conversation, "default")
    assert [(s.kind, s.trained) for s in segments if s.kind in ("answer", "eos")] == [
        ("answer", False),
        ("eos", False),
        ("answer", True),
        ("eos", True),
    ]


def test_a_document_is_trained_whole_and_ends() -> None:
    assert render(Conversation([Message("text", "正文")]), "qwen_chat") == [
        Segment("正文", True, "text"),
        Segment("", True, "eos"),
    ]


def test_a_generation_prompt_trains_nothing() -> None:
    for loss_on in ("assistant", "all"):
        segments = render(talk(("a", "b")), "qwen_chat", loss_on=loss_on, add_generation_prompt=True)
        assert not any(s.trained for s in segments)
        assert segments[-1].text.endswith("<|im_start|>assistant\n")


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="qwen_chat"):
        render(talk(("a", "b")), "qwen_chta")
    with pytest.raises(UsageError, match="give the tokenizer"):
        render(talk(("a", "b")), "native")
