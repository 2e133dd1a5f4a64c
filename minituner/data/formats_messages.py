"""Message layouts: records that hold a conversation, as a list of messages or as one marked text.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}     openai
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}         sharegpt
    {"conversation": [{"input": "Hi", "output": "Hello"}]}                                           conversation
    {"text": "### Human: Hi### Assistant: Hello"}                                                    oasst1

All end in the same check: an assistant message that answers a user, and tool results only after the assistant. The
order of the messages is kept as it is; XTuner skips, shifts or glues some (each departure is named where it is made).
Lesson: notebook 01.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from minituner.data.conversation import TURN_KEYS, Conversation, Message
from minituner.data.formats_columns import Row, get_text, kind_of
from minituner.errors import DataError, nearest

OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
HUMAN_GPT = {"human": "user", "gpt": "assistant"}
MARKER = re.compile(r"(?<!#)###\s*(Human|Assistant):")
IMAGE = "<image>"


def items_of(record: Row, column: str) -> list[Mapping[str, Any]]:
    """The list of objects in a column (JSON text is parsed, as CSV files have it).

    Raises:
        DataError: it is missing, empty, or no list of objects.
    """
    items = record.get(column)
    if isinstance(items, str):
        items = parse_json(items, column)
    if not isinstance(items, list | tuple):
        if column not in record:
            get_text(record, column)  # says what is missing, and what is there
        raise DataError(f"{column}: expected a list of messages, found {kind_of(items)}")
    if not items:
        raise DataError(f"{column}: empty, there is no message")
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise DataError(f"{column}[{index}]: expected an object, found {kind_of(item)}")
    return list(items)


def parse_json(text: str, field: str) -> Any:
    """Parse JSON text inside a record. Raises DataError naming the field."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{field}: not valid JSON: {error}") from None


def _role(item: Mapping[str, Any], key: str, field: str, roles: Mapping[str, str]) -> str:
    value = item.get(key)
    if isinstance(value, str) and value in roles:
        return roles[value]
    if key not in item:
        raise DataError(f"{field}.{key}: missing", why=f"this message has the keys {', '.join(map(str, item))}")
    shown = repr(value) if isinstance(value, str) else kind_of(value)
    fix = nearest(value, list(roles)) if isinstance(value, str) else ""
    raise DataError(f"{field}.{key}: unknown role {shown}", why=f"known are {', '.join(roles)}", fix=fix)


def _optional(item: Mapping[str, Any], key: str, field: str, kind: type) -> Any:
    """A key that may be absent or null: Arrow fills keys that only some messages have with null."""
    value = item.get(key)
    if value is None or isinstance(value, kind):
        return value
    wanted = {bool: "true or false", str: "text", list: "a list"}[kind]
    raise DataError(f"{field}.{key}: expected {wanted}, found {kind_of(value)} {value!r:.40}".rstrip())


def _loss(item: Mapping[str, Any], role: str, field: str) -> bool | None:
    """`loss` (true, false; null is unset, where XTuner masks in silence), or OpenAI's own `weight` (0 or 1)."""
    loss = _optional(item, "loss", field, bool)
    weight = item.get("weight")
    if loss is None and weight is not None:
        if weight not in (0, 1) or isinstance(weight, bool):
            raise DataError(f"{field}.weight: expected 0 or 1, found {weight!r:.40}")
        loss = bool(weight)
    if loss and role != "assistant":
        raise DataError(f"{field}.loss: only assistant messages are trained, this is a {role} message")
    return loss if role == "assistant" else None


