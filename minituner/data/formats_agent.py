"""Agent layouts: conversations in which the assistant calls tools through marks in its text.

    MSAgent   "Let me look.<|startofthink|>{"api_name": "weather", ...}<|endofthink|>
               <|startofexec|>{"sunny": true}<|endofexec|>It is sunny."
          ->  assistant "Thought:Let me look.\\nAction:weather\\nAction Input:{...}"
              tool      "Response:{"sunny": true}"
              assistant "Final Answer:It is sunny."

    MOSS      "<|Human|>: hi<eoh>", "<|Commands|>: Search("hi")<eoc>", "<|Results|>: ...<eor>", "<|MOSS|>: hello<eom>"
          ->  user "hi", assistant (thoughts and commands), tool (results), assistant (answer)

What a tool returned is a `tool` message, so it is never trained. The protocol texts stay in the messages, because a
model that was trained on them answers in them. Data is parsed as data, never executed. Lesson: notebook 01.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from minituner.data.conversation import Conversation, Message
from minituner.data.formats_columns import Row, get_text, kind_of
from minituner.data.formats_messages import checked, items_of, parse_json
from minituner.errors import DataError

START_THINK, END_THINK = "<|startofthink|>", "<|endofthink|>"
START_EXEC, END_EXEC = "<|startofexec|>", "<|endofexec|>"
_BLOCK = re.compile(r"<\|startof(think|exec)\|>(.*?)<\|endof\1\|>", re.DOTALL)
_DECODER = json.JSONDecoder()

# The instruction that XTuner v0.2.0 (Apache-2.0) writes in front of MSAgent data; models were trained on it to the
# letter. The places are the tools' descriptions and the list of their names.
REACT_SYSTEM = (
    "你是一个可以调用外部工具的助手，可以使用的工具包括：\n{tools}\n"
    "如果使用工具请遵循以下格式回复：\n```\n"
    "Thought:思考你当前步骤需要解决什么问题，是否需要使用工具\n"
    "Action:工具名称，你的工具必须从 [{names}] 选择\n"
    "Action Input:工具输入参数\n```\n"
    "工具返回按照以下格式回复：\n```\nResponse:调用工具后的结果\n```\n"
    "如果你已经知道了答案，或者你不需要工具，请遵循以下格式回复\n```\n"
    "Thought:给出最终答案的思考过程\nFinal Answer:最终答案\n```\n开始!\n"
)


def parse_literal(text: str, field: str) -> Any:
    """Parse JSON or a Python literal. XTuner passes this text to Python's `eval`, which runs whatever the file says.

    Raises:
        DataError: it is neither.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # not JSON: MSAgent-Bench holds Python literals
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise DataError(f"{field}: neither JSON nor a Python literal: {type(error).__name__}") from None


