"""to-hf == the hf/ folder that training wrote, for every method and every ZeRO stage; wrong input leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minituner.errors import MinitunerError, UsageError
from minituner.export.to_hf import to_hf
from minituner.train.loop import train
from tests.export.test_merge import IDS, logits, silent
from tests.tiny import tiny_folder, tiny_recipe
from tests.train.processes import Process, run_command
from tests.train.zero_ranks import run_all

pytestmark = [
    pytest.mark.usefixtures("own_home"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]

METHODS: dict[str, tuple[bool, dict[str, Any]]] = {
    "lora": (True, {}),
    "dora, rslora": (False, {"use_dora": True, "use_rslora": True}),
    "pissa": (True, {"init_lora_weights": "pissa"}),
    "tied embedding in full": (True, {"modules_to_save": ["embed_tokens"]}),
    "head and norms in full": (False, {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "head adapted": (False, {"target_modules": ["lm_head", "q_proj"]}),
    "qlora": (True, {"name": "qlora"}),
    "full, tied": (True, {"name": "full"}),
    "full, untied": (False, {"name": "full"}),
}


def trained(tmp_path: Path, chats: Path, tie: bool = True, method: dict[str, Any] | None = None, **more: Any) -> Path:
    base = tiny_folder(tmp_path / "base", tie=tie)
    recipe = tiny_recipe(base, chats, method=method or {}, train={"max_steps": 2}, **more)
    train(recipe, tmp_path / "run", progress=False, say=silent)
    return tmp_path / "run"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("tie", "method"), METHODS.values(), ids=METHODS.keys())
def test_a_checkpoint_becomes_the_folder_that_training_wrote(
    tie: bool, method: dict[str, Any], tmp_path: Path, chats: Path
) -> None:
    run = trained(tmp_path, chats, tie, method)
    out = to_hf(run, tmp_path / "out", say=silent)
    ours, theirs = tensors(out), tensors(run / "hf")
    assert_same(ours, {name: t for name, t in theirs.items() if ".base_layer." not in name})
    facts, wanted = (json.loads((place / "minituner.json").read_text()) for place in (out, run / "hf"))
    mark = wanted.pop("base_fingerprint")
    assert facts.pop("base_fingerprint") == (mark if method.get("name") != "full" else None)
    assert facts == wanted
    settings = "config.json" if method.get("name") == "full" else "adapter_config.json"
    one, other = (json.loads((place / settings).read_text()) for place in (out, run / "hf"))
    if method.get("name") == "full":
        assert one["dtype"] == other["dtype"] == "float32"
        names = {path.name for path in out.iterdir()}
        assert names == {path.name for path in (run / "hf").iterdir()}
    else:
        differ = {key for key in one if one[key] != other.get(key)}
        assert differ <= {"base_model_name_or_path"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_checkpoint_of_two_ranks_under_zero_is_the_same_folder(stage: str, tmp_path: Path, chats: Path) -> None:
    pytest.importorskip("deepspeed")
    base = tiny_folder(tmp_path / "base")
    recipes = {
        name: tiny_recipe(base, chats, method={"name": "full"}, train={"max_steps": 2}, distributed={"zero": zero})
        for name, zero in (("plain", None), ("zero", stage))
    }
    statuses, output = run_all(recipes, tmp_path)
    assert statuses == [0, 0], output
    plain = tensors(to_hf(tmp_path / "plain", tmp_path / "out-plain", say=silent))
    zero = tensors(to_hf(tmp_path / "zero", tmp_path / "out-zero", say=silent))
    assert_same(zero, tensors(tmp_path / "zero" / "hf"))
    assert plain.keys() == zero.keys()
    for name, tensor in plain.items():
        # The root mean square: AdamW moves a number whose gradient is rounding alone by its whole rate, either way, and
        # under stage 3 layers are not fused, which rounds otherwise.
        assert float((tensor - zero[name]).square().mean().sqrt()) <= 1e-5 * float(tensor.abs().max()), name


def in_a_fresh_process(folder: str, out: str) -> None:
    """Transformers alone: greedy tokens of the exported folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(IDS, max_new_tokens=12, do_sample=False)[0].tolist()
    Path(out).write_text(json.dumps(tokens))


