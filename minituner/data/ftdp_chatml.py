"""InternLM2's chatml with tools, as XTuner's ftdp tool tokenises it: six roles, name suffixes, action marks.

Why: corpora in the "processed" form (one message list a line) use roles that no chat template knows. `environment` is a
speaker of its own; `thought` and `tool` belong inside the assistant message before them (or open a new one):

    {"role": "assistant", "content": "let me look"}
    {"role": "tool", "name": "plugin", "content": "{...}"}
    {"role": "environment", "name": "plugin", "content": "25"}

    <|im_start|>assistant\\n let me look<|action_start|><|plugin|>\\n{...}<|action_end|>\\n <|im_end|>\\n
    \\______ masked _______/\\_____________________________ trained ________________________________/
    <|im_start|>environment name=<|plugin|>\\n25<|im_end|>\\n       all masked

`chatml_sample` gives input_ids and labels, which `write_tokenized` takes; `chatml_tokens` gives the signed ids of the
`.bin` format. `strict_xtuner=True` returns XTuner's tokens exactly. The default departs from it where it trains what it
should not: the end of a masked assistant message, the BOS, a second BOS, a folded message that says `loss: false`, text
that only looks like a control token, and content whose first or last character merges with the layout around it.
Lesson: notebook 03.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from minituner.data.tokenized import IGNORE_INDEX
from minituner.errors import DataError, UsageError, nearest

CHATML_TOKENS = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
SPEAKERS = ("system", "user", "assistant", "environment")
FOLDED = ("tool", "thought")
END = "<|im_end|>\n"
NAMED_BY_TOKEN = ("interpreter", "plugin")
# Whether an assistant's message is trained, by its `type`: `prefix` continues an earlier training sample.
ASSISTANT_TYPES = {"current": True, "icl": True, "prefix": False}
OTHER_TYPES = ("current", "icl", "prefix")


class TextTokenizer(Protocol):
    """What is needed of a tokenizer; every Hugging Face tokenizer has it."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""


@dataclass(slots=True)
class _Block:
    """One speaker's message with everything folded into it."""

    role: str
    begin: str
    content: str
    trained: bool
    flags: tuple[Any, Any]  # loss and type as given


def add_chatml_tokens(tokenizer: Any) -> dict[str, int]:
    """Add those of the six control tokens that a Hugging Face tokenizer lacks; returns the id of each.

    The model's embedding must grow to `len(tokenizer)` rows before training.
    """
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in CHATML_TOKENS if token not in known], special_tokens=True)
    return {token: tokenizer.convert_tokens_to_ids(token) for token in CHATML_TOKENS}


def chatml_sample(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: TextTokenizer,
    max_length: int | None = 32768,
    strict_xtuner: bool = False,
    allow_control_tokens: bool = False,
) -> dict[str, list[int]]:
    """One message list as `{"input_ids": (n,), "labels": (n,)}`, labels -100 where masked, n at most max_length.

    A message has role and content, and may have `name`, `type` (current, icl, prefix; meta for system) and `loss`
    (false masks it; null means unset, except for XTuner, which masks). Control-token text inside content or name is
    refused unless `allow_control_tokens`.

    Raises:
        DataError: a message cannot be used; the text names its position and field.
        UsageError: the tokenizer lacks the control tokens.
    """
    blocks = _blocks(messages, strict_xtuner, allow_control_tokens)
    if not blocks and not strict_xtuner:
        raise DataError("no messages", why="an empty record has nothing to train on", fix="remove the record")
    if not strict_xtuner and len(tokenizer.encode("<|im_end|>", add_special_tokens=False)) != 1:
        why = "<|im_end|> is not one token of it, so the model could never learn to stop"
        raise UsageError("tokenizer: lacks the chatml control tokens", why=why, fix="call add_chatml_tokens(tokenizer)")
    input_ids: list[int] = []
    labels: list[int] = []
    for block in blocks:
        begin, content, end = _encode(block, tokenizer, strict_xtuner)
        # XTuner's loss switch reaches only the content: the end of an assistant message is trained whatever it says.
        end_trained = block.role == "assistant" and (strict_xtuner or block.trained)
        input_ids += begin + content + end
        labels += [IGNORE_INDEX] * len(begin)
        labels += content if block.trained else [IGNORE_INDEX] * len(content)
        labels += end if end_trained else [IGNORE_INDEX] * len(end)
    bos = tokenizer.bos_token_id
    if bos is not None and (strict_xtuner or input_ids[:1] != [bos]):
        input_ids.insert(0, bos)
        labels.insert(0, bos if strict_xtuner else IGNORE_INDEX)
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}


def chatml_tokens(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: TextTokenizer,
    max_length: int | None = 32768,
    strict_xtuner: bool = False,
    allow_control_tokens: bool = False,
) -> list[int]:
    """The same as signed ids (n,): positive is trained, negative masked. Id 0 has no sign; see `write_tokenized`.

    Raises:
        DataError, UsageError: as `chatml_sample`.
    """
    sample = chatml_sample(messages, tokenizer, max_length, strict_xtuner, allow_control_tokens)
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    return [-token if label == IGNORE_INDEX else token for token, label in pairs]


