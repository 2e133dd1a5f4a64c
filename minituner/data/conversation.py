"""A conversation: what every record layout becomes, and the only thing templates read.

    raw record --formats--> Conversation --templates--> text segments --encoding--> input_ids + labels

A conversation is a list of messages. Chat records have the roles system, user, assistant and tool; a pre-training
document is one message with the role `text`, which no template touches:

    Conversation([Message("user", "Hi"), Message("assistant", "Hello!")])
    Conversation([Message("text", "Once upon a time ...")])

`to_turns` and `from_turns` translate to and from XTuner's own layout, a list of turns with the keys `system`, `input`,
`output`, `output_with_loss`, `need_eos_token` and `sep`. Lesson: notebook 01.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minituner.errors import DataError

ROLES = ("system", "user", "assistant", "tool", "text")
TURN_KEYS = ("system", "input", "output", "output_with_loss", "need_eos_token", "sep")


@dataclass(slots=True)
class Message:
    """One message.

    `content` is text, or a list of parts (`{"type": "text", "text": ...}`; images are kept for later rooms). None is a
    null that `strict_xtuner` passes on, as XTuner does; the default never makes one.
    `loss` says whether an assistant message is trained; None leaves it to the recipe's `loss_on`.
    `ids` are a `text` message's tokens where the file has them already (`formats_tokenized.py`).
    `need_eos_token` and `sep` are XTuner's per-turn settings; None leaves them to the template.
    """

    role: str
    content: str | list[dict[str, Any]] | None = ""
    loss: bool | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    need_eos_token: bool | None = None
    sep: str | None = None
    ids: list[int] | None = None

    @property
    def text(self) -> str:
        """The content as text: the text parts joined, other parts left out."""
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            return ""
        return "".join(part.get("text", "") for part in self.content if part.get("type", "text") == "text")

    def to_dict(self) -> dict[str, Any]:
        """The message as chat templates expect it: only the keys that are set, without `loss`."""
        values: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("name", "reasoning_content", "tool_calls", "tool_call_id"):
            if (value := getattr(self, key)) is not None:
                values[key] = value
        return values


@dataclass(slots=True)
class Conversation:
    """Messages in order, and the tools that were offered to the assistant (JSON schemas), if any."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None

    @property
    def is_text(self) -> bool:
        """True for a pre-training document."""
        return bool(self.messages) and all(message.role == "text" for message in self.messages)

    @property
    def is_tokenized(self) -> bool:
        """True for a document that came as token ids."""
        return bool(self.messages) and all(message.ids is not None for message in self.messages)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The messages as plain dictionaries for a chat template."""
        return [message.to_dict() for message in self.messages]


def to_turns(conversation: Conversation) -> list[dict[str, Any]]:
    """XTuner's turns: each assistant message closes a turn; a key is present when the conversation says something.

    A `text` document becomes one turn with an empty input and `need_eos_token` false, as XTuner's `pretrain` has it.
    Neighbours that share a key are joined with a newline: XTuner's own joining, with nothing between them, runs words
    together. What follows the last assistant message has no place in turns.
    """
    turns: list[dict[str, Any]] = []
    turn: dict[str, Any] = {}
    for message in conversation.messages:
        if message.role == "system":
            turn["system"] = _joined(turn.get("system"), message)
        elif message.role == "text":
            turns.append({**turn, "input": "", "output": message.text, "need_eos_token": False})
            turn = {}
        elif message.role == "assistant":
            turn["output"] = _joined(None, message)
            if message.loss is not None:
                turn["output_with_loss"] = message.loss
            if message.need_eos_token is not None:
                turn["need_eos_token"] = message.need_eos_token
            if message.sep is not None:
                turn["sep"] = message.sep
            turns.append(turn)
            turn = {}
        else:  # user, and tool results, which XTuner's turns can only carry as input
            turn["input"] = _joined(turn.get("input"), message)
    return turns


def _joined(before: str | None, message: Message) -> str | None:
    """The message's text after what the key already holds; a null stays null."""
    if before is None:
        return None if message.content is None else message.text
    return f"{before}\n{message.text}"


def from_turns(turns: Iterable[Mapping[str, Any]]) -> Conversation:
    """The inverse of `to_turns`; an empty input without `need_eos_token` becomes a `text` document.

    Raises:
        DataError: a turn has unknown keys, or no output.
    """
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        if unknown := set(turn) - set(TURN_KEYS):
            raise DataError(f"turn {number}: unknown keys {sorted(unknown)}", why=f"known are {', '.join(TURN_KEYS)}")
        if "output" not in turn:
            raise DataError(f"turn {number}: output: missing", fix="every turn needs an output")
        output = turn["output"] or ""
        loss, eos, sep = (turn.get(key) for key in ("output_with_loss", "need_eos_token", "sep"))
        if turn.get("input") == "" and not turn.get("system") and eos is False and sep is None and loss is None:
            messages.append(Message("text", output))
            continue
        if turn.get("system") is not None:
            messages.append(Message("system", turn["system"]))
        if turn.get("input") is not None:
            messages.append(Message("user", turn["input"]))
        messages.append(Message("assistant", output, loss=loss, need_eos_token=eos, sep=sep))
    return Conversation(messages)
