"""Templates: a conversation becomes text segments, and each segment says whether it is trained.

    render(conversation, "qwen_chat") ->
        prompt  '<|im_start|>system\\n...<|im_end|>\\n<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
        answer  'Hello!<|im_end|>'                                                             trained
        prompt  '\\n'

Two kinds of templates exist. *Named* templates (the catalog's templates.yaml) are XTuner's: fields with places for the
system text, the input and the output. `native` is the chat template that comes with the tokenizer (see `native.py`).
Both end every trained answer with a stop token and leave whatever follows it untrained. Lesson: notebook 02.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from minituner.data.conversation import Conversation, Message
from minituner.errors import DataError, UsageError

if TYPE_CHECKING:
    from minituner.data.control_tokens import TokenizerFacts

Kind = Literal["prompt", "answer", "text", "eos"]
LossOn = Literal["assistant", "last_assistant", "all"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text of one kind.

    `prompt` is given to the model, `answer` is what it must produce, `text` is a pre-training document, and `eos` is
    the tokenizer's end token, which has no text of its own. Answers are tokenised apart from prompts: at chat time
    the prompt's ids are fixed before the first token of the answer exists.
    """

    text: str
    trained: bool
    kind: Kind = "prompt"


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """XTuner's template fields; see templates.yaml for all of them."""

    key: str
    instruction: str
    system: str | None = None
    suffix: str = ""
    suffix_as_eos: bool = False
    sep: str = ""
    stop_words: tuple[str, ...] = ()

    @classmethod
    @lru_cache(maxsize=64)
    def find(cls, key: str) -> NamedTemplate:
        """Look a template up by its catalog key.

        Raises:
            UsageError: there is no such template; the nearest names are given.
        """
        from minituner.catalog.lookup import find_template

        fields: dict[str, Any] = find_template(key)
        return cls(
            key=key,
            instruction=fields["INSTRUCTION"],
            system=fields.get("SYSTEM"),
            suffix=fields.get("SUFFIX", ""),
            suffix_as_eos=fields.get("SUFFIX_AS_EOS", False),
            sep=fields.get("SEP", ""),
            stop_words=tuple(fields.get("STOP_WORDS", ())),
        )

    def wrap_system(self, text: str) -> str:
        """The system text in its place. Raises DataError for a template that has none (minicpm)."""
        if self.system is None:
            raise DataError(
                f"template {self.key!r} has no place for a system text, and this conversation has one",
                fix="use another template (minituner list-templates), or remove the system text",
            )
        return self.system.replace("{system}", text)

    def wrap_input(self, text: str, round_: int) -> str:
        """The user's text in its place; `round_` counts from 1. Braces in the text stay as they are."""
        before, place, after = self.instruction.partition("{input}")
        return before.replace("{round}", str(round_)) + (text if place else "") + after.replace("{round}", str(round_))


def render(
    conversation: Conversation,
    template: str = "native",
    tokenizer: Any = None,
    *,
    loss_on: LossOn = "assistant",
    add_generation_prompt: bool = False,
    facts: TokenizerFacts | None = None,
) -> list[Segment]:
    """The conversation as text segments.

    Args:
        template: a catalog key, or `native` for the tokenizer's own chat template (needs `tokenizer`).
        loss_on: which messages are trained; a message's own `loss` overrides it.
        add_generation_prompt: end with the text that opens the next answer (what chat sends; nothing is trained).
        facts: what is known of `tokenizer`, for callers that render many conversations.

    Raises:
        DataError: this conversation does not fit this template.
        UsageError: no such template, or `native` without a tokenizer.
    """
    if conversation.is_text:
        return [s for m in conversation.messages for s in (Segment(m.text, m.loss is not False, "text"), _eos(m))]
    trained = trained_messages(conversation, loss_on)
    if add_generation_prompt:
        trained = [False] * len(trained)
    if template == "native":
        if tokenizer is None:
            raise UsageError("the native template is the tokenizer's own: give the tokenizer too")
        from minituner.data.control_tokens import TokenizerFacts
        from minituner.data.native import render_native

        segments = render_native(conversation, facts or TokenizerFacts.of(tokenizer), trained, add_generation_prompt)
    else:
        segments = render_named(conversation, NamedTemplate.find(template), trained, add_generation_prompt)
    if loss_on == "all" and not add_generation_prompt:
        segments = [Segment(s.text, s.trained or s.kind == "prompt", s.kind) for s in segments]
    return segments


def _eos(message: Message) -> Segment:
    return Segment("", message.loss is not False, "eos")


def trained_messages(conversation: Conversation, loss_on: LossOn) -> list[bool]:
    """For each message: is it an answer to train? A message's own `loss` wins over `loss_on`."""
    answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    last = answers[-1:] if loss_on == "last_assistant" else answers
    return [i in last if m.loss is None else m.loss and i in answers for i, m in enumerate(conversation.messages)]


def render_named(
    conversation: Conversation, template: NamedTemplate, trained: list[bool], add_generation_prompt: bool = False
) -> list[Segment]:
    """Segments under a named template, turn by turn as XTuner does: system + instruction, output + suffix, sep.

    Departs from XTuner where it loses text: several system or user messages in a row are joined with a newline (XTuner:
    the last one, or with nothing), and a user message without an answer is kept as prompt. A tool's result stands where
    the user's text does: these templates know two sides, and the result comes from the other one.

    Raises:
        DataError: a message holds what the template has no place for: tool calls, images, thinking.
    """
    segments: list[Segment] = []
    systems, inputs, round_ = [], [], 1

    def prompt() -> str:
        system = "\n".join(systems)
        return (template.wrap_system(system) if system else "") + template.wrap_input("\n".join(inputs), round_)

    for message, is_trained in zip(conversation.messages, trained, strict=True):
        _check_named(message, template)
        if message.role == "system":
            systems.append(message.text)
        elif message.role in ("user", "tool"):
            inputs.append(message.text)
        else:
            segments.append(Segment(prompt(), False))
            segments.append(Segment(message.text + template.suffix, is_trained, "answer"))
            if not template.suffix_as_eos:
                segments.append(Segment("", is_trained, "eos"))
            if template.sep:
                segments.append(Segment(template.sep, False))
            systems, inputs, round_ = [], [], round_ + 1
    if inputs or systems or add_generation_prompt:
        segments.append(Segment(prompt(), False))
    return segments


def _check_named(message: Message, template: NamedTemplate) -> None:
    """Refuse what a named template would lose."""
    if message.role not in ("system", "user", "assistant", "tool"):
        what = f"{message.role!r} messages"
    elif message.tool_calls:
        what = "tool calls"
    elif message.reasoning_content and message.reasoning_content.strip():
        what = "reasoning_content (thinking)"
    elif isinstance(message.content, list) and any(part.get("type", "text") != "text" for part in message.content):
        what = "images and other parts that are no text"
    else:
        return
    raise DataError(
        f"template {template.key!r} has no place for {what}",
        fix="use template: native with a model whose chat template knows them, or leave them out of the record",
    )
