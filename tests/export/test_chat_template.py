"""The saved chat template == training, as ids: for every named template, drawn conversations, with and without BOS."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.catalog.lookup import load
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import encode, encode_prompt
from minituner.errors import UsageError
from minituner.export.chat_template import with_trained_template
from tests.tiny import tiny_tokenizer

TEXT = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.sampled_from(["你好 ", " a\n", "{input}", "{round}", "{{ x }}", "{% if %}", 'it\'s "so" \\n', "😀"]),
)


@lru_cache(maxsize=2)
def tokenizer(bos: bool) -> Any:
    """A byte-level tokenizer, so that no merge crosses a border; with `bos` it puts one in front by itself."""
    plain = tiny_tokenizer()
    if bos:
        from tokenizers.processors import TemplateProcessing

        plain = copy.deepcopy(plain)
        plain.add_special_tokens({"bos_token": "<|endoftext|>"})
        plain.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
        )
    return plain


@lru_cache(maxsize=64)
def exported(template: str, bos: bool) -> Any:
    return with_trained_template(tokenizer(bos), template)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(load("templates"))),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(["system", "user", "user", "tool", "assistant"]), TEXT), min_size=1, max_size=6),
)
def test_it_gives_the_ids_of_training_and_of_chat(template: str, bos: bool, turns: list) -> None:
    messages = [Message(role, text) for role, text in turns if role != "system" or template != "minicpm"]
    messages.append(Message("user", "x"))
    plain = [message.to_dict() for message in messages]
    ours = exported(template, bos)
    prompt = ours.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == encode_prompt(Conversation(messages), tokenizer(bos), template)
    plain.append({"role": "assistant", "content": "是。"})
    whole = ours.apply_chat_template(plain, return_dict=True)["input_ids"]
    assert (
        whole == encode(Conversation([*messages, Message("assistant", "是。")]), tokenizer(bos), template)["input_ids"]
    )


def test_what_a_template_has_no_place_for_is_an_error() -> None:
    from jinja2 import TemplateError

    user = {"role": "user", "content": "x"}
    for template, messages, tools in (
        ("minicpm", [{"role": "system", "content": "s"}, user], None),
        ("qwen_chat", [{"role": "critic", "content": "s"}, user], None),
        ("qwen_chat", [user], [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
    ):
        with pytest.raises(TemplateError, match="no place for"):
            exported(template, False).apply_chat_template(messages, tools=tools, tokenize=False)
    with pytest.raises(UsageError, match="qwen_chat"):
        with_trained_template(tokenizer(False), "qwen_chta")


def test_the_tokenizer_of_the_training_is_left_as_it_is() -> None:
    before = tokenizer(False).chat_template
    assert exported("qwen_chat", False).chat_template != before == tokenizer(False).chat_template
    assert with_trained_template(tokenizer(False), "native") is tokenizer(False)
