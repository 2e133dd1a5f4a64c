"""The native template: the tokenizer's own chat template, with assistant spans found by rendering it step by step.

A chat template is a program that prints a whole conversation; it does not say which characters the model must produce.
So it is rendered twice around every answer. What the second text adds to the first is the answer:

    before  = render(messages[:i], add_generation_prompt=True)   ...<|im_start|>assistant\\n
    after   = render(messages[:i + 1])                           ...<|im_start|>assistant\\nHello!<|im_end|>\\n
    answer  = after - before                                     Hello!<|im_end|>\\n

Everything the generation prompt supplies (thinking boilerplate too) is prompt and is never trained. The answer is
trained up to its last control token, the stop token; a template that prints none gets the tokenizer's end token.
Where a template carries `{% generation %}` marks, they must name the same span. A template for which `before` is not
the beginning of `after` cannot be masked safely and is refused, with the first differing text. So is one that drops
something a message says: a system text, a tool call, an image. Lesson: notebook 02.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from minituner.data.control_tokens import TokenizerFacts
from minituner.data.conversation import Conversation, Message
from minituner.data.templates import Segment
from minituner.errors import DataError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
END_OF_THINKING = "</think>"


def render_native(
    conversation: Conversation, facts: TokenizerFacts, trained: list[bool], add_generation_prompt: bool = False
) -> list[Segment]:
    """Segments of the tokenizer's own chat template; see the module's drawing.

    Raises:
        DataError: the template refuses the conversation, drops a part of it, or cannot be masked safely.
        UsageError: the tokenizer has no chat template.
    """
    messages, tools = [_plain(message) for message in conversation.messages], conversation.tools
    whole = _text(facts, messages, tools, add_generation_prompt)
    _check_nothing_lost(conversation.messages, messages, whole)
    segments: list[Segment] = []
    done, unplaced = 0, 0
    for i, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        before = _text(facts, messages[:i], tools, True)
        is_last = i == len(messages) - 1 and not add_generation_prompt
        after = whole if is_last else _text(facts, messages[: i + 1], tools, False)
        span = _span(whole, before, after, message.text) if whole.startswith(before) else None
        if span is None:
            if trained[i] and not whole.startswith(before):
                raise _unsafe(i, before, whole, "the prompt before it is rendered differently once it is answered")
            if trained[i]:
                raise _unsafe(i, after, whole, "it is rendered differently once the conversation goes on")
            unplaced += 1
            continue
        _check_calls(message, i, span)
        answer, stop = _up_to_stop(span, facts.pattern)
        if len(before) > done:
            segments.append(Segment(whole[done : len(before)], False))
        segments.append(Segment(answer, trained[i], "answer"))
        if not stop:
            segments.append(Segment("", trained[i], "eos"))
        done = len(before) + len(answer)
    if done < len(whole):
        segments.append(Segment(whole[done:], False))
    if GENERATION_MARK.search(facts.chat_template(tools)[0]):
        marks = _marks(facts, messages, tools, add_generation_prompt)
        _check_marks(marks, segments, facts.pattern, unplaced)
    return segments


def _plain(message: Message) -> dict[str, Any]:
    """The message for a template; parts that are all text become one text, which every template knows."""
    values = message.to_dict()
    if isinstance(message.content, list) and all(part.get("type", "text") == "text" for part in message.content):
        values["content"] = message.text
    return values


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


def _up_to_stop(span: str, controls: re.Pattern[str]) -> tuple[str, bool]:
    """Cut `span` after the control token that ends it; False if none does (then it is cut after its content)."""
    matches = list(controls.finditer(span))
    if matches and not span[matches[-1].end() :].strip():
        return span[: matches[-1].end()], True
    return span.rstrip("\n"), False


def _text(facts: TokenizerFacts, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    source, special = facts.chat_template(tools)
    try:
        rendered, _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            **special,
        )
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"the model's chat template refuses this conversation: {error}",
            why=f"roles: {', '.join(message['role'] for message in messages) or 'none'}",
            fix="change the record, or choose a named template (minituner list-templates)",
        ) from None
    return rendered[0]


def _check_nothing_lost(messages: list[Message], plain: list[dict[str, Any]], whole: str) -> None:
    """Refuse a template that silently drops a text or prints a list of parts as program text.

    Tool results may be printed as JSON, and thinking that ends with `</think>` is left out of earlier answers on
    purpose; both are passed over.
    """
    for i, (message, values) in enumerate(zip(messages, plain, strict=True)):
        content = values["content"]
        if isinstance(content, list) and str(content) in whole:
            raise DataError(
                f"messages[{i}].content: the model's chat template knows only text, and this is a list of parts",
                fix="use a model whose chat template knows images, or leave the images out",
            )
        if message.role == "tool":
            continue
        for text in _texts(content):
            if (kept := text.rpartition(END_OF_THINKING)[2].strip()) not in whole:
                raise DataError(
                    f"messages[{i}].content: the model's chat template drops or rewrites the {message.role} text",
                    why=f"{kept[:80]!r} is not in what it prints",
                    fix="change the record, or choose a named template (minituner list-templates)",
                )


def _texts(content: Any) -> Iterator[str]:
    """The texts of a message's content."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        yield from (part["text"] for part in content if part.get("type", "text") == "text" and "text" in part)


