"""The native template: for every family of chat templates the right span is trained, or the template is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minituner.data import render
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import encode_many, encode_prompt
from minituner.errors import DataError, UsageError
from tests.data import chat_templates as ct
from tests.data.test_templates import talk

CHATML = ct.Family("", ct.CHATML_CONTROLS, "<|im_end|>")
TALKS = [
    talk(("Hi", "Hello!")),
    talk(("你好", "您好😀"), ("再见", "再见！\n下次见")),
    talk(("a", "b"), ("c", "d"), ("e", "f")),
]


def chatml(template: str) -> Any:
    """A ChatML tokenizer with this template."""
    return ct.family_tokenizer(replace(CHATML, template=template))


def answers(conversation: Conversation) -> list[str]:
    """The texts of the answers."""
    return [m.text for m in conversation.messages if m.role == "assistant"]


def talks(name: str) -> list[Conversation]:
    """The chats for a family; Qwen3 without thinking prints an earlier answer unlike chat, so it gets one turn."""
    return TALKS[:1] if name == "qwen3" else TALKS


@pytest.mark.parametrize(("name", "conversation"), [(name, t) for name in ct.FAMILIES for t in talks(name)])
def test_the_trained_text_is_answer_and_stop(name: str, conversation: Conversation) -> None:
    family = ct.FAMILIES[name]
    tokenizer = ct.family_tokenizer(family)
    document = encode_many([conversation], tokenizer)[0]
    want = "".join(family.answer.format(a) + family.stop for a in answers(conversation))
    assert tokenizer.decode(document.input_ids[document.trained]) == want
    assert tokenizer.decode(document.input_ids[document.trained][-1:]) == family.stop


@pytest.mark.parametrize("name", ct.FAMILIES)
def test_all_that_the_template_prints_is_encoded_once(name: str) -> None:
    """The ids spell what transformers renders (plus the end token where the template prints no stop)."""
    family = ct.FAMILIES[name]
    tokenizer = ct.family_tokenizer(family)
    for conversation in talks(name):
        whole = tokenizer.apply_chat_template(conversation.to_dicts(), tokenize=False)
        got = tokenizer.decode(encode_many([conversation], tokenizer)[0].input_ids)
        assert (got.replace("</s>", "") if name == "no_stop" else got) == whole
        assert "".join(segment.text for segment in render(conversation, tokenizer=tokenizer)) == whole


@pytest.mark.parametrize("name", ct.FAMILIES)
def test_before_every_answer_stands_the_prompt_that_chat_sends(name: str) -> None:
    tokenizer = ct.family_tokenizer(ct.FAMILIES[name])
    for conversation in talks(name):
        ids = encode_many([conversation], tokenizer)[0].input_ids.tolist()
        for i, message in enumerate(conversation.messages):
            if message.role == "assistant":
                prompt = encode_prompt(Conversation(conversation.messages[:i]), tokenizer)
                assert ids[: len(prompt)] == prompt


def test_bos_is_printed_once_by_the_template_and_not_added_again() -> None:
    for name in ("llama3", "mistral", "gemma"):
        tokenizer = ct.family_tokenizer(ct.FAMILIES[name])
        for conversation in TALKS:
            assert encode_many([conversation], tokenizer)[0].input_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_the_default_system_text_is_prompt() -> None:
    tokenizer = ct.family_tokenizer(ct.FAMILIES["chatml"])
    assert "你是一个助手" in render(TALKS[0], tokenizer=tokenizer)[0].text
    own = render(talk(("a", "b"), system="简短。"), tokenizer=tokenizer)
    assert own[0].text.startswith("<|im_start|>system\n简短。<|im_end|>")


@pytest.mark.parametrize(
    ("name", "roles", "said"),
    [
        ("mistral", ["user", "user", "assistant"], "must alternate"),
        ("mistral", ["system", "user", "assistant"], "must alternate"),
        ("llama2", ["assistant"], "must alternate"),
        ("gemma", ["system", "user", "assistant"], "System role not supported"),
    ],
)
def test_a_template_that_raises_is_quoted_with_the_roles(name: str, roles: list[str], said: str) -> None:
    conversation = Conversation([Message(role, "x") for role in roles])
    with pytest.raises(DataError) as error:
        encode_many([conversation], ct.family_tokenizer(ct.FAMILIES[name]))
    assert said in str(error.value)
    assert f"roles: {', '.join(roles)}" in str(error.value)


def test_thinking_that_the_generation_prompt_supplies_is_not_trained() -> None:
    tokenizer = ct.family_tokenizer(ct.FAMILIES["qwen3"])
    segments = render(TALKS[0], tokenizer=tokenizer)
    assert segments[0].text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert segments[1].text == "Hello!<|im_end|>"


def test_thinking_of_an_answer_is_trained_when_the_prompt_leaves_it_open() -> None:
    template = ct.QWEN3_NO_THINKING.replace("default(false)", "default(true)")
    segments = render(talk(("q", "<think>\nhm\n</think>\n\n42")), tokenizer=chatml(template))
    assert [s.text for s in segments if s.trained] == ["<think>\nhm\n</think>\n\n42<|im_end|>"]


def test_qwen3_with_thinking_open_trains_every_answer() -> None:
    template = ct.QWEN3_NO_THINKING.replace("default(false)", "default(true)")
    segments = render(TALKS[1], tokenizer=chatml(template))
    assert [s.text for s in segments if s.trained] == [
        "您好😀<|im_end|>",
        "<think>\n\n</think>\n\n再见！\n下次见<|im_end|>",
    ]


def test_qwen3_without_thinking_refuses_an_earlier_answer() -> None:
    """At chat time its prompt ended with an empty thinking block, which the whole conversation no longer shows."""
    tokenizer = ct.family_tokenizer(ct.FAMILIES["qwen3"])
    with pytest.raises(DataError, match="the prompt before it is rendered differently once it is answered") as error:
        render(TALKS[1], tokenizer=tokenizer)
    assert "'<think>" in str(error.value)
    segments = render(TALKS[1], tokenizer=tokenizer, loss_on="last_assistant")
    assert [s.text for s in segments if s.trained] == ["再见！\n下次见<|im_end|>"]


def test_an_earlier_answer_whose_thinking_is_left_out_is_refused_or_not_trained() -> None:
    template = ct.QWEN3_NO_THINKING.replace("default(false)", "default(true)")
    conversation = talk(("q", "<think>\nhm\n</think>\n\n41"), ("r", "<think>\nso\n</think>\n\n42"))
    with pytest.raises(DataError, match=r"messages\[1\].*cannot be masked safely(.|\n)*first difference at character"):
        render(conversation, tokenizer=chatml(template))
    segments = render(conversation, tokenizer=chatml(template), loss_on="last_assistant")
    assert [s.text for s in segments if s.trained] == ["<think>\nso\n</think>\n\n42<|im_end|>"]
    assert "41<|im_end|>" in segments[0].text


def test_chat_goes_on_after_an_answer_that_could_not_be_trained() -> None:
    template = ct.QWEN3_NO_THINKING.replace("default(false)", "default(true)")
    history = talk(("q", "<think>\nhm\n</think>\n\n41"))
    history.messages.append(Message("user", "r"))
    assert tokenizer_text(chatml(template), history).endswith(
        "41<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
    )


def tokenizer_text(tokenizer: Any, conversation: Conversation) -> str:
    """The prompt that chat sends, as text."""
    return tokenizer.decode(encode_prompt(conversation, tokenizer))


def test_an_answer_without_a_stop_gets_the_end_token() -> None:
    segments = render(TALKS[1], tokenizer=ct.family_tokenizer(ct.FAMILIES["no_stop"]))
    assert [s.kind for s in segments] == ["prompt", "answer", "eos", "prompt", "answer", "eos", "prompt"]
    assert segments[1].text == "您好😀"


def test_a_control_token_inside_an_answer_is_no_stop() -> None:
    conversation = talk(("q", "first<|im_end|>second"))
    tokenizer = chatml(ct.NO_STOP)
    document = encode_many([conversation], tokenizer, allow_control_tokens=True)[0]
    assert tokenizer.decode(document.input_ids[document.trained]) == "first<|im_end|>second<|im_end|>"


@pytest.mark.parametrize("template", [ct.MARKED_WRONG, ct.MARKED_HALF])
def test_marks_that_name_something_else_are_refused(template: str) -> None:
    with pytest.raises(DataError, match="generation marks and its rendering disagree on answer 0"):
        render(TALKS[0], tokenizer=chatml(template))


def test_marks_may_come_in_pieces_and_must_be_on_every_trained_answer() -> None:
    pieces = ct.MARKED_HALF.replace(
        "{{ m['content'][2:] +", "{% generation %}{{ m['content'][2:] }}{% endgeneration %}{{"
    )
    segments = render(TALKS[0], tokenizer=chatml(pieces))
    assert [s.text for s in segments if s.trained] == ["Hello!<|im_end|>"]
    last_only = ct.MARKED.replace("if m['role'] == 'assistant'", "if m['role'] == 'assistant' and loop.last")
    with pytest.raises(DataError, match="disagree on answer 0"):
        render(TALKS[1], tokenizer=chatml(last_only))
    assert render(TALKS[1], tokenizer=chatml(last_only), loss_on="last_assistant")


def test_a_template_that_moves_the_last_message_is_refused_with_the_first_difference() -> None:
    with pytest.raises(DataError, match="cannot be masked safely") as error:
        render(TALKS[0], tokenizer=chatml(ct.LAST_FIRST))
    assert "first difference at character 1: 'i<|im_end|>" in str(error.value)
    assert "became 'ello!" in str(error.value)


def test_tool_calls_must_be_printed() -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}
    conversation = Conversation([Message("user", "天气？"), Message("assistant", "", tool_calls=[call])])
    with pytest.raises(DataError, match=r"messages\[1\].tool_calls: .*drops the call of 'get_weather'"):
        render(conversation, tokenizer=chatml(ct.CHATML_DEFAULT_SYSTEM))
    printed = ct.CHATML_DEFAULT_SYSTEM.replace(
        "m['content'] +", "m['content'] + (m.tool_calls|tojson if m.tool_calls else '') +"
    )
    segments = render(conversation, tokenizer=chatml(printed))
    assert "北京" in segments[1].text
    assert segments[1].trained


def test_a_dropped_system_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"messages\[0\].content: .*drops or rewrites the system text"):
        render(talk(("a", "b"), system="be brief"), tokenizer=chatml(ct.DROPS_SYSTEM))


def test_parts_that_are_all_text_are_text() -> None:
    parts = [{"type": "text", "text": "一"}, {"type": "text", "text": "二"}]
    conversation = Conversation([Message("user", parts), Message("assistant", "b")])
    assert "user\n一二<|im_end|>" in render(conversation, tokenizer=chatml(ct.CHATML_DEFAULT_SYSTEM))[0].text


def test_an_image_for_a_text_template_is_refused() -> None:
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]
    conversation = Conversation([Message("user", parts), Message("assistant", "b")])
    with pytest.raises(DataError, match="refuses this conversation"):
        render(conversation, tokenizer=chatml(ct.CHATML_DEFAULT_SYSTEM))
    printing = ct.NO_STOP.replace("m['role'] + ': ' + m['content'] + '\\n'", "m['role'] ~ ': ' ~ m['content'] ~ '\\n'")
    with pytest.raises(DataError, match="knows only text"):
        render(conversation, tokenizer=chatml(printing))


def test_no_chat_template_is_said() -> None:
    with pytest.raises(UsageError, match="has no chat template"):
        render(TALKS[0], tokenizer=chatml(""))


def test_smollm2s_own_tokenizer() -> None:
    from minituner.model.loading import load_tokenizer
    from minituner.model.sources import fetch

    tokenizer = load_tokenizer(fetch("smollm2-135m-instruct"))
    for conversation in [*TALKS, talk(("1 + 1 = ?", "2，两。"), system="答得短。")]:
        document = encode_many([conversation], tokenizer)[0]
        assert tokenizer.decode(document.input_ids) == tokenizer.apply_chat_template(
            conversation.to_dicts(), tokenize=False
        )
        trained = tokenizer.decode(document.input_ids[document.trained])
        assert trained == "".join(a + "<|im_end|>" for a in answers(conversation))
        start = encode_prompt(Conversation(conversation.messages[:-1]), tokenizer)
        assert document.input_ids[: len(start)].tolist() == start
