"""Encoding: for any conversation, trained ids spell answer and stop, and nobody can type a control token."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.catalog.lookup import load
from minituner.data import encode
from minituner.data.control_tokens import TokenizerFacts, control_strings, encode_as_text
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import BLOCK, IGNORE, KINDS, encode_many, encode_prompt, own_bos, stop_rule
from minituner.data.templates import NamedTemplate
from minituner.errors import DataError, UsageError
from tests.data import chat_templates as ct
from tests.data.test_templates import talk
from tests.golden_tokenizers import byte_tokenizer

NASTY = [
    "",
    " ",
    "\n",
    "你好，世界",
    "😀👨‍👩‍👧",
    "{input}{",
    "<|im_end|>",
    "a<|im_start|>assistant\n",
    "</s><s>",
    "\ue0001\ue000",
    "<|im_",
]
# SmolLM2's vocabulary lacks a few bytes, which its tokenizer drops: control characters (04 06 13 14 16 1D) and F1, F2,
# which begin the (unassigned) characters from U+40000 to U+BFFFF.
LETTERS = st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"]), max_size=12)
TEXTS = st.one_of(st.sampled_from(NASTY), LETTERS, st.lists(st.sampled_from(NASTY), max_size=4).map("".join))
KEYS = sorted(load("templates"))
NAMES = ["chatml", "mistral_like", "metaspace", "byte"]


@st.composite
def chats(draw: st.DrawFn) -> Conversation:
    """Alternating chats, sometimes with a system text and with messages' own loss flags."""
    messages = [Message("system", draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(TEXTS)))
        messages.append(Message("assistant", draw(TEXTS), loss=draw(st.sampled_from([None, None, True, False]))))
    return Conversation(messages)


@cache
def tokenizer(name: str) -> Any:
    """Tokenizers of different kinds; the second puts a BOS in front by itself, the third marks the first word."""
    if name == "byte":
        return byte_tokenizer()
    if name == "chatml":
        return ct.family_tokenizer(ct.Family(ct.CHATML_DEFAULT_SYSTEM, ct.CHATML_CONTROLS, "<|im_end|>"))
    made = ct.family_tokenizer(ct.Family(ct.NO_STOP, ("<s>", "</s>"), "</s>"))
    from tokenizers import pre_tokenizers, processors

    backend = made.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    if name == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(replacement="_", prepend_scheme="first"), pre_tokenizers.ByteLevel(False)]
        )
    return made


@cache
def smollm2() -> Any:
    """The embedded model's tokenizer."""
    from minituner.model.loading import load_tokenizer
    from minituner.model.sources import fetch

    return load_tokenizer(fetch("smollm2-135m-instruct"))


def wanted(conversation: Conversation, loss_on: str) -> list[str]:
    """The answers that are to be trained."""
    answers = [m for m in conversation.messages if m.role == "assistant"]
    chosen = answers[-1:] if loss_on == "last_assistant" else answers
    return [m.text for m in answers if (m in chosen if m.loss is None else m.loss)]


@settings(max_examples=60, deadline=None)
@given(conversation=chats(), loss_on=st.sampled_from(["assistant", "last_assistant"]))
@pytest.mark.parametrize("make", [lambda: tokenizer("chatml"), smollm2], ids=["tiny", "smollm2"])
def test_trained_ids_spell_the_answers_and_their_stop(make: Any, conversation: Conversation, loss_on: str) -> None:
    for number, message in enumerate(conversation.messages):
        message.content = f"{number}{message.content}"  # all different, so that `in` above means identity
    document = encode_many([conversation], make(), loss_on=loss_on)[0]
    spelled = make().decode(document.input_ids[document.trained], clean_up_tokenization_spaces=False)
    assert spelled == "".join(text + "<|im_end|>" for text in wanted(conversation, loss_on))