def find_apis(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects with a name and a description, wherever they stand in a text."""
    position = 0
    while (start := text.find("{", position)) != -1:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            position = start + 1
            continue
        if "name" in value and "description" in value:
            yield value
            position = end
        else:
            position = start + 1


def api_parameters(api: Mapping[str, Any]) -> dict[Any, Any] | None:
    """Parameter names and descriptions of an API's first path, or None where it does not list them."""
    try:
        return {item["name"]: item["description"] for item in api["paths"][0]["parameters"]}
    except (KeyError, IndexError, TypeError):
        return None


def react_system(apis: Mapping[str, str]) -> str:
    """The ReAct instruction for some tools, as XTuner prints it (with the doubled brackets models have seen)."""
    head, middle, end = re.split(r"\{tools\}|\{names\}", REACT_SYSTEM)  # not by replace: a description may say {names}
    return f"{head}{dict(apis)}{middle}{list(apis)}{end}"


def strip_fence(text: str) -> str:
    """JSON out of its Markdown fence."""
    return text.replace("```JSON", "").replace("```json", "").replace("```", "").strip()


def _describe(text: str, field: str) -> dict[str, str]:
    apis: dict[str, str] = {}
    for api in find_apis(text):
        name, description = api["name"], api["description"]
        if not isinstance(name, str) or not isinstance(description, str):
            raise DataError(f"{field}: a tool's name and description must be text")
        parameters = api_parameters(api)
        apis[name] = description + (f"\n输入参数: {parameters}" if parameters is not None else "")
    return apis


def _assistant_steps(text: str, field: str) -> Iterator[Message]:
    """One assistant text as its steps: calls (assistant), results (tool), and the final answer (assistant)."""
    position, thought = 0, ""
    for block in _BLOCK.finditer(text) if "<|startof" in text else ():
        thought = text[position : block.start()].strip()
        position = block.end()
        value = parse_json(strip_fence(block.group(2)), field)
        if block.group(1) == "exec":
            if thought:
                yield Message("assistant", f"Final Answer:{thought}")
            yield Message("tool", f"Response:{json.dumps(value, ensure_ascii=False)}")
            continue
        if not isinstance(value, dict) or not isinstance(value.get("api_name"), str) or "parameters" not in value:
            raise DataError(f"{field}: a think block needs api_name and parameters, found {kind_of(value)}")
        # JSON, where XTuner prints Python's repr of the parameters (True, 'x'), which no tool can parse
        parameters = json.dumps(value["parameters"], ensure_ascii=False)
        head = f"Thought:{thought}\n" if thought else ""
        yield Message("assistant", f"{head}Action:{value['api_name']}\nAction Input:{parameters}")
    rest = text[position:].strip()
    if any(mark in rest for mark in (START_THINK, END_THINK, START_EXEC, END_EXEC)):
        raise DataError(f"{field}: a <|startof...|> block is not closed, or closed twice")
    if rest or not position:
        yield Message("assistant", f"Final Answer:{rest}")


def msagent_react(record: Row) -> Conversation:
    """MSAgent-Bench: conversations (a list, or text that is one) of system, user, assistant, as ReAct steps.

    XTuner drops a record in silence when a block is no JSON or there are two results, puts results into the system
    text, and loses one that no answer follows. Here a record is either whole or an error.
    """
    if isinstance(record.get("conversations"), str):
        record = {"conversations": parse_literal(record["conversations"], "conversations")}
    messages: list[Message] = []
    for index, item in enumerate(items_of(record, "conversations")):
        field = f"conversations[{index}]"
        role, value = item.get("from"), item.get("value")
        if not isinstance(value, str):
            raise DataError(f"{field}.value: expected text, found {kind_of(value)}")
        if role == "system":
            messages.append(Message("system", react_system(_describe(value, f"{field}.value"))))
        elif role == "user":
            messages.append(Message("user", value))
        elif role == "assistant":
            steps = list(_assistant_steps(value, f"{field}.value"))
            if steps[0].role == "tool" and (not messages or messages[-1].role not in ("assistant", "tool")):
                raise DataError(f"{field}.value: a result ({START_EXEC}) without a call before it")
            messages.extend(steps)
        else:
            raise DataError(f"{field}.from: unknown role {role!r:.40}", why="known are system, user, assistant")
    return checked(messages, "conversations", "from", None)


# MOSS: the parts of a turn in their order, and the marks around what the human typed (a template puts them back)
MOSS_PARTS = ("Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS")
_HUMAN = re.compile(r"\s*(?:<\|Human\|>: ?)?(.*?)(?:<eoh>)?\s*", re.DOTALL)


def moss_turns(record: Row) -> Iterator[list[str]]:
    """The five parts of each turn of a moss-003-sft record, as they stand in the file.

    Raises:
        DataError: `chat` is no object, or a turn or a part is missing.
    """
    chat, count = record.get("chat"), record.get("num_turns")
    if not isinstance(chat, Mapping):
        raise DataError(f"chat: expected an object with turn_1, turn_2, ..., found {kind_of(chat)}")
    if count is None:
        count = sum(value is not None for value in chat.values())
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise DataError(f"num_turns: expected a positive number, found {count!r:.40}")
    for number in range(1, count + 1):
        turn = chat.get(f"turn_{number}")
        if not isinstance(turn, Mapping):
            raise DataError(f"chat.turn_{number}: expected an object, found {kind_of(turn)}")
        if bad := [part for part in MOSS_PARTS if not isinstance(turn.get(part), str)]:
            raise DataError(f"chat.turn_{number}.{bad[0]}: expected text, found {kind_of(turn.get(bad[0]))}")
        yield [turn[part] for part in MOSS_PARTS]


def moss_003_sft(record: Row) -> Conversation:
    """moss-003-sft: meta_instruction, num_turns, and chat.turn_1, chat.turn_2, ... with the parts of MOSS_PARTS.

    XTuner trains the human's text too; here it is a user message. The assistant's marks stay in its text.
    """
    messages = []
    if record.get("meta_instruction"):
        messages.append(Message("system", get_text(record, "meta_instruction")))
    for human, thoughts, commands, results, answer in moss_turns(record):
        match = _HUMAN.fullmatch(human)
        messages += [
            Message("user", match.group(1) if match else human),
            Message("assistant", thoughts + commands),
            Message("tool", results),
            Message("assistant", answer),
        ]
    return Conversation(messages)