@pytest.mark.slow
def test_reloaded_in_a_fresh_process_it_says_the_same(tmp_path: Path, chats: Path) -> None:
    run = trained(tmp_path, chats, method={"name": "full"})
    out = to_hf(run, tmp_path / "out", max_shard_size="20KB", say=silent)
    assert len(list(out.glob("*.safetensors"))) > 2
    found = tmp_path / "tokens.json"
    process = Process(in_a_fresh_process, str(out), str(found), cwd=tmp_path)
    assert process.finish() == 0, process.output
    from transformers import AutoModelForCausalLM

    here = AutoModelForCausalLM.from_pretrained(run / "hf")
    assert json.loads(found.read_text()) == here.generate(IDS, max_new_tokens=12, do_sample=False)[0].tolist()
    assert float((logits(here) - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))).abs().max()) > 1e-3


def test_another_data_type_and_a_named_template(tmp_path: Path, chats: Path) -> None:
    from transformers import AutoTokenizer

    run = trained(tmp_path, chats, method={"name": "full"}, data={"template": "qwen_chat", "system": "Be kind."})
    out = to_hf(run / "checkpoints" / "step-000002", tmp_path / "out", dtype="bf16", say=silent)
    assert {t.dtype for t in tensors(out).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for folder in (out, run / "hf"):
        asked = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
        )
        assert asked == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [258, 256]
        card = (folder / "README.md").read_text()
        assert "| optimizer steps | 2 |" in card
        assert "data fingerprint" in card
        assert '"Be kind."' in card
        assert "learning_rate:" in card
    before = (out / "config.json").stat().st_mtime_ns
    with pytest.raises(UsageError, match="not empty"):
        to_hf(run, out, say=silent)
    assert (out / "config.json").stat().st_mtime_ns == before


def test_what_is_no_whole_checkpoint_or_another_recipe_is_refused(tmp_path: Path, chats: Path) -> None:
    run, out = trained(tmp_path, chats), tmp_path / "out"
    other = tiny_recipe(tmp_path / "base", chats, method={"lora_rank": 2})
    other.dump(tmp_path / "other.yaml")
    with pytest.raises(UsageError, match="not the recipe") as error:
        to_hf(run, out, config=tmp_path / "other.yaml", say=silent)
    assert "method.lora_rank is 2, in the checkpoint 4" in error.value.text()
    with pytest.raises(UsageError, match="holds no checkpoint"):
        to_hf(tmp_path / "base", out, say=silent)
    with pytest.raises(UsageError, match="no folder"):
        to_hf(tmp_path / "nothing", out, say=silent)
    (tmp_path / "ds" / "global_step1").mkdir(parents=True)
    (tmp_path / "ds" / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="DeepSpeed itself"):
        to_hf(tmp_path / "ds", out, say=silent)
    step = run / "checkpoints" / "step-000002"
    base = tmp_path / "base"
    shutil.copytree(base, tmp_path / "away")
    shutil.rmtree(base)
    tiny_folder(base, layers=3)
    with pytest.raises(MinitunerError, match="not those of this base"):
        to_hf(run, out, say=silent)
    whole = (step / "model.safetensors").read_bytes()
    (step / "model.safetensors").write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(UsageError, match="not a whole checkpoint"):
        to_hf(step, out, say=silent)
    (step / "manifest.json").unlink()
    with pytest.raises(UsageError, match="no whole checkpoint") as error:
        to_hf(run, out, say=silent)
    assert "--resume out" not in error.value.text(), "nobody has asked to resume here"
    assert not [path for path in os.listdir(tmp_path) if "out" in path]


@pytest.mark.slow
def test_the_command_takes_xtuners_order_too(tmp_path: Path, chats: Path) -> None:
    run = trained(tmp_path, chats)
    status, output = run_command(["convert", "pth_to_hf", str(run / "recipe.yaml"), "run", "a"], tmp_path)
    assert status == 0, output
    assert_same(tensors(tmp_path / "a"), tensors(run / "hf"))
    status, output = run_command(["convert", "pth_to_hf", "internlm2_chat_7b_qlora_e3.py", "run", "b"], tmp_path)
    assert status == 2
    assert "to-hf" in output
