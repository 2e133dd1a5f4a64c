"""Models that have learned one answer by heart, for chat in all its forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minituner.train.loop import train
from tests.tiny import tiny_folder, tiny_recipe

QUESTION, ANSWER = "你是谁？", "我是小图，你的助手！😀"
OTHER_ANSWER = "Nobody."


def memorised(place: Path, model: Path, name: str, template: str, answer: str = ANSWER) -> Path:
    """The `hf/` folder of a model that has learned one answer by heart."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    data = place / f"{name}.jsonl"
    data.write_text(json.dumps({"messages": turns}, ensure_ascii=False) + "\n", encoding="utf-8")
    recipe = tiny_recipe(
        model,
        data,
        method={"name": "lora", "lora_rank": 16, "lora_alpha": 32},
        data={"template": template, "max_length": 512},
        train={"max_steps": 120, "gradient_accumulation_steps": 1, "learning_rate": 1e-2},
        evaluate={"prompts": []},
    )
    return train(recipe, place / name, say=lambda line: None).hf


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> hf folder: three adapters of one base, and the base.

    `internlm_chat` ends its answers with a text of several tokens here, `native` with one; `other` says OTHER_ANSWER.
    """
    place = tmp_path_factory.mktemp("chat")
    base = tiny_folder(place / "base")
    folders = {name: memorised(place, base, name, name) for name in ("native", "internlm_chat")}
    folders["other"] = memorised(place, base, "other", "native", OTHER_ANSWER)
    return {"base": base, **folders}