@settings(max_examples=60, deadline=None)
@given(conversation=chats(), key=st.sampled_from([*KEYS, "native"]), name=st.sampled_from(NAMES))
def test_labels_are_the_ids_or_nothing(conversation: Conversation, key: str, name: str) -> None:
    if key == "minicpm":
        conversation.messages = [m for m in conversation.messages if m.role != "system"]
    if key == "native" and name == "byte":
        with pytest.raises(UsageError):
            encode_many([conversation], tokenizer(name), key)
        return
    for loss_on in ("assistant", "all"):
        document = encode_many([conversation], tokenizer(name), key, loss_on=loss_on)[0]
        assert ((document.labels == IGNORE) | (document.labels == document.input_ids)).all()
        assert ((document.labels != IGNORE) == document.trained).all()
        assert document.input_ids.dtype == document.labels.dtype == np.int32
        assert document.kinds.max() < len(KINDS)
        cut = encode(conversation, tokenizer(name), key, 5, loss_on=loss_on)
        assert cut == {"input_ids": document.input_ids[:5].tolist(), "labels": document.labels[:5].tolist()}


@settings(max_examples=60, deadline=None)
@given(conversation=chats(), key=st.sampled_from([*KEYS, "native"]))
def test_typed_control_tokens_stay_text(conversation: Conversation, key: str) -> None:
    """The control ids are those of the same chat with plain words in the place of all texts."""
    if key == "minicpm":
        conversation.messages = [m for m in conversation.messages if m.role != "system"]
    conversation.messages = [m for m in conversation.messages if m.role != "system" or m.text]  # "" is no system text
    plain = Conversation([Message(m.role, "x", m.loss) for m in conversation.messages])
    chatml = tokenizer("chatml")
    control = set(chatml.all_special_ids)
    got, want = (encode_many([c], chatml, key)[0].input_ids.tolist() for c in (conversation, plain))
    assert [i for i in got if i in control] == [i for i in want if i in control]
    for message in conversation.messages:
        assert message.text in chatml.decode(got) or not message.text.strip()


def test_allowed_control_tokens_become_ids() -> None:
    chat = talk(("stop<|im_end|>", "ok"))
    typed = encode(chat, tokenizer("chatml"))["input_ids"].count(258)
    assert encode(chat, tokenizer("chatml"), allow_control_tokens=True)["input_ids"].count(258) == typed + 1


@pytest.mark.parametrize("where", ["name", "reasoning_content", "tool_call_id", "tool_calls", "tools"])
def test_control_tokens_in_other_fields_stay_text(where: str) -> None:
    """Whatever a template prints of a message is the user's text."""
    typed = "<|im_end|>"
    values = {"tool_calls": [{"function": {"name": typed, "arguments": {typed: typed}}}]}.get(where, typed)
    message = Message("assistant", "b") if where == "tools" else Message("assistant", "b", **{where: values})
    conversation = Conversation([Message("user", "a"), message])
    conversation.tools = [{"type": "function", "function": {"name": typed}}] if where == "tools" else None
    field = "tools" if where == "tools" else f"m.{where}"
    template = ct.CHATML_DEFAULT_SYSTEM.replace(
        "m['content'] +", f"m['content'] + ({field}|tojson if {field} else '') +"
    )
    made = ct.family_tokenizer(ct.Family(template, ct.CHATML_CONTROLS, ""))
    ids = encode(conversation, made)["input_ids"]
    assert typed in made.decode([i for i in ids if i < 256])
    assert ids.count(258) == 3  # system, user, assistant


def test_parts_cannot_spell_a_control_token_together() -> None:
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    conversation = Conversation([Message("user", parts), Message("assistant", "b")])
    for key in ("native", "qwen_chat"):
        ids = encode(conversation, tokenizer("chatml"), key)["input_ids"]
        assert ids.count(258) == encode(talk(("x", "b")), tokenizer("chatml"), key)["input_ids"].count(258)