def _check_calls(message: Message, i: int, span: str) -> None:
    """Refuse a template that silently drops tool calls (many know nothing about them)."""
    for call in message.tool_calls or ():
        name = (call.get("function") or call).get("name", "")
        if name not in span:
            raise DataError(
                f"messages[{i}].tool_calls: the model's chat template drops the call of {name!r}",
                fix="use a model whose chat template knows tools, or write the call into the content",
            )


def _marks(
    facts: TokenizerFacts, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool
) -> list[tuple[int, int]]:
    """The template's own generation marks, as character positions."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source, special = facts.chat_template(tools)
    _, marks = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=source,
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **special,
    )
    return list(marks[0])


def _check_marks(
    marks: list[tuple[int, int]], segments: list[Segment], controls: re.Pattern[str], unplaced: int
) -> None:
    """Compare the template's generation marks with the answers found by rendering: they must name the same texts.

    Marks may begin with what the generation prompt supplies (that is never trained), and may leave out the stop token
    or take in the line break after it. An answer may have several marks, as thinking and content.
    """
    whole = "".join(segment.text for segment in segments)
    spans, at = [], 0
    for segment in segments:
        if segment.kind == "answer":
            spans.append((at, at + len(segment.text), segment.trained))
        at += len(segment.text)

    def bare(text: str) -> str:
        return controls.sub("", text).strip()

    stray = [mark for mark in marks if whole[slice(*mark)].strip()]
    for number, (start, end, trained) in enumerate(spans):
        inside = [mark for mark in stray if max(start, mark[0]) < min(end, mark[1])]
        stray = [mark for mark in stray if mark not in inside]
        ours, theirs = bare(whole[start:end]), bare("".join(whole[slice(*mark)] for mark in inside))
        early = bool(inside) and inside[0][0] < start
        if trained and ours != theirs and not (early and theirs.endswith(ours)):
            raise _disagreement(number, theirs, ours)
    if stray and not unplaced:
        raise _disagreement(len(spans), whole[slice(*stray[0])], "")


def _disagreement(number: int, marked: str, rendered: str) -> DataError:
    return DataError(
        f"the chat template's generation marks and its rendering disagree on answer {number}",
        why=f"marked {marked[:80]!r}, rendered {rendered[:80]!r}",
        fix="choose a named template, or correct the model's chat template",
    )


def _unsafe(i: int, first: str, second: str, why: str) -> DataError:
    at = next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return DataError(
        f"messages[{i}]: the model's chat template cannot be masked safely: {why}",
        why=f"first difference at character {at}: {first[at : at + 40]!r} became {second[at : at + 40]!r}",
        fix="train only the last answer (data.loss_on=last_assistant), or choose a named template",
    )
