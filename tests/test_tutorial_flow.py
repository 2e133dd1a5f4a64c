"""The ancestor's tutorial, command for command: `internlm2_1_8b_qlora_alpaca_e3` over a tiny random model.

list-cfg, copy-cfg, edit by key.path=value, estimate, check, train, resume, convert, merge, chat: each as its own
process in an empty folder, as somebody who follows the page would type them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import tiny_folder
from tests.train.processes import run_command

NAME = "internlm2_1_8b_qlora_alpaca_e3"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a tiny model where the tutorial has the downloaded one, and a few alpaca records."""
    tiny_folder(tmp_path / "internlm2-1_8b")
    rows = [
        {"instruction": f"Count to {n}.", "input": "" if n % 2 else "in words", "output": " ".join(map(str, range(n)))}
        for n in range(1, 13)
    ]
    rows.append({"instruction": "用一句话介绍杭州。", "input": "", "output": "杭州以西湖闻名。"})
    (tmp_path / "alpaca.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_the_tutorial_from_list_cfg_to_chat(place: Path) -> None:
    pytest.importorskip("bitsandbytes")
    copied = f"{NAME}_copy.yaml"
    own = ["model.name_or_path=internlm2-1_8b", "data.sources.0.path=alpaca.json", "data.max_length=256"]
    own += ["train.gradient_accumulation_steps=2", "train.activation_checkpointing=false", "evaluate.max_new_tokens=4"]
    own += ["model.dtype=float32"]  # four tiny steps are less than bfloat16's rounding, which merging would refuse
    adapter = f"work_dirs/{NAME}/hf"
    steps = {
        "list": (["list-cfg", "-p", "internlm2_1_8b_qlora_alpaca"], [NAME]),
        "copy": (["copy-cfg", NAME, "."], [copied]),
        "estimate": (["estimate", copied, *own], ["are trained", "fits"]),
        "check": (["check", copied, *own], ["13"]),
        "train": (["train", copied, *own, "train.max_steps=2"], ["step 2/2", "qlora"]),
        "resume": (["train", copied, *own, "train.max_steps=4", "--resume", "auto"], ["step 4/4"]),
        "export": (["convert", "pth_to_hf", f"work_dirs/{NAME}/recipe.yaml", f"work_dirs/{NAME}", "exported"], []),
        "merge": (["convert", "merge", "internlm2-1_8b", adapter, "merged", "--base", "dequantized"], []),
        "chat": (["chat", "merged", "--prompt", "你好", "--max-new-tokens", "4"], []),
    }
    for step, (arguments, said) in steps.items():
        status, output = run_command(arguments, place)
        assert status == 0, f"{step}: {output}"
        for text in said:
            assert text in output, f"{step}: {output}"
        assert "Traceback" not in output
    assert (place / adapter / "adapter_model.safetensors").is_file()
    assert (place / "merged" / "model.safetensors").is_file()
    assert (place / "exported" / "adapter_config.json").is_file()
