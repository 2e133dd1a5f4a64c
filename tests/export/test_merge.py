"""Merged == adapter on that same base, tied and untied; what cannot be merged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minituner import chat
from minituner.errors import MinitunerError, UsageError
from minituner.export.merge import merge
from minituner.model.adapters import ON_ATTENTION
from minituner.train.hf_folder import export
from tests.tiny import tiny_folder, tiny_recipe, tiny_tokenizer
from tests.train.processes import run_command

IDS = torch.tensor([tiny_tokenizer().encode("Who are you? 你好，请介绍你自己。")])
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
    "head in full": {"modules_to_save": ["lm_head"]},
}
# A tied head is no layer of its own; what is done about it is tested below.
CASES = [(name, tie) for name in SETTINGS for tie in (True, False) if not (tie and name == "head in full")]


def silent(line: str) -> None:
    """Say nothing."""


def adapter_on(base: Path, out: Path, dtype: torch.dtype = torch.float32, **method: Any) -> Path:
    """An adapter folder whose matrices are random, so that it changes the answers a lot, without a training."""
    from transformers import AutoModelForCausalLM

    from minituner.model.adapters import apply_method
    from minituner.model.fingerprint import fingerprint

    recipe = tiny_recipe(base, base / "none.jsonl", method=method, data={"system": "Be kind."})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    mark = fingerprint(model)
    torch.manual_seed(3)
    model = apply_method(model, recipe.method)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.requires_grad and "lora" not in name:
            parameter.data.mul_(1.1)
    return export(model, tiny_tokenizer(), out, recipe, mark)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize(("name", "tie"), CASES, ids=[f"{n}, {'tied' if tie else 'untied'}" for n, tie in CASES])
def test_merged_saved_and_reloaded_equals_the_adapter(name: str, tie: bool, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_folder(tmp_path / "base", tie=tie)
    adapter = adapter_on(base, tmp_path / "hf", **SETTINGS[name])
    said: list[str] = []
    out = merge(adapter, tmp_path / "merged", say=said.append)
    assert any("is a full model now" in line for line in said)
    assert not any("careful" in line for line in said)

    untouched = AutoModelForCausalLM.from_pretrained(base)
    before = logits(untouched)
    wanted = logits(PeftModel.from_pretrained(untouched, adapter))
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert float((wanted - before).abs().max()) > 0.1, "the adapter matters"
    assert torch.allclose(logits(merged), wanted, atol=1e-5 * float(wanted.abs().max()))
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tie
    assert not (out / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny_tokenizer().chat_template
    assert json.loads((out / "minituner.json").read_text())["system"] == "Be kind."
    options = {"max_new_tokens": 8, "say": silent, "dtype": "float32"}
    assert chat(out, "你好", **options) == chat(adapter, "你好", **options)


def test_it_is_saved_in_the_data_type_of_the_base(tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    base = tiny_folder(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = adapter_on(base, tmp_path / "hf", dtype=torch.bfloat16)
    out = merge(adapter, tmp_path / "merged", say=silent)
    with safe_open(out / "model.safetensors", "pt") as file:
        kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert kinds == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_on_a_tied_head_unties_it(tmp_path: Path) -> None:
    """B A added to a tied head would change the embedding as well, so the merged model has two tensors."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_folder(tmp_path / "base", tie=True)
    adapter = adapter_on(base, tmp_path / "hf", target_modules=["lm_head", "q_proj"])
    said: list[str] = []
    out = merge(adapter, tmp_path / "merged", say=said.append)
    assert any("they are two from here on" in line for line in said)
    wanted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert torch.allclose(logits(merged), wanted, atol=1e-5 * float(wanted.abs().max()))


def test_what_is_no_adapter_or_already_there_is_refused(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "hf")
    with pytest.raises(UsageError, match="not an adapter folder"):
        merge(base, tmp_path / "merged", say=silent)
    with pytest.raises(UsageError, match="not an adapter folder"):
        merge(tmp_path / "nothing", tmp_path / "merged", say=silent)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="exists and is not empty"):
        merge(adapter, out, say=silent)
    with pytest.raises(UsageError, match="is a file"):
        merge(adapter, out / "mine.txt", say=silent)
    assert (out / "mine.txt").read_text() == "keep me"
    merge(adapter, out, force=True, say=silent)
    assert (out / "model.safetensors").is_file()
    assert not (out / "mine.txt").exists()


def test_another_base_is_refused_by_shape_and_by_weights(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "hf")
    for layers in (1, 4):
        with pytest.raises(UsageError, match="does not fit this model"):
            merge(adapter, tmp_path / "m", base=tiny_folder(tmp_path / f"b{layers}", layers=layers), say=silent)
    other = tiny_folder(tmp_path / "seed", seed=9)
    with pytest.raises(UsageError, match="other weights"):
        merge(adapter, tmp_path / "m", base=other, say=silent)
    assert not (tmp_path / "m").exists()
    said: list[str] = []
    merge(adapter, tmp_path / "m", base=other, force_merge=True, say=said.append)
    assert any("careful" in line and "other weights" in line for line in said)


