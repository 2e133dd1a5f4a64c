"""What `list-formats` and `list-templates` print, as lines of text.

    alpaca            instruction, output [input]            an instruction, perhaps with an input; ...
                      {"instruction": "Translate to French.", "input": "the sea", "output": "la mer"}
    qwen_chat         Qwen, Qwen1.5 and Qwen2 chat; ChatML with two stop words.
                      <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎«Hello!<|im_end|>»⏎

What stands between « and » is trained. Lessons: notebooks 01 and 02.
"""

from __future__ import annotations

import json

from minituner.catalog.lookup import load
from minituner.data.conversation import Conversation, Message
from minituner.data.formats import FORMATS
from minituner.data.templates import Segment, render
from minituner.data.token_view import visible

_INDENT = " " * 20


def format_lines() -> list[str]:
    """Every record layout: name, columns read ([optional]), what it is, and an example."""
    lines = []
    for entry in FORMATS.values():
        columns = ", ".join(entry.columns) + (f" [{', '.join(entry.optional)}]" if entry.optional else "")
        notes = [entry.description]
        if entry.aliases:
            notes.append(f"also called {', '.join(entry.aliases)}")
        if entry.system:
            notes.append(f"adds the system text {entry.system!r}")
        if entry.detected_as:
            notes.append(f"never recognised by itself: auto gives {entry.detected_as}")
        lines.append(f"{entry.name:<19} {columns}: {'; '.join(notes)}")
        lines.append(_INDENT + json.dumps(entry.example, ensure_ascii=False))
    return lines


def template_lines() -> list[str]:
    """Every prompt template: key, whom it fits, and one turn with the trained part between « and »."""
    lines = [
        f"{'native':<19} The chat template that comes with the tokenizer: what the model knows (the default).",
        f"{_INDENT}see it on your own records: minituner inspect FILE --model MODEL",
    ]
    example = Conversation([Message("user", "Hi"), Message("assistant", "Hello!")])
    for key, fields in load("templates").items():
        lines.append(f"{key:<19} {fields['for']}")
        lines.append(_INDENT + "".join(marked(segment) for segment in _merged(render(example, key))))
    return [*lines, "", "«...» is trained; <eos> is the tokenizer's own end token."]


def _merged(segments: list[Segment]) -> list[Segment]:
    """Neighbours that are both trained as one, so that the marks stand around the whole."""
    merged: list[Segment] = []
    for segment in segments:
        text = "<eos>" if segment.kind == "eos" else segment.text
        if merged and merged[-1].trained and segment.trained:
            text = merged.pop().text + text
        merged.append(Segment(text, segment.trained))
    return merged


def marked(segment: Segment) -> str:
    """The segment's text, between « and » when it is trained."""
    text = visible(segment.text)
    return f"«{text}»" if segment.trained else text
