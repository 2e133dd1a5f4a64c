"""XTuner's encoding rules, kept for comparison and for runs that must match an old one (`bos_policy: xtuner`).

It differs from ours in three ways: BOS by tokenizer class name, again after every end token (so a ChatML model whose
BOS *is* `<|im_start|>` starts with two of them); every piece tokenised alone; control tokens in user text are parsed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from minituner.data.conversation import Conversation, to_turns
from minituner.data.templates import NamedTemplate
from minituner.errors import DataError, UsageError

# Class names for which XTuner uses no BOS. `Qwen2Tokenizer` is the name that transformers 5 gives to the class XTuner
# knew as Qwen2TokenizerFast, but XTuner's list misses it; that is its trap, and it is reproduced here.
NO_BOS = ("QWenTokenizer", "QWen2Tokenizer", "Qwen2TokenizerFast")


def bos_eos_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The BOS and EOS ids XTuner uses for this tokenizer. A missing one is an empty list (XTuner crashes there)."""
    name = type(tokenizer).__name__
    if name in NO_BOS:
        bos: Any = []
    elif name == "ChatGLMTokenizer":
        bos = [64790, 64792]
    else:
        bos = tokenizer.bos_token_id
    return _as_list(bos), _as_list(tokenizer.eos_token_id)


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def xtuner_pieces(
    conversation: Conversation, tokenizer: Any, template: str | None
) -> Iterator[tuple[str, bool, str, Sequence[int] | None]]:
    """(kind, trained, text, ids) for every piece, in order; `template` None leaves the turns as they are.

    Raises:
        DataError: the tokenizer lacks the end token an answer needs, or turns have no place for what a message holds.
        UsageError: the native template, which XTuner does not have.
    """
    if template == "native":
        raise UsageError(
            "bos_policy xtuner needs one of XTuner's named templates", next_command="minituner list-templates"
        )
    named = NamedTemplate.find(template) if template else None
    if any(message.tool_calls or message.reasoning_content for message in conversation.messages):
        raise DataError(
            "XTuner's turns have no place for tool calls and thinking",
            fix="data.bos_policy=once with template: native, or leave them out of the record",
        )
    bos, eos = bos_eos_ids(tokenizer)
    need_bos = True
    for round_, turn in enumerate(to_turns(conversation), start=1):
        text, answer = turn.get("input") or "", turn.get("output") or ""
        system, sep, need_eos = turn.get("system"), turn.get("sep") or "", turn.get("need_eos_token", True)
        if named:
            text = (named.wrap_system(system) if system else "") + named.wrap_input(text, round_)
            answer, sep, need_eos = answer + named.suffix, named.sep, not named.suffix_as_eos
        trained = bool(turn.get("output_with_loss", True))
        if need_eos and not eos:
            raise DataError(
                "the tokenizer has no end token (eos_token_id is None), so answers could never stop",
                fix="choose a template whose answers end with a suffix (list-templates), or set tokenizer.eos_token",
            )
        if need_bos:
            yield "bos", False, "", bos
        yield "prompt", False, text, None
        yield "answer", trained, answer, None
        if need_eos:
            yield "eos", trained, "", eos
        need_bos = bool(need_eos)
        if sep:
            yield "prompt", False, sep, None
