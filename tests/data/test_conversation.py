"""Conversations and XTuner's turns: each becomes the other without loss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minituner.data import from_turns, to_turns
from minituner.data.conversation import Conversation, Message
from minituner.errors import DataError

TEXTS = st.one_of(st.sampled_from(["", " ", "你好", "{input}", "<|im_end|>", "😀\n"]), st.text(max_size=20))


@st.composite
def turns(draw: st.DrawFn) -> list[dict]:
    """Turns as XTuner has them: input and output always, the other keys sometimes."""
    optional = {
        "system": TEXTS,
        "output_with_loss": st.booleans(),
        "need_eos_token": st.booleans(),
        "sep": st.sampled_from(["", "\n", "</s>"]),
    }
    one = st.fixed_dictionaries({"input": TEXTS, "output": TEXTS}, optional=optional)
    return draw(st.lists(one, min_size=1, max_size=4))


@given(turns())
def test_turns_survive_the_way_there_and_back(given_turns: list[dict]) -> None:
    back = to_turns(from_turns(given_turns))
    plain = [{"input": "", "output": t["output"], "need_eos_token": False} for t in given_turns]
    for turn, again, document in zip(given_turns, back, plain, strict=True):
        assert again == turn or (again == document and not turn["input"] and not turn.get("system"))


def test_a_pretraining_turn_becomes_a_document() -> None:
    document = from_turns([{"input": "", "output": "从前有座山", "need_eos_token": False}])
    assert document.is_text
    assert document.messages == [Message("text", "从前有座山")]
    assert not Conversation([]).is_text
    assert not Conversation([Message("text", "a"), Message("user", "b")]).is_text


def test_neighbours_are_joined_with_a_newline() -> None:
    talk = Conversation([Message("user", "a"), Message("user", "b"), Message("tool", "c"), Message("assistant", "d")])
    assert to_turns(talk) == [{"input": "a\nb\nc", "output": "d"}]
    two = Conversation([Message("system", "s"), Message("system", "t"), Message("assistant", "d")])
    assert to_turns(two) == [{"system": "s\nt", "output": "d"}]


def test_what_follows_the_last_answer_has_no_turn() -> None:
    assert to_turns(Conversation([Message("user", "a"), Message("assistant", "b"), Message("user", "c")])) == [
        {"input": "a", "output": "b"}
    ]


@pytest.mark.parametrize(
    ("turn", "said"), [({"input": "a"}, "output: missing"), ({"output": "b", "inputs": "a"}, "unknown keys")]
)
def test_wrong_turns_are_named(turn: dict, said: str) -> None:
    with pytest.raises(DataError, match=f"turn 0: {said}"):
        from_turns([turn])


def test_parts_are_text_and_only_set_keys_are_given_to_templates() -> None:
    parts = [{"type": "text", "text": "看"}, {"type": "image", "image": "a.png"}, {"text": "图"}]
    assert Message("user", parts).text == "看图"
    assert Message("assistant", None).text == ""
    call = {"function": {"name": "f", "arguments": {}}}
    message = Message("assistant", "", loss=True, tool_calls=[call], sep="\n")
    assert message.to_dict() == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert Conversation([Message("user", "a")]).to_dicts() == [{"role": "user", "content": "a"}]