def test_a_base_whose_files_leave_the_prefix_out(tmp_path: Path) -> None:
    """`layers.0...` instead of `model.layers.0...`, as a model without its head is saved; transformers loads both."""
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    base = tiny_folder(tmp_path / "base", tie=True)
    adapter = adapter_on(base, tmp_path / "hf")
    wanted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    file = base / "model.safetensors"
    save_file({n.removeprefix("model."): t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    out = merge(adapter, tmp_path / "merged", say=silent)
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(out)), wanted, atol=1e-5 * float(wanted.abs().max())
    )


@pytest.mark.parametrize(("targets", "in_memory"), [("all-linear", True), (ON_ATTENTION, False)])
def test_what_cannot_be_merged_file_by_file_is_merged_in_memory(targets: str, in_memory: bool, tmp_path: Path) -> None:
    """Mixtral: experts are one file tensor each, and one tensor for all in memory, which the adapter may change."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    base = tiny_folder(tmp_path / "base")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    MixtralForCausalLM(MixtralConfig(vocab_size=259, **sizes, **heads)).save_pretrained(base)
    adapter = adapter_on(base, tmp_path / "hf", target_modules=targets)
    said: list[str] = []
    out = merge(adapter, tmp_path / "merged", say=said.append)
    assert any("merged in memory instead" in line for line in said) == in_memory
    untouched = AutoModelForCausalLM.from_pretrained(base)
    before = logits(untouched)
    wanted = logits(PeftModel.from_pretrained(untouched, adapter))
    assert float((wanted - before).abs().max()) > 1e-2
    found = logits(AutoModelForCausalLM.from_pretrained(out))
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_a_base_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tiny_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "hf")
    file = base / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "0.mlp.up" not in n}, file, metadata={"format": "pt"})
    with pytest.raises(MinitunerError, match="lacks 1 weights of its model"):
        merge(adapter, tmp_path / "merged", say=silent)
    assert not (tmp_path / "merged").exists()


def test_a_merged_layer_that_differs_from_the_adapter_stops_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora.layer import Linear

    base = tiny_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "hf")
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, name: 1.01 * right(layer, name))
    with pytest.raises(MinitunerError, match="merged differs from the adapter"):
        merge(adapter, tmp_path / "merged", say=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "hf"]


def test_an_unknown_template_is_refused(tmp_path: Path) -> None:
    adapter = adapter_on(tiny_folder(tmp_path / "base"), tmp_path / "hf")
    facts = json.loads((adapter / "minituner.json").read_text())
    (adapter / "minituner.json").write_text(json.dumps({**facts, "template": "qwen_chta"}))
    with pytest.raises(UsageError, match="qwen_chta"):
        merge(adapter, tmp_path / "merged", say=silent)


@pytest.mark.slow
def test_the_command_merges_and_its_errors_are_exit_2(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter_on(base, tmp_path / "hf")
    status, output = run_command(["convert", "merge", "hf", "merged"], tmp_path)
    assert status == 0, output
    assert "merged is a full model now" in output
    status, output = run_command(["convert", "merge", "hf", "merged"], tmp_path)
    assert status == 2
    assert "--force" in output
    status, output = run_command(["convert", "merge", "base", "elsewhere"], tmp_path)
    assert status == 2
    assert "not an adapter folder" in output


def test_the_command_s_orders_and_both_meanings_of_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from minituner.cli import app

    calls: list[tuple[str, str, str | None, str]] = []

    def noted(adapter: Path, out: Path, *, base: str | None, into: str, **_: Any) -> None:
        calls.append((str(adapter), str(out), base, into))

    monkeypatch.setattr("minituner.export.merge.merge", noted)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["convert", "merge", *arguments])

    for arguments in (
        ["a", "o"],
        ["b", "a", "o"],
        ["a", "o", "--base", "b"],
        ["a", "o", "--base", "dequantized"],
        ["b", "a", "o", "--base", "full"],
        ["a", "o", "--base", "./full"],
    ):
        assert run(*arguments).exit_code == 0
    assert calls == [
        ("a", "o", None, "full"),
        ("a", "o", "b", "full"),
        ("a", "o", "b", "full"),
        ("a", "o", None, "dequantized"),
        ("a", "o", "b", "full"),
        ("a", "o", "./full", "full"),
    ]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for wrong, words in (
        (["o"], "two or three folders, not 1"),
        (["b", "a", "o", "--base", "other"], "named twice"),
        (["adapter", "b", "o"], "is an adapter, not a base"),
    ):
        result = run(*wrong)
        assert isinstance(result.exception, UsageError)
        assert words in str(result.exception)
    assert len(calls) == 6
