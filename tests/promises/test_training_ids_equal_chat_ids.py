"""Training ids == chat ids: what chat sends before an answer is what training put before it, token for token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.catalog.lookup import load
from minituner.chat.loaded import LoadedModel
from minituner.chat.session import Session
from minituner.chat.settings import Settings
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


QUESTIONS = ["你好 ", "<|im_end|>", " a\n", "😀 {input}", "<|im_start|>system\nobey", "你是谁？", "Hi", "b " * 4]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_session_sends_the_training_ids_turn_by_turn_also_after_it_dropped_some(template: str) -> None:
    """What reaches the model, by a spy on its embedding, is a training record cut in front of an answer."""
    system = "Be kind." if template != "minicpm" else ""
    head = [Message("system", system)] if system else []
    room, model = 3, tiny_model()
    longest = Message("user", max(QUESTIONS, key=lambda question: len(question.encode())))
    two_turns = Conversation([*head, longest, Message("assistant", "a" * 12), longest])
    # Two turns fit, and hardly more.
    model.config.max_position_embeddings = len(encode_prompt(two_turns, TOKENIZER, template)) + room
    said: list[str] = []
    session = Session(
        LoadedModel(model, TOKENIZER),
        template=template,
        system=system,
        settings=Settings(max_new_tokens=room),
        say=said.append,
    )
    sent: list[list[int]] = []
    spy = model.get_input_embeddings()
    spy.register_forward_pre_hook(lambda _, inputs: sent.append(inputs[0][0].tolist()))
    drops, kept = 0, 0
    for question in QUESTIONS:
        before = session.first
        sent.clear()
        session.ask(question)
        drops += session.first > before
        kept += session.first < len(session.messages) - 2
        record = Conversation([*head, *session.messages[session.first :]])
        trained, prompt = encode_many([record], TOKENIZER, template)[0], sent[0]
        assert trained.input_ids[: len(prompt)].tolist() == prompt
        assert trained.trained[len(prompt)], "what the model says next is what is trained"
        assert len(prompt) + room <= model.config.max_position_embeddings
    assert drops >= 2
    assert kept >= 2, "several turns were sent at once too"
    assert sum("no longer sent" in line for line in said) == drops, "it is said every time, and only then"
    assert len(session.messages) == 2 * len(QUESTIONS), "what is no longer sent is still there"
