"""The native template: the tokenizer's own chat template, with assistant spans found by rendering it step by step.

A chat template is a program that prints a whole conversation; it does not say which characters the model must produce.
So it is rendered twice around every answer. What the second text adds to the first is the answer:

    before  = render(messages[:i], add_generation_prompt=True)   ...<|im_start|>assistant\\n
    after   = render(messages[:i + 1])                           ...<|im_start|>assistant\\nHello!<|im_end|>\\n
    answer  = after - before                                     Hello!<|im_end|>\\n

Everything the generation prompt supplies (thinking boilerplate too) is prompt and is never trained. The answer is
trained up to its last control token, the stop token; a template that prints none gets the tokenizer's end token.
Where a template carries `{% generation %}` marks, they must name the same span. A template for which `before` is not
the beginning of `after` cannot be masked safely and is refused, with the first differing text. Lesson: notebook 02.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from minituner.data.conversation import Conversation
from minituner.data.templates import Segment
from minituner.errors import DataError, UsageError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render_native(
    conversation: Conversation, tokenizer: Any, trained: list[bool], add_generation_prompt: bool = False
) -> list[Segment]:
    """Segments of the tokenizer's own chat template; see the module's drawing.

    Raises:
        DataError: the template refuses the conversation, drops a part of it, or cannot be masked safely.
        UsageError: the tokenizer has no chat template.
    """
    messages, tools = conversation.to_dicts(), conversation.tools
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    whole = _text(tokenizer, messages, tools, add_generation_prompt)
    segments: list[Segment] = []
    done = 0
    for i in answers:
        before = _text(tokenizer, messages[:i], tools, True)
        is_last = i == len(messages) - 1 and not add_generation_prompt
        after = whole if is_last else _text(tokenizer, messages[: i + 1], tools, False)
        if not whole.startswith(before):
            if trained[i]:
                raise _unsafe(i, before, whole, "the prompt before it is rendered differently once it is answered")
            continue
        span = _span(whole, before, after, conversation.messages[i].text)
        if span is None:
            if trained[i]:
                raise _unsafe(i, after, whole, "it is rendered differently once the conversation goes on")
            continue
        _check_nothing_lost(conversation, i, span)
        answer, stop = _up_to_stop(span, tokenizer)
        if len(before) > done:
            segments.append(Segment(whole[done : len(before)], False))
        segments.append(Segment(answer, trained[i], "answer"))
        if not stop:
            segments.append(Segment("", trained[i], "eos"))
        done = len(before) + len(answer)
    if done < len(whole):
        segments.append(Segment(whole[done:], False))
    if GENERATION_MARK.search(_template(tokenizer, tools)):
        _check_marks(tokenizer, messages, tools, segments, add_generation_prompt)
    return segments


def _span(whole: str, before: str, after: str, content: str) -> str | None:
    """The text of an answer inside `whole`, or None if it cannot be told.

    Some templates print less for an earlier answer than for the last one (Qwen3 drops its empty thinking block). The
    answer is then its content with what follows it in `after`, if exactly that stands in `whole`.
    """
    if after.startswith(before) and whole.startswith(after):
        return after[len(before) :]
    rest, stripped = whole[len(before) :], content.strip()
    if not stripped or not after.startswith(before) or stripped not in after[len(before) :]:
        return None
    tail = after[after.rindex(stripped) + len(stripped) :]
    return stripped + tail if rest.startswith(stripped + tail) else None


def _up_to_stop(span: str, tokenizer: Any) -> tuple[str, bool]:
    """Cut `span` after its last control token; False if it has none (then it is cut after its content)."""
    matches = list(control_pattern(tokenizer).finditer(span))
    if matches:
        return span[: matches[-1].end()], True
    return span.rstrip("\n"), False


def control_strings(tokenizer: Any) -> tuple[str, ...]:
    """Texts that this tokenizer turns into control tokens, longest first; empty for one that never does."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    texts = {str(token.content) for token in added.values() if token.special}
    texts.update(str(text) for text in getattr(tokenizer, "all_special_tokens", None) or ())
    return tuple(sorted(texts, key=lambda text: (-len(text), text)))


def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """A pattern that matches any control token's text (never, if there are none)."""
    return _pattern(control_strings(tokenizer))


@lru_cache(maxsize=64)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")


def _template(tokenizer: Any, tools: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "this tokenizer has no chat template, so template: native cannot be used",
            why="base models usually come without one",
            fix="choose a named template, e.g. data.template=default",
            next_command="minituner list-templates",
        )
    return tokenizer.get_chat_template(tools=tools)


def _text(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = _template(tokenizer, tools)
    try:
        rendered, _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"the model's chat template refuses this conversation: {error}",
            why=f"roles: {', '.join(message['role'] for message in messages) or 'none'}",
            fix="change the record, or choose a named template (minituner list-templates)",
        ) from None
    return rendered[0]


def _check_nothing_lost(conversation: Conversation, i: int, span: str) -> None:
    """Refuse a template that silently drops tool calls (many know nothing about them)."""
    for call in conversation.messages[i].tool_calls or ():
        name = (call.get("function") or call).get("name", "")
        if name not in span:
            raise DataError(
                f"messages[{i}].tool_calls: the model's chat template drops the call of {name!r}",
                fix="use a model whose chat template knows tools, or write the call into the content",
            )


def _check_marks(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any, segments: list[Segment], add_generation_prompt: bool
) -> None:
    """Compare with the template's own generation marks: they must name the same answers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _, marks = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=_template(tokenizer, tools),
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    spans, at = [], 0
    for segment in segments:
        if segment.kind == "answer":
            spans.append((at, at + len(segment.text)))
        at += len(segment.text)
    whole = "".join(segment.text for segment in segments)
    for number, mark in enumerate(marks[0]):
        # A mark may begin with what the generation prompt supplies (that is never trained), and may leave out the stop
        # token or take in the line break after it; its content must be inside the answer found by rendering.
        inside = [s for s in spans if max(s[0], mark[0]) < min(s[1], mark[1])]
        core = whole[mark[0] : mark[1]].strip()
        if core and not (inside and _same_answer(whole, inside[0], mark, tokenizer)):
            raise DataError(
                f"the chat template's generation marks and its rendering disagree on answer {number}",
                why=f"marked {core[:80]!r}, rendered {whole[slice(*(inside or spans or [(0, 0)])[0])][:80]!r}",
                fix="choose a named template, or correct the model's chat template",
            )


def _same_answer(whole: str, span: tuple[int, int], mark: tuple[int, int], tokenizer: Any) -> bool:
    def bare(text: str) -> str:
        return control_pattern(tokenizer).sub("", text).strip()

    ours, theirs = bare(whole[slice(*span)]), bare(whole[mark[0] : mark[1]])
    return ours == theirs or (mark[0] < span[0] and theirs.endswith(ours))


def _unsafe(i: int, first: str, second: str, why: str) -> DataError:
    at = next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return DataError(
        f"messages[{i}]: the model's chat template cannot be masked safely: {why}",
        why=f"first difference at character {at}: {first[at : at + 40]!r} became {second[at : at + 40]!r}",
        fix="train only the last answer (data.loss_on=last_assistant), or choose a named template",
    )