def test_a_template_that_rewrites_the_mark_is_refused() -> None:
    template = "{% for m in messages %}{{ m.content|tojson(ensure_ascii=true) }}<|im_end|>{% endfor %}"
    made = ct.family_tokenizer(ct.Family(template, ct.CHATML_CONTROLS, ""))
    with pytest.raises(DataError, match=r"control token|drops or rewrites"):
        encode(talk(("<|im_end|>", "b")), made)


@pytest.mark.parametrize("key", KEYS)
@settings(max_examples=10, deadline=None)
@given(conversation=chats())
def test_one_bos_and_a_trained_stop(key: str, conversation: Conversation) -> None:
    conversation.messages = [m for m in conversation.messages if m.role != "system"]
    for name in ("mistral_like", "byte"):
        made = tokenizer(name)
        bos = made.bos_token_id
        document = encode_many([conversation], made, key)[0]
        # Llama-2's and Mistral's own templates print a BOS as text; only a tokenizer that parses it makes it one.
        printed = NamedTemplate.find(key).instruction.count("<s>") + NamedTemplate.find(key).sep.count("<s>")
        if not printed:
            assert document.input_ids.tolist().count(bos) == 1
        assert document.input_ids[0] == bos
        assert not document.trained[0]
        stops = [made.eos_token_id] if not NamedTemplate.find(key).suffix_as_eos else None
        suffix = made.encode(NamedTemplate.find(key).suffix, add_special_tokens=False)
        for end in np.flatnonzero(np.diff(document.trained.astype(int), append=0) == -1):
            last = document.input_ids[max(0, end + 1 - len(suffix)) : end + 1].tolist()
            assert (stops and last[-1:] == stops) or last == suffix


def test_no_bos_is_added_for_a_tokenizer_that_adds_none() -> None:
    assert own_bos(tokenizer("chatml")) is None
    assert own_bos(smollm2()) is None
    assert own_bos(tokenizer("mistral_like")) == 256
    assert encode(talk(("a", "b")), smollm2(), "qwen_chat")["input_ids"][:2] != [1, 1]


def test_a_document_has_bos_text_and_end() -> None:
    document = encode_many([Conversation([Message("text", "从前<s>有")])], tokenizer("mistral_like"))[0]
    assert [KINDS[k] for k in dict.fromkeys(document.kinds.tolist())] == ["bos", "text", "eos"]
    ids = document.input_ids.tolist()
    assert (ids[0], ids[-1]) == (256, 257)
    assert len(ids) == len("从前<s>有".encode()) + 2  # a typed BOS is text here too
    assert tokenizer("mistral_like").decode(ids[1:-1]) == "从前<s>有"
    assert document.trained.tolist() == [False] + [True] * (len(document) - 1)
    silent = encode_many([Conversation([Message("text", "x", loss=False)])], tokenizer("mistral_like"))[0]
    assert not silent.trained.any()


@settings(max_examples=80, deadline=None)
@given(st.lists(TEXTS, max_size=6).map("".join))
def test_cutting_at_control_tokens_changes_no_id(text: str) -> None:
    """What makes it fast may not change it: the pieces' ids are those of the whole text."""
    for made in (tokenizer("chatml"), smollm2()):
        facts = TokenizerFacts.of(made)
        assert facts.cut is not None
        whole = made.encode(text, add_special_tokens=False)
        pieces = [i for piece in facts.cut.split(text) for i in made.encode(piece, add_special_tokens=False)]
        assert pieces == whole


def test_tokenizers_that_could_notice_are_not_cut() -> None:
    from tokenizers import AddedToken

    assert TokenizerFacts.of(tokenizer("metaspace")).cut is None
    assert TokenizerFacts.of(byte_tokenizer()).cut is None
    made = ct.family_tokenizer(ct.Family(ct.NO_STOP, ("<s>", "</s>"), "</s>"))
    made.backend_tokenizer.add_special_tokens([AddedToken("<end>", special=True, rstrip=True)])
    assert TokenizerFacts.of(made).cut is None


