"""The same layouts exactly as XTuner v0.2.0 reads them, traps included: what `strict_xtuner=True` calls.

    {"instruction": "Hi", "input": null, ...}   strict: user "Hi\\nNone"     default: user "Hi"
    {"text": "### Human: a### # Notes ..."}     strict: cut at the heading   default: kept

For reproducing old runs and for lessons that show a trap beside its cure; no recipe should train with it by choice.
The rules were read from XTuner (Apache-2.0) and are checked against what its code returned. One departure: text in a
data file is parsed, where XTuner passes it to `eval`. Where XTuner raises, so does this. Lesson: notebook 01.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from minituner.data.conversation import Conversation, Message
from minituner.data.formats_agent import (
    END_EXEC,
    END_THINK,
    START_EXEC,
    START_THINK,
    api_parameters,
    find_apis,
    moss_turns,
    parse_literal,
    react_system,
)
from minituner.data.formats_columns import Row, get_text, kind_of, system_prompts
from minituner.errors import DataError

Turn = dict[str, Any]
IMAGE = "<image>"
CRASHES = (KeyError, TypeError, AttributeError, ValueError, IndexError, AssertionError, RecursionError)


def strictly(function: Callable[[Row], Iterable[Turn]]) -> Callable[[Row], Conversation]:
    """Make a format of a function that gives XTuner's turns; what would crash XTuner becomes a DataError."""

    def convert(record: Row) -> Conversation:
        try:
            turns = list(function(record))
        except CRASHES as error:
            detail = f"{type(error).__name__} {error}".strip()
            raise DataError(f"record: XTuner fails on it: {detail:.200}") from error
        return Conversation([message for turn in turns for message in _messages(turn)])

    convert.__name__, convert.__doc__ = function.__name__, function.__doc__
    return convert


def _messages(turn: Turn) -> Iterable[Message]:
    """A turn's messages; `to_turns` gives the same keys and values back, nulls included."""
    for key, role in (("system", "system"), ("input", "user"), ("output", "assistant")):
        if key in turn:
            value = turn[key]
            if value is not None and not isinstance(value, str):
                raise DataError(f"{key}: expected text, found {kind_of(value)}", why="XTuner fails on it later")
            if role != "assistant":
                yield Message(role, value)
            else:
                loss, eos, sep = (turn.get(name) for name in ("output_with_loss", "need_eos_token", "sep"))
                yield Message(role, value, loss=loss, need_eos_token=eos, sep=sep)


def _columns(question: str, answer: str, system: str | None = None) -> Callable[[Row], Conversation]:
    """A format of two columns, under a system text of the catalog."""

    def turns(record: Row) -> Iterable[Turn]:
        head = {"system": system_prompts()[system]} if system else {}
        yield {**head, "input": record[question], "output": record[answer]}

    return strictly(turns)


def _two_over(first: str, second: str, answer: str, system: str | None = None) -> Callable[[Row], Conversation]:
    """The same with an input of two columns. Trap: null prints as None, an empty one leaves a newline."""

    def turns(record: Row) -> Iterable[Turn]:
        head = {"system": system_prompts()[system]} if system else {}
        yield {**head, "input": f"{record[first]}\n{record[second]}", "output": record[answer]}

    return strictly(turns)


alpaca_zh = _two_over("instruction_zh", "input_zh", "output_zh")
medical = _two_over("instruction", "input", "output", "medical")
sql = _two_over("context", "question", "answer", "sql")
arxiv = _columns("abstract", "title", "arxiv_gentile")
code_alpaca = _columns("prompt", "completion", "coder")
tiny_codes = _columns("prompt", "response", "coder")
crime_kg_assistant = _columns("input", "output", "lawyer")
law_reference = _columns("question", "answer", "lawyer")
stack_exchange = _columns("question", "response")
default = _columns("input", "output")


@strictly
def alpaca(record: Row) -> Iterable[Turn]:
    """Joined like the others, but a row without an answer gives nothing."""
    if record.get("output") != "<nooutput>":
        yield {"input": f"{record['instruction']}\n{record['input']}", "output": record["output"]}


@strictly
def colors(record: Row) -> Iterable[Turn]:
    """Trap: a description without an ASCII colon is lost."""
    _, _, text = record["description"].partition(":")
    yield {"system": system_prompts()["colorist"], "input": text.strip(), "output": record["color"]}


@strictly
def openorca(record: Row) -> Iterable[Turn]:
    """system_prompt as it is, also when empty."""
    yield {"system": record["system_prompt"], "input": record["question"], "output": record["response"]}


def pretrain(record: Row) -> Conversation:
    """A document, stripped; also an empty one."""
    if not isinstance(record.get("text"), str):
        raise DataError(f"text: expected text, found {kind_of(record.get('text'))}")
    return Conversation([Message("text", record["text"].strip())])


@strictly
def oasst1(record: Row) -> Iterable[Turn]:
    """Traps: every `###` cuts, and pieces are paired by position whoever spoke them."""
    pieces = []
    for part in map(str.strip, record["text"].split("###")):
        who, colon, text = part.partition(":")
        if colon and who in ("Human", "Assistant"):
            pieces.append(text.strip())
    for question, answer in zip(pieces[::2], pieces[1::2], strict=False):  # an odd last piece is dropped
        yield {"input": question, "output": answer}


@strictly
def openai(record: Row) -> Iterable[Turn]:
    """Traps: user texts are glued, the last system text wins, a first assistant is skipped, a null loss masks."""
    system, question, started = "", "", False
    for item in record["messages"]:
        role = item["role"]
        if role == "assistant" and not started:
            continue
        started = True
        if role == "system":
            system = item["content"]
        elif role == "user":
            question += item["content"]
        elif role == "assistant":
            loss = str(item.get("loss", "True")).lower() == "true"
            yield {"system": system, "input": question, "output": item["content"], "output_with_loss": loss}
            system = question = ""
        else:
            raise ValueError(f"role {role!r}")


