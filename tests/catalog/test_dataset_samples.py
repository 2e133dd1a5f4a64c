"""Every data set of the catalog, two records in its own layout: the answers are trained, the questions are not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minituner.catalog import load
from minituner.data.encoding import IGNORE
from minituner.data.prepare import prepare
from minituner.recipe import Recipe
from tests.tiny import tiny_tokenizer

DATASETS = {key: value for key, value in load("datasets").items() if not key.startswith("_")}


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def moss(question: str, thought: str, command: str, result: str, answer: str) -> dict[str, Any]:
    turn = {
        "Human": f"<|Human|>: {question}<eoh>\n",
        "Inner Thoughts": f"<|Inner Thoughts|>: {thought}<eot>\n",
        "Commands": f"<|Commands|>: {command}<eoc>\n",
        "Tool Responses": f"<|Results|>: {result}<eor>\n",
        "MOSS": f"<|MOSS|>: {answer}<eom>\n",
    }
    return {"meta_instruction": "You are an AI assistant.", "num_turns": 1, "chat": {"turn_1": turn}}


def agent(question: str, *steps: str) -> dict[str, Any]:
    tools = "[{'name': 'weather', 'description': '查询天气', 'parameters': [{'name': 'city'}]}]"
    said = [("system", f"你可以使用: {tools}"), ("user", question), *(("assistant", step) for step in steps)]
    return {"conversations": str([{"from": who, "value": text} for who, text in said])}


CALL = '查一下。<|startofthink|>```JSON\n{"api_name": "weather", "parameters": {"city": "北京"}}\n```<|endofthink|>'
RESULT = '<|startofexec|>```JSON\n{"rain": "小雨"}\n```<|endofexec|>'

# layout -> two records, what is trained, what is only read (as they come: the first record's first)
SAMPLES: dict[str, tuple[list[dict[str, Any]], list[str], list[str]]] = {
    "openai": (
        [chat("Who are you?", "I am Ada."), chat("你是谁？", "我是阿达。")],
        ["I am Ada.", "我是阿达。"],
        ["Who", "你是"],
    ),
    "auto": (
        [chat("Who are you?", "I am Ada."), chat("你是谁？", "我是阿达。")],
        ["I am Ada.", "我是阿达。"],
        ["Who", "你是"],
    ),
    "pretrain": (
        [{"text": "The sea is wide."}, {"text": "上海在东海边。"}],
        ["The sea is wide.", "上海在东海边。"],
        [],
    ),
    "alpaca": (
        [
            {"instruction": "Add.", "input": "2 + 2", "output": "4", "text": "Below is ..."},
            {"instruction": "Name a river.", "input": "", "output": "The Nile.", "text": "Below is ..."},
        ],
        ["4", "The Nile."],
        ["Add.\n2 + 2", "Name a river."],
    ),
    "alpaca_zh": (
        [
            {
                "instruction_zh": "加。",
                "input_zh": "二加二",
                "output_zh": "四",
                "instruction": "Add.",
                "output": "Four",
            },
            {
                "instruction_zh": "说一条河。",
                "input_zh": None,
                "output_zh": "长江。",
                "instruction": "?",
                "output": "!",
            },
        ],
        ["四", "长江。"],
        ["加。\n二加二", "说一条河。"],
    ),
    "oasst1": (
        [
            {"text": "### Human: Hi### Assistant: Hello!### Human: Bye### Assistant: See you."},
            {"text": "### Human: 你好### Assistant: 您好。"},
        ],
        ["Hello!", "See you.", "您好。"],
        ["Hi", "Bye", "你好"],
    ),
    "openorca": (
        [
            {"id": "flan.1", "system_prompt": "Be short.", "question": "Two and two?", "response": "Four."},
            {"id": "t0.2", "system_prompt": "", "question": "A colour?", "response": "Red."},
        ],
        ["Four.", "Red."],
        ["Be short.", "Two and two?", "A colour?"],
    ),
    "wizardlm": (
        [
            {"idx": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
            {"idx": "b", "conversations": [{"from": "human", "value": "写诗"}, {"from": "gpt", "value": "床前明月光"}]},
        ],
        ["Hello!", "床前明月光"],
        ["Hi", "写诗"],
    ),
    "code_alpaca": (
        [{"prompt": "Print 1.", "completion": "print(1)"}, {"prompt": "Print 2.", "completion": "print(2)"}],
        ["print(1)", "print(2)"],
        ["Print 1.", "Print 2."],
    ),
    "tiny_codes": (
        [
            {"prompt": "Loop in C.", "response": "for(;;);", "idx": 1},
            {"prompt": "Loop in Go.", "response": "for {}", "idx": 2},
        ],
        ["for(;;);", "for {}"],
        ["Loop in C.", "Loop in Go."],
    ),
    "stack_exchange": (
        [{"question": "Why?", "response": "Because."}, {"question": "How?", "response": "So."}],
        ["Because.", "So."],
        ["Why?", "How?"],
    ),
    "sql": (
        [
            {
                "context": "CREATE TABLE head (age INTEGER)",
                "question": "How many?",
                "answer": "SELECT COUNT(*) FROM head",
            },
            {"context": "CREATE TABLE t (a TEXT)", "question": "All.", "answer": "SELECT a FROM t"},
        ],
        ["SELECT COUNT(*) FROM head", "SELECT a FROM t"],
        ["CREATE TABLE head (age INTEGER)", "How many?", "CREATE TABLE t (a TEXT)"],
    ),
    "colors": (
        [
            {"description": "Sky Blue: a light blue", "color": "#87ceeb"},
            {"description": "Night: nearly black", "color": "#0c090a"},
        ],
        ["#87ceeb", "#0c090a"],
        ["a light blue", "nearly black"],
    ),
    "arxiv": (
        [
            {"id": "1", "abstract": "We pack.", "title": "Packing"},
            {"id": "2", "abstract": "We mask.", "title": "Masking"},
        ],
        ["Packing", "Masking"],
        ["We pack.", "We mask."],
    ),
    "crime_kg_assistant": (
        [{"input": "押金不退？", "output": "可以起诉。"}, {"input": "欠薪？", "output": "申请仲裁。"}],
        ["可以起诉。", "申请仲裁。"],
        ["押金不退？", "欠薪？"],
    ),
    "law_reference": (
        [
            {"question": "盗窃罪？", "answer": "依照刑法第二百六十四条。", "reference": ["刑法"]},
            {"question": "离婚？", "answer": "依照民法典。", "reference": []},
        ],
        ["依照刑法第二百六十四条。", "依照民法典。"],
        ["盗窃罪？", "离婚？"],
    ),
    "medical": (
        [
            {"instruction": "失眠怎么办？", "input": "", "output": "早睡。"},
            {"instruction": "发烧？", "input": "三天", "output": "就医。"},
        ],
        ["早睡。", "就医。"],
        ["失眠怎么办？", "发烧？\n三天"],
    ),
    "moss_003_sft": (
        [
            moss("北京下雨吗？", "查天气", 'Search("北京 天气")', "阵雨", "有小雨。"),
            moss("1+1?", "None", "None", "None", "2"),
        ],
        ["查天气", 'Search("北京 天气")', "有小雨。", "2"],
        ["You are an AI assistant.", "北京下雨吗？", "阵雨", "1+1?"],
    ),
    "msagent_react": (
        [agent("北京下雨吗？", f"{CALL}{RESULT}有小雨。"), agent("你好", "您好")],
        ["Action:weather", 'Action Input:{"city": "北京"}', "Final Answer:有小雨。", "Final Answer:您好"],
        ["北京下雨吗？", 'Response:{"rain": "小雨"}', "你好"],
    ),
}
TOKENIZER = tiny_tokenizer()
IDS = [TOKENIZER("The sea.").input_ids, TOKENIZER("上海").input_ids]
SAMPLES["tokenized"] = ([{"input_ids": IDS[0]}, {"input_ids": IDS[1]}], ["The sea.", "上海"], [])


def layouts() -> list[tuple[str, str, str]]:
    """(data set, format, file name) of every place of every data set."""
    found = []
    for key, entry in DATASETS.items():
        for place in entry.get("sources", [entry]):
            if isinstance(place, dict):  # else a key of this file, which comes by itself
                found.append((key, place["format"], Path(place["path"]).name))
    return found


def test_no_layout_is_left_out() -> None:
    assert {form for _, form, _ in layouts()} == set(SAMPLES)


@pytest.mark.parametrize(("key", "form", "file"), layouts(), ids=lambda value: str(value)[:30])
def test_two_records_of_it(key: str, form: str, file: str, tmp_path: Path, own_home: Path) -> None:
    records, trained, read = SAMPLES[form]
    columns = DATASETS[key].get("columns", [])
    if form == "tokenized" and columns:
        records = [{columns[0]: record["input_ids"]} for record in records]  # signed ids, or ids: all trained here
    assert all(set(columns) <= record.keys() for record in records), (
        "the sample is not in the layout that the file says"
    )
    path = tmp_path / (file if re.search(r"\.jsonl?$", file) else "train.jsonl")
    if path.suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    data = Recipe.load(f"internlm2_1_8b_lora_{key}_e1").data.model_copy(deep=True)
    data.sources = [
        source.model_copy(update={"path": str(path), "limit": None}) for source in data.sources if source.format == form
    ][:1]
    data.max_length = 4096
    prepared = prepare(data, TOKENIZER, seed=1, say=lambda line: None)
    learnt, whole = "", ""
    for number in range(len(prepared.packs)):
        for ids, labels in prepared.documents(number):
            learnt += TOKENIZER.decode([label for label in labels.tolist() if label != IGNORE])
            whole += TOKENIZER.decode(ids.tolist())
    for text in trained:
        assert text in learnt
    for text in read:
        assert text in whole
        assert text not in learnt