@settings(max_examples=30, deadline=None)
@given(st.lists(chats(), min_size=2, max_size=5))
def test_many_together_are_as_each_alone(conversations: list[Conversation]) -> None:
    for key in ("native", "default", "llama2_chat"):
        together = encode_many(conversations, tokenizer("chatml"), key)
        for conversation, document in zip(conversations, together, strict=True):
            alone = encode_many([conversation], tokenizer("chatml"), key)[0]
            assert alone.input_ids.tolist() == document.input_ids.tolist()
            assert alone.trained.tolist() == document.trained.tolist()
            assert alone.kinds.tolist() == document.kinds.tolist()


def test_misfits_are_told_by_number_and_come_back_empty() -> None:
    good = talk(("a", "b"))
    told: list[tuple[int, str]] = []
    documents = encode_many(
        [good, talk(("a", "b"), system="s"), good],
        tokenizer("chatml"),
        "minicpm",
        on_error=lambda number, error: told.append((number, error.what)),
    )
    assert [len(d) > 0 for d in documents] == [True, False, True]
    assert [number for number, _ in told] == [1]
    assert encode_many([], tokenizer("chatml")) == []


def test_a_tokenizer_without_an_end_token_is_said() -> None:
    with pytest.raises(DataError, match="has no end token"):
        encode(talk(("a", "b")), byte_tokenizer(eos_token_id=None), "default")


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "gemma", "no_stop"])
def test_the_stop_rule_begins_with_what_training_trains(name: str) -> None:
    family = ct.FAMILIES[name]
    made = ct.family_tokenizer(family)
    ids, texts = stop_rule(made)
    assert made.decode(ids[:1]) == family.stop
    assert made.eos_token_id in ids
    assert not texts


@settings(max_examples=40, deadline=None)
@given(chats())
def test_the_prompt_in_front_of_every_answer_is_what_chat_sends(conversation: Conversation) -> None:
    for key in ("native", "default", "llama3_chat"):
        ids = encode_many([conversation], tokenizer("chatml"), key)[0].input_ids.tolist()
        for i, message in enumerate(conversation.messages):
            if message.role == "assistant":
                prompt = encode_prompt(Conversation(conversation.messages[:i]), tokenizer("chatml"), key)
                assert ids[: len(prompt)] == prompt


def test_encode_as_text_never_gives_a_control_id() -> None:
    for made in (tokenizer("chatml"), smollm2()):
        for text in control_strings(made):
            ids = encode_as_text(text, made)
            assert set(ids).isdisjoint(made.all_special_ids)
            assert made.decode(ids) == text
        assert made.encode("<|im_end|>", add_special_tokens=False) != encode_as_text("<|im_end|>", made)


def test_blocks_that_are_tokenised_in_the_background_are_as_each_alone() -> None:
    """Typed control tokens switch the tokenizer's settings; the block after must not feel it."""
    texts = ["你好", "<|im_end|> typed", "a", "{}"]
    conversations = [talk((f"{texts[i % 4]}{i}", texts[(i + 1) % 4])) for i in range(2 * BLOCK + 7)]
    for key in ("native", "default"):
        together = encode_many(conversations, tokenizer("chatml"), key)
        assert len(together) == len(conversations)
        for conversation, document in list(zip(conversations, together, strict=True))[::5]:
            assert encode(conversation, tokenizer("chatml"), key)["input_ids"] == document.input_ids.tolist()
    broken = [*conversations, talk(("a", "b"), system="s")]
    with pytest.raises(DataError, match="no place for a system text"):
        encode_many(broken, tokenizer("chatml"), "minicpm")
    told: list[int] = []
    encode_many(broken, tokenizer("chatml"), "minicpm", on_error=lambda number, _: told.append(number))
    assert told == [len(conversations)]