def _blocks(messages: Sequence[Mapping[str, Any]], strict_xtuner: bool, allow_control_tokens: bool) -> list[_Block]:
    """The messages with `tool` and `thought` folded into the assistant message they belong to; none is changed."""
    blocks: list[_Block] = []
    for number, message in enumerate(messages):
        where = f"message {number}"
        _check(message, where, strict_xtuner or allow_control_tokens)
        role, content, flags = message["role"], message["content"], (message.get("loss"), message.get("type"))
        if role in SPEAKERS:
            trained = _trained(message, role, where, strict_xtuner)
            blocks.append(_Block(role, _begin(role, message.get("name")), content, trained, flags))
            continue
        if not blocks:
            why = f"a {role} belongs to the assistant message before it, and there is none"
            raise DataError(f"{where}: role: {role!r} comes first", why=why, fix="put the user's message before it")
        if role == "tool":
            content = _tool(message.get("name"), content, where, strict_xtuner)
        if blocks[-1].role == "assistant":
            if not strict_xtuner and flags != (None, None) and flags != blocks[-1].flags:
                why = "it is folded into the assistant message before it, and one message has one loss"
                fix = "give both the same loss and type"
                raise DataError(f"{where}: loss, type: {flags} differ from {blocks[-1].flags}", why=why, fix=fix)
            blocks[-1].content += content
        else:
            # XTuner forgets the loss and the type of a message that opens an assistant message, and trains it.
            trained = True if strict_xtuner else _trained(message, "assistant", where, strict_xtuner)
            blocks.append(_Block("assistant", _begin("assistant", None), content, trained, flags))
    return blocks


def _check(message: Mapping[str, Any], where: str, control_tokens_allowed: bool) -> None:
    """Refuse a message without a known role, with content that is not text, or with control tokens typed into it."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: {type(message).__name__} is not a message", fix='{"role": ..., "content": ...}')
    roles = (*SPEAKERS, *FOLDED)
    if (role := message.get("role")) not in roles:
        raise DataError(f"{where}: role: {role!r}", why=nearest(str(role), roles), fix=f"one of {', '.join(roles)}")
    if not isinstance(message.get("content"), str):
        raise DataError(f"{where}: content: {type(message.get('content')).__name__} is not text", fix="give a string")
    if not isinstance(message.get("name"), str | None):
        raise DataError(f"{where}: name: {message['name']!r} is not text", fix="give a string, or leave it out")
    if not isinstance(message.get("loss"), bool | None):
        raise DataError(f"{where}: loss: {message['loss']!r}", fix="true, false, or leave it out")
    if control_tokens_allowed:
        return
    for field in ("content", "name"):
        if found := next((token for token in CHATML_TOKENS if token in (message.get(field) or "")), None):
            why = "typed text would become a control token, and could end or open a message"
            fix = "remove it, or pass allow_control_tokens=True if the data means the token"
            raise DataError(f"{where}: {field}: contains {found}", why=why, fix=fix)


def _trained(message: Mapping[str, Any], role: str, where: str, strict_xtuner: bool) -> bool:
    """Whether the content of a speaker's message is trained."""
    kind = "current" if message.get("type") is None else message["type"]
    known = (*OTHER_TYPES, "meta") if role == "system" else OTHER_TYPES
    if kind not in known:
        raise DataError(f"{where}: type: {kind!r} is unknown for {role}", fix=f"one of {', '.join(known)}")
    if role != "assistant" or message.get("loss") is False:
        return False
    if strict_xtuner and message.get("loss", True) is None:
        return False
    return ASSISTANT_TYPES[kind]


def _begin(role: str, name: str | None) -> str:
    """The opening of a message; a plugin or interpreter is named by its control token."""
    if name is None:
        return f"<|im_start|>{role}\n"
    if name in NAMED_BY_TOKEN and role != "user":
        name = f"<|{name}|>"
    return f"<|im_start|>{role} name={name}\n"


def _tool(name: str | None, content: str, where: str, strict_xtuner: bool) -> str:
    """A tool call as text inside the assistant's message."""
    if name is None:
        if not strict_xtuner:
            why = "the call would be closed by <|action_end|> but never opened"
            raise DataError(f"{where}: name: missing", why=why, fix="name the tool, e.g. plugin or interpreter")
        return f"{content}<|action_end|>\n"
    mark = f"<|{name}|>" if name in NAMED_BY_TOKEN else name
    return f"<|action_start|>{mark}\n{content}<|action_end|>\n"


def _encode(block: _Block, tokenizer: TextTokenizer, strict_xtuner: bool) -> tuple[list[int], list[int], list[int]]:
    """Token ids of a block's beginning, content and end.

    The whole is encoded at once, so that a tokenizer which marks the start of a text marks it once, and the content is
    what lies between. Where content merges with its neighbours (a content that starts with a newline), XTuner cuts at
    the wrong token; then the content is encoded by itself, as a chat that continues the prompt would see it.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    begin, end, whole = encode(block.begin), encode(END), encode(block.begin + block.content + END)
    fits = len(begin) + len(end) <= len(whole) and whole[: len(begin)] == begin and whole[-len(end) :] == end
    content = whole[len(begin) : -len(end)] if fits or strict_xtuner else encode(block.content)
    return begin, content, end
