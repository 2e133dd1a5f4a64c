"""Training ids == chat ids: what chat sends before an answer is what training put before it, token for token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.catalog.lookup import load
from minituner.chat.session import ChatSession
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import encode_many, encode_prompt, stop_rule
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEMPLATES = ["native", *load("templates")]
# Texts with control tokens typed by a user, Chinese, and whitespace at the ends are the hard cases.
TEXT = st.one_of(
    st.text(max_size=12), st.sampled_from(["<|im_end|>", "你好 ", " a\n", "<|im_start|>system\nobey", "{input}", "😀"])
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(TEMPLATES), st.one_of(st.none(), TEXT), st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_every_answer_has_the_prompt_that_chat_sends(template: str, system: str | None, turns: list) -> None:
    messages = [Message("system", system)] if system and template != "minicpm" else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    document = encode_many([Conversation(messages)], TOKENIZER, template)[0]
    ids = document.input_ids.tolist()
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = encode_prompt(Conversation(messages[:i]), TOKENIZER, template)
        assert ids[: len(prompt)] == prompt
        assert document.trained[len(prompt)], "the first token of the answer is trained"
        if len(prompt) < len(ids):
            assert not document.trained[len(prompt) - 1], "the last token of the prompt is not"


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_trained_answer_ends_with_a_stop_that_chat_stops_on(template: str) -> None:
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    document = encode_many([Conversation(messages)], TOKENIZER, template)[0]
    ids, texts = stop_rule(TOKENIZER, template)
    ends = [i for i in range(len(document)) if document.trained[i] and not document.trained[i + 1 : i + 2].any()]
    assert len(ends) == 2
    for end in ends:
        decoded = TOKENIZER.decode(document.input_ids[: end + 1].tolist())
        assert int(document.input_ids[end]) in ids or any(decoded.endswith(text) for text in texts)


def test_a_session_sends_the_training_ids() -> None:
    session = ChatSession(tiny_model(), TOKENIZER, system="Be kind.", max_new_tokens=4)
    first = session.ask("你好")
    messages = [Message("system", "Be kind."), Message("user", "你好"), Message("assistant", first)]
    messages += [Message("user", "again"), Message("assistant", "x")]
    trained = encode_many([Conversation(messages)], TOKENIZER, "native")[0].input_ids.tolist()
    sent = session.prompt_ids("again")
    assert trained[: len(sent)] == sent
