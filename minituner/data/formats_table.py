"""The table of record layouts: each format's function, the columns it reads, and an example that it can read.

    FORMATS["alpaca"].columns   -> ("instruction", "output")     what `list-formats` prints
    FORMATS["alpaca"].example   -> {"instruction": "Translate to French.", "input": "the sea", "output": "la mer"}

Lesson: notebook 01.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minituner.data import formats_agent as agent
from minituner.data import formats_columns as columns
from minituner.data import formats_messages as messages
from minituner.data import formats_strict as strict
from minituner.data.conversation import Conversation
from minituner.data.formats_tokenized import tokenized


@dataclass(frozen=True)
class Format:
    """One record layout.

    `columns` must be there, `optional` may be. `strict` is XTuner's behaviour, None where XTuner has no such format.
    `system` is the catalog key of the text that the format adds. `detected_as` names the format that `detect_format`
    gives for the same columns, when the two cannot be told apart. `evidence` must be seen in the data before a format
    that adds a system text is chosen by its columns alone.
    """

    name: str
    function: Callable[[Mapping[str, Any]], Conversation]
    columns: tuple[str, ...]
    example: dict[str, Any]
    description: str
    optional: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    strict: Callable[[Mapping[str, Any]], Conversation] | None = None
    system: str | None = None
    detected_as: str | None = None
    evidence: re.Pattern[str] | None = None


_CODE = re.compile(
    r"```|\b(?:def|code|function|program|python|javascript|java|sql|html|css|c\+\+|array|string)\b|代码|函数|编程|程序",
    re.IGNORECASE,
)
_LAW = re.compile(r"法|罪|刑|诉|律|合同|赔偿|判决")
_SQL = re.compile(r"create\s+table|select\b.+\bfrom\b", re.IGNORECASE | re.DOTALL)

_HUMAN_GPT = [{"from": "human", "value": "Which is larger, 9.9 or 9.11?"}, {"from": "gpt", "value": "9.9."}]
_IMAGE_GPT = [{"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": "A red bicycle."}]
_MSAGENT = [
    {"from": "system", "value": '{"name": "clock", "description": "报时"}'},
    {"from": "user", "value": "几点了？"},
    {
        "from": "assistant",
        "value": '查一下。<|startofthink|>{"api_name": "clock", "parameters": {}}<|endofthink|>'
        '<|startofexec|>{"time": "9:30"}<|endofexec|>九点半。',
    },
]
_MOSS_TURN = {
    "Human": "<|Human|>: 你好<eoh>\n",
    "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
    "Commands": "<|Commands|>: None<eoc>\n",
    "Tool Responses": "<|Results|>: None<eor>\n",
    "MOSS": "<|MOSS|>: 你好！<eom>\n",
}

_TABLE = (
    Format(
        "openai",
        messages.openai,
        ("messages",),
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!", "loss": True}]},
        "OpenAI messages: role, content; loss, name, tool_calls, tool_call_id, reasoning_content",
        optional=("tools",),
        strict=strict.openai,
    ),
    Format(
        "sharegpt",
        messages.sharegpt,
        ("conversations",),
        {"conversations": _HUMAN_GPT},
        "from and value: human, gpt, system, function_call, observation, tool",
        optional=("tools", "system"),
    ),
    Format(
        "conversation",
        messages.conversation,
        ("conversation",),
        {"conversation": [{"system": "Be brief.", "input": "Hi", "output": "Hello!"}]},
        "XTuner's own turns: system, input, output, output_with_loss",
        strict=strict.conversation,
    ),
    Format(
        "alpaca",
        columns.alpaca,
        ("instruction", "output"),
        {"instruction": "Translate to French.", "input": "the sea", "output": "la mer"},
        "an instruction, perhaps with an input; rows with <nooutput> are left out",
        optional=("input",),
        strict=strict.alpaca,
    ),
    Format(
        "alpaca_zh",
        columns.alpaca_zh,
        ("instruction_zh", "output_zh"),
        {"instruction_zh": "翻译成英文", "input_zh": "大海", "output_zh": "the sea"},
        "alpaca with Chinese columns",
        optional=("input_zh",),
        strict=strict.alpaca_zh,
    ),
    Format(
        "arxiv",
        columns.arxiv,
        ("abstract", "title"),
        {"abstract": "We train small models on laptops.", "title": "Small models, small machines"},
        "a title for an abstract",
        strict=strict.arxiv,
        system="arxiv_gentile",
    ),
    Format(
        "code_alpaca",
        columns.code_alpaca,
        ("prompt", "completion"),
        {"prompt": "Write a Python function that doubles.", "completion": "def double(x):\n    return 2 * x"},
        "code for a task",
        strict=strict.code_alpaca,
        system="coder",
        evidence=_CODE,
    ),
    Format(
        "tiny_codes",
        columns.tiny_codes,
        ("prompt", "response"),
        {"prompt": "Write code that prints one line.", "response": "```python\nprint('one')\n```"},
        "code for a task, with an explanation",
        strict=strict.tiny_codes,
        system="coder",
        evidence=_CODE,
    ),
    Format(
        "colors",
        columns.colors,
        ("description", "color"),
        {"description": "Moss Green: a dark, muted green", "color": "#4a5d23"},
        "a colour's code for its description",
        strict=strict.colors,
        system="colorist",
    ),
    Format(
        "crime_kg_assistant",
        columns.crime_kg_assistant,
        ("input", "output"),
        {"input": "捡到手机不还，违法吗？", "output": "拒不归还可能构成侵占罪。"},
        "Chinese legal consultation",
        aliases=("crime_kg_assitan",),  # XTuner's spelling
        strict=strict.crime_kg_assistant,
        system="lawyer",
        detected_as="default",
    ),
    Format(
        "law_reference",
        columns.law_reference,
        ("question", "answer"),
        {"question": "合同何时成立？", "answer": "承诺生效时合同成立。"},
        "Chinese legal questions with the articles that answer them",
        strict=strict.law_reference,
        system="lawyer",
        evidence=_LAW,
    ),
    Format(
        "medical",
        columns.medical,
        ("instruction", "output"),
        {"instruction": "流鼻血怎么办？", "input": "", "output": "身体前倾，按压鼻翼十分钟。"},
        "Chinese medical questions",
        optional=("input",),
        strict=strict.medical,
        system="medical",
        detected_as="alpaca",
    ),
    Format(
        "sql",
        columns.sql,
        ("context", "question", "answer"),
        {"context": "CREATE TABLE cat (age INT)", "question": "How many cats?", "answer": "SELECT COUNT(*) FROM cat"},
        "a query for a question about tables",
        strict=strict.sql,
        system="sql",
        evidence=_SQL,
    ),
    Format(
        "openorca",
        columns.openorca,
        ("system_prompt", "question", "response"),
        {"system_prompt": "Think step by step.", "question": "7 * 8?", "response": "7 * 8 = 56."},
        "a question under the record's own system text",
        strict=strict.openorca,
    ),
    Format(
        "stack_exchange",
        columns.stack_exchange,
        ("question", "response"),
        {"question": "Why is the sky blue?", "response": "Short waves scatter more."},
        "a question and its best answer",
        strict=strict.stack_exchange,
    ),
    Format(
        "default",
        columns.default,
        ("input", "output"),
        {"input": "Hi", "output": "Hello!"},
        "an input and an output, nothing added",
        strict=strict.default,
    ),
    Format(
        "pretrain",
        columns.pretrain,
        ("text",),
        {"text": "Once upon a time there was a gradient."},
        "a document for pre-training: no roles, no template",
        strict=strict.pretrain,
    ),
    Format(
        "tokenized",
        tokenized,
        ("input_ids",),
        {"input_ids": [1, 4093, 19556, 2], "labels": [-100, -100, 19556, 2]},
        "token ids: input_ids with labels, InternEvo's signed tokens, or a folder of its .bin files",
        optional=("labels", "attention_mask", "tokens", "zero_trained"),
    ),
    Format(
        "oasst1",
        messages.oasst1,
        ("text",),
        {"text": "### Human: Hi### Assistant: Hello!### Human: Bye### Assistant: See you."},
        "one text with ### Human: and ### Assistant: marks",
        strict=strict.oasst1,
    ),
    Format(
        "wizardlm",
        messages.wizardlm,
        ("conversations",),
        {"conversations": _HUMAN_GPT},
        "sharegpt with human and gpt only",
        strict=strict.wizardlm,
        detected_as="sharegpt",
    ),
    Format(
        "moss_003_sft",
        agent.moss_003_sft,
        ("meta_instruction", "chat"),
        {"meta_instruction": "You are MOSS.\n", "num_turns": 1, "chat": {"turn_1": _MOSS_TURN}},
        "MOSS with plugins: thoughts, commands, tool results",
        optional=("num_turns",),
        strict=strict.moss_003_sft,
    ),
    Format(
        "msagent_react",
        agent.msagent_react,
        ("conversations",),
        {"conversations": _MSAGENT},
        "MSAgent-Bench tool calls, as ReAct steps",
        strict=strict.msagent_react,
    ),
    Format(
        "llava",
        messages.llava,
        ("conversations",),
        {"image": "bicycle.jpg", "conversations": _IMAGE_GPT},
        "the text side of LLaVA data, with <image> marks",
        strict=strict.llava,
    ),
    Format(
        "llava_image_only",
        messages.llava_image_only,
        ("conversations",),
        {"image": "bicycle.jpg", "conversations": _IMAGE_GPT},
        "captions: each human message is only its <image>",
        strict=strict.llava_image_only,
        detected_as="llava",
    ),
)
FORMATS: dict[str, Format] = {entry.name: entry for entry in _TABLE}