def _content(item: Mapping[str, Any], field: str) -> str | list[dict[str, Any]]:
    content = item.get("content")
    if isinstance(content, str):
        return content
    if "content" not in item:
        raise DataError(f"{field}.content: missing")
    if not isinstance(content, list | tuple) or not content:
        found = "an empty list" if isinstance(content, list | tuple) else kind_of(content)
        raise DataError(f"{field}.content: expected text or a list of parts, found {found}")
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise DataError(f'{field}.content[{index}]: expected a part with a type, such as {{"type": "text"}}')
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise DataError(f"{field}.content[{index}].text: expected text, found {kind_of(part.get('text'))}")
    # A part with a null `text` (Arrow's filling) would stop a template that joins texts.
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def _tool_calls(calls: Any, field: str) -> list[dict[str, Any]] | None:
    """OpenAI tool calls with `arguments` as an object: chat templates print it, and would quote JSON text twice."""
    if calls is None or calls == []:
        return None
    if not isinstance(calls, list):
        raise DataError(f"{field}: expected a list, found {kind_of(calls)}")
    done = []
    for index, call in enumerate(calls):
        here = f"{field}[{index}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f'{here}.function.name: missing; a call is {{"function": {{"name", "arguments"}}}}')
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{here}.function.arguments") if arguments.strip() else {}
        if not isinstance(arguments, Mapping | None):
            raise DataError(f"{here}.function.arguments: expected an object, found {kind_of(arguments)}")
        extra = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        function = {"name": function["name"], "arguments": dict(arguments or {})}
        done.append({**extra, "type": "function", "function": function})
    return done


