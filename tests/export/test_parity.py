"""Parity: equal through every door, and where it is not, the first difference; and what servers read of a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from minituner.errors import UsageError
from minituner.export.merge import merge
from minituner.export.parity import parity
from minituner.export.serving import serving_problems
from minituner.train.hf_folder import export
from tests.export.test_merge import adapter_on, silent
from tests.tiny import tiny_folder, tiny_model, tiny_recipe, tiny_tokenizer
from tests.train.processes import run_command


def full_folder(base: Path, out: Path, template: str = "native", system: str | None = None) -> Path:
    """What a full fine-tuning under this template writes."""
    recipe = tiny_recipe(
        base, base / "no.jsonl", method={"name": "full"}, data={"template": template, "system": system}
    )
    return export(tiny_model(), tiny_tokenizer(), out, recipe)


@pytest.mark.parametrize("template", ["native", "qwen_chat", "chatglm2", "llama2_chat"])
def test_every_door_gives_the_same_ids_and_stops_there(template: str, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    hf = full_folder(base, tmp_path / "hf", template, "你是一个助手。")
    again = shutil.copytree(hf, tmp_path / "again")
    found = parity(hf, [again])
    assert found.equal
    assert [door.name for door in found.doors][:3] == ["training", "chat and web", "saved chat template"]
    assert [door.stops for door in found.doors if door.stops is not None] == [True, True]
    text = tiny_tokenizer().decode(found.doors[0].ids)
    assert all(part in text for part in ("你是一个助手。", "Who are you?", "再快一点"))
    lines = "\n".join(found.lines())
    assert lines.count(": equal") + lines.count("  equal") == len(found.doors) - 1
    assert parity(tmp_path).equal, "a run's folder: its hf/"


@pytest.mark.slow
def test_the_first_difference_is_shown(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    hf = full_folder(base, tmp_path / "hf", "qwen_chat")
    broken = shutil.copytree(hf, tmp_path / "broken")
    file = broken / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>assistant", "<|im_start|>Assistant"))
    settings = json.loads((broken / "generation_config.json").read_text())
    (broken / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 5}))
    found = parity(hf, [broken])
    assert not found.equal
    bad = found.doors[-1]
    at = next(i for i, (a, b) in enumerate(zip(found.doors[0].ids, bad.ids, strict=True)) if a != b)
    line = found.lines()[-1]
    assert f"from token {at} on: {ord('A')}:'A'" in line.replace(str(bad.ids[at]), str(ord("A")))
    assert "DOES NOT stop on '<|im_end|>' (258)" in line
    status, output = run_command(["parity", "hf", "broken"], tmp_path)
    assert status == 1
    assert "DIFFERENT" in output
    status, output = run_command(["parity", "hf", "--json"], tmp_path)
    assert status == 0, output
    assert json.loads(output)["equal"] is True


def test_an_adapter_and_its_merged_folder_are_at_parity(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "hf")
    merged = merge(adapter, tmp_path / "merged", say=silent)
    found = parity(adapter, [merged])
    assert found.equal
    assert found.doors[-1].stops is True
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (merged / name).unlink()
    with pytest.raises(UsageError, match="has no tokenizer"):
        parity(adapter, [merged])


def test_servers_find_what_they_read(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "hf")
    merged = merge(adapter, tmp_path / "merged", say=silent)
    assert serving_problems(merged) == []
    assert serving_problems(full_folder(base, tmp_path / "full", "qwen_chat")) == []


BREAKS = {
    "no architectures": ("config.json", {"architectures": None}, "names no architectures"),
    "quantised": ("config.json", {"quantization_config": {"quant_method": "x"}}, "quantised weights"),
    "own code": ("config.json", {"model_type": "mine"}, "does not know"),
    "stops elsewhere": ("generation_config.json", {"eos_token_id": 7}, "training ended them with 258"),
    "no settings": ("generation_config.json", None, "no generation_config.json"),
    "no template": ("chat_template.jinja", None, "no chat template"),
    "no fast tokenizer": ("tokenizer.json", None, "tokenizer"),
    "no weights": ("model.safetensors", None, "no model weights"),
}


@pytest.mark.parametrize(("name", "changes", "words"), BREAKS.values(), ids=BREAKS.keys())
def test_what_servers_would_miss_is_named(name: str, changes: dict | None, words: str, tmp_path: Path) -> None:
    folder = full_folder(tiny_folder(tmp_path / "base"), tmp_path / "full")
    if changes is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))
    problems = serving_problems(folder)
    assert any(words in problem for problem in problems), problems