def _human_gpt(record: Row, rewrite: Callable[[str], str]) -> Iterable[Turn]:
    question, started = "", False
    for item in record["conversations"]:
        who = item["from"]
        if who == "human":
            question += rewrite(item["value"])
        elif who != "gpt":
            raise ValueError(f"from {who!r}")
        elif started:
            yield {"input": question, "output": item["value"]}
            question = ""
        started = started or who == "human"


@strictly
def wizardlm(record: Row) -> Iterable[Turn]:
    """Traps: human texts are glued, a first gpt is skipped."""
    return _human_gpt(record, lambda text: text)


@strictly
def llava(record: Row) -> Iterable[Turn]:
    """Trap: several images become one. (XTuner also writes this into the record.)"""
    return _human_gpt(record, lambda t: f"{IMAGE}\n{t.replace(IMAGE, '').strip()}".strip() if IMAGE in t else t)


def _only_image(text: str) -> str:
    if IMAGE not in text:
        raise ValueError(f"a human message without {IMAGE}")
    return IMAGE


@strictly
def llava_image_only(record: Row) -> Iterable[Turn]:
    """Each human text becomes its image."""
    return _human_gpt(record, _only_image)


@strictly
def conversation(record: Row) -> Iterable[Turn]:
    """Turns as they are. Trap: a null `output_with_loss` or `need_eos_token` (Arrow's filling) counts as false."""
    for turn in record["conversation"]:
        flags = {key: bool(turn[key]) for key in ("output_with_loss", "need_eos_token") if key in turn}
        yield {
            **{key: turn[key] for key in ("system", "input", "sep") if key in turn},
            "output": turn["output"],
            **flags,
        }


def _in_fence(text: str) -> Any:
    return json.loads(text.replace("```JSON", "").replace("```", "").replace("\n", ""))


def _think(text: str) -> tuple[str, int]:
    """Rewrite each `text<|startofthink|>call<|endofthink|>` as a ReAct step: (new text, how many).

    Found with `find`: XTuner's regular expression takes quadratic time on a long answer without a call.
    """
    done, position, count = "", 0, 0
    while (start := text.find(START_THINK, position)) != -1:
        if (end := text.find(END_THINK, start)) == -1:
            break
        if thought := text[position:start].strip():
            done += f"Thought:{thought}\n"
        call = _in_fence(text[start + len(START_THINK) : end])
        done += f"Action:{call['api_name']}\nAction Input:{call['parameters']}\n"
        position, count = end + len(END_THINK), count + 1
    return done + text[position:], count


def _exec_turn(text: str) -> list[Turn]:
    """The turn that XTuner makes of a tool's result: a system text, and an answer if there is one after it."""
    before, mark, rest = text.partition(END_EXEC)
    if mark:
        tail = "\n" if rest.endswith("\n") else ""
        answer = f"Final Answer:{rest.strip()}\n" if rest.strip() else ""
        text = f"Response:{_in_fence(before)}\n{answer}{tail}"
    else:
        text = START_EXEC + text
    response, mark, answer = text.partition("Final Answer:")
    return [{"system": response, "output": mark + answer}] if mark and "Final Answer:" not in answer else []


@strictly
def msagent_react(record: Row) -> Iterable[Turn]:
    """Traps: a record that does not parse vanishes, and so does a result without an answer."""
    items = record["conversations"]
    if isinstance(items, str):
        items = parse_literal(items, "conversations")
    if len(items) < 2:
        return []
    turns: list[Turn] = []
    system = question = ""
    for item in items:
        who = item["from"]
        if who == "system":
            system += react_system(_apis(item["value"]))
        elif who == "user":
            question += f"{item['value']}\n"
        elif who == "assistant":
            value = item["value"]
            try:
                text, *results = value.split(START_EXEC)
                text, calls = _think(text)
            except CRASHES:
                return []
            if len(results) > 1:
                return []
            output = f"{text}\n" if calls else f"Final Answer:{text}\n"
            turns.append({"system": system, "input": question, "output": output})
            system = question = ""
            try:
                turns += _exec_turn(results[0]) if results else []
            except CRASHES:
                continue  # XTuner keeps what it has and goes on
    return turns


def _apis(text: str) -> Mapping[str, str]:
    apis: dict[str, str] = {}
    for api in find_apis(text):
        apis[api["name"]] = api["description"]
        if (parameters := api_parameters(api)) is not None and isinstance(api["description"], str):
            apis[api["name"]] += f"\n输入参数: {parameters}"
    return apis


def moss_003_sft(record: Row) -> Conversation:
    """MOSSSFTDataset's spans: the raw parts one after the other, trained all (the human's too) but the tool's result.

    The meta instruction is a system message; every part is an assistant message without an end token. XTuner skips a
    record that lacks a turn, so it is an empty conversation.
    """
    try:
        turns = list(moss_turns(record))
        messages = [Message("system", get_text(record, "meta_instruction"))]
    except DataError:
        return Conversation([])
    for human, thoughts, commands, results, answer in turns:
        head, mark, rest = results.partition("<|Results|>:")
        inner, end, after = rest.rpartition("<eor>\n")
        spans = [(human + thoughts + commands + head + mark, True), (inner, False), (end + after + answer, True)]
        messages += [Message("assistant", text, loss=loss, need_eos_token=False) for text, loss in spans if text]
    return Conversation(messages)