def _tools(record: Row) -> list[dict[str, Any]] | None:
    """The tools offered, as OpenAI schemas; sharegpt keeps bare functions, often as JSON text."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, "tools") if tools.strip() else None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"tools: expected a list of objects, found {kind_of(tools)}")
    return [dict(t) if "function" in t else {"type": "function", "function": dict(t)} for t in tools]


def checked(messages: list[Message], column: str, role_key: str, tools: list[dict[str, Any]] | None) -> Conversation:
    """Check the order of a record's own messages and close the conversation.

    Raises:
        DataError: nothing to train (no assistant message, none after a user), or a tool result out of place.
    """
    before, asked, answered = "", False, False
    for index, message in enumerate(messages):
        role = message.role
        if role == "user":
            asked = True
        elif role == "assistant":
            answered = answered or asked
        elif role == "tool" and before not in ("assistant", "tool"):
            why = f"a tool result must follow an assistant message, not {before or 'the start'}"
            raise DataError(f"{column}[{index}].{role_key}: out of order: {why}")
        before = role
    if not answered:
        if not any(message.role == "assistant" for message in messages):
            raise DataError(f"{column}: no assistant message, so there is nothing to train")
        raise DataError(f"{column}[0].{role_key}: out of order: no assistant message comes after a user message")
    return Conversation(messages, tools)


def openai(record: Row) -> Conversation:
    """messages: role, content, and for the assistant loss, reasoning_content, tool_calls; `tools` beside them.

    XTuner glues user messages, keeps only the last system text, skips a first assistant message, and reads `loss: null`
    or `1` as false. Here every message stays, null is unset, and loss is a boolean or an error.
    """
    messages = []
    for index, item in enumerate(items_of(record, "messages")):
        field = f"messages[{index}]"
        role = _role(item, "role", field, OPENAI_ROLES)
        calls = _tool_calls(item.get("tool_calls"), f"{field}.tool_calls") if role == "assistant" else None
        message = Message(
            role,
            "" if calls and item.get("content") is None else _content(item, field),
            loss=_loss(item, role, field),
            tool_calls=calls,
        )
        for key in ("name", "reasoning_content", "tool_call_id"):
            setattr(message, key, _optional(item, key, field, str))
        messages.append(message)
    return checked(messages, "messages", "role", _tools(record))


def _from_value(record: Row, roles: Mapping[str, str]) -> list[Message]:
    """Messages of a `conversations` column: from/value, or role/content as some sets have it."""
    messages = []
    for index, item in enumerate(items_of(record, "conversations")):
        field = f"conversations[{index}]"
        keys = ("role", "content") if "from" not in item and "role" in item else ("from", "value")
        role = _role(item, keys[0], field, roles)
        value = item.get(keys[1])
        if not isinstance(value, str):
            found = f"expected text, found {kind_of(value)}" if keys[1] in item else "missing"
            raise DataError(f"{field}.{keys[1]}: {found}")
        if item[keys[0]] == "function_call":
            call = parse_json(value, f"{field}.{keys[1]}")
            calls = _tool_calls(call if isinstance(call, list) else [call], f"{field}.{keys[1]}")
            messages.append(Message(role, "", loss=_loss(item, role, field), tool_calls=calls))
        else:
            messages.append(Message(role, value, loss=_loss(item, role, field)))
    return messages


def sharegpt(record: Row) -> Conversation:
    """conversations: from (human, gpt, system, function_call, observation), value; perhaps `system` and `tools`."""
    messages = _from_value(record, SHAREGPT_ROLES)
    result = checked(messages, "conversations", "from", _tools(record))
    if record.get("system"):
        messages.insert(0, Message("system", get_text(record, "system")))
    return result


def wizardlm(record: Row) -> Conversation:
    """conversations of human and gpt only; a first gpt message, which XTuner skips, stays."""
    return checked(_from_value(record, HUMAN_GPT), "conversations", "from", None)


def llava(record: Row) -> Conversation:
    """The text side of LLaVA data: one `<image>` goes to the front of its message, on a line of its own.

    XTuner deletes all but one marker when there are several, and changes the record itself; here several stay in place.
    """
    messages = _from_value(record, HUMAN_GPT)
    for message in messages:
        if message.role == "user" and message.text.count(IMAGE) == 1:
            message.content = f"{IMAGE}\n{message.text.replace(IMAGE, '').strip()}".strip()
    return checked(messages, "conversations", "from", None)


def llava_image_only(record: Row) -> Conversation:
    """Caption training: each human message is only its `<image>`, the words around it are left out by design."""
    messages = _from_value(record, HUMAN_GPT)
    for index, message in enumerate(messages):
        if message.role == "user":
            if IMAGE not in message.text:
                raise DataError(
                    f"conversations[{index}].value: no {IMAGE} in this human message", fix="use format llava"
                )
            message.content = IMAGE
    return checked(messages, "conversations", "from", None)


def oasst1(record: Row) -> Conversation:
    """One text with `### Human:` and `### Assistant:` marks.

    `###` alone is a Markdown heading and stays in the answer, where XTuner cuts the answer off. Roles come from the
    marks, where XTuner pairs by position and so trains a human text as an answer.
    """
    _, *pieces = parts = MARKER.split(get_text(record, "text"))
    if not pieces:
        raise DataError(
            "text: no '### Human:' or '### Assistant:' in it", fix="use format pretrain for plain documents"
        )
    if parts[0].strip():
        raise DataError(f"text: {parts[0].strip()[:40]!r} stands before the first '### Human:' or '### Assistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [Message(roles[who], text.strip()) for who, text in zip(pieces[::2], pieces[1::2], strict=True)]
    return checked(messages, "text", "role", None)


def conversation(record: Row) -> Conversation:
    """XTuner's own turns: system, input, output, output_with_loss, need_eos_token, sep; Arrow's null is unset."""
    messages: list[Message] = []
    for index, turn in enumerate(items_of(record, "conversation")):
        field = f"conversation[{index}]"
        if unknown := [key for key in turn if key not in TURN_KEYS and turn[key] is not None]:
            fix = nearest(str(unknown[0]), TURN_KEYS) or f"known are {', '.join(TURN_KEYS)}"
            raise DataError(f"{field}.{unknown[0]}: unknown key", fix=fix)
        if not isinstance(turn.get("output"), str):
            found = f"expected text, found {kind_of(turn['output'])}" if "output" in turn else "missing"
            raise DataError(f"{field}.output: {found}")
        system, question, sep = (_optional(turn, key, field, str) for key in ("system", "input", "sep"))
        loss, eos = (_optional(turn, key, field, bool) for key in ("output_with_loss", "need_eos_token"))
        if question == "" and not system and eos is False and sep is None and loss is None:
            messages.append(Message("text", turn["output"]))  # what the format pretrain gives
            continue
        if system:
            messages.append(Message("system", system))
        if question is not None:
            messages.append(Message("user", question))
        messages.append(Message("assistant", turn["output"], loss=loss, need_eos_token=eos, sep=sep))
    if len({message.role == "text" for message in messages}) > 1:
        raise DataError("conversation: a pre-training document and chat turns in one record")
    return Conversation(messages)
