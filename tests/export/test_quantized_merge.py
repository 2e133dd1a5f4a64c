"""An adapter over a quantised base: merged into what it saw it says the same; elsewhere, how far off is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minituner.errors import MinitunerError, UsageError
from minituner.export.divergence import Divergence, mean_kl
from minituner.export.merge import merge
from minituner.model.adapters import apply_method
from minituner.model.fingerprint import fingerprint
from minituner.model.loading import load_model
from minituner.recipe import MethodSection, ModelSection
from minituner.train.hf_folder import export
from tests.export.test_merge import adapter_on, logits, silent
from tests.tiny import tiny_folder, tiny_recipe, tiny_tokenizer

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"name": "qlora"},
    "qlora, rslora, dora": {"name": "qlora", "use_rslora": True, "use_dora": True},
    "int8_lora": {"name": "int8_lora"},
}


def quantized(base: Path, method: str) -> Any:
    section = ModelSection(name_or_path=str(base), dtype="float32", attention="sdpa")
    return load_model(base, section, MethodSection(name=method), one_document_rows=True, device="cpu")[0]


def quantized_adapter(base: Path, out: Path, size: float = 0.2, **method: Any) -> tuple[Path, torch.Tensor]:
    """An adapter over the quantised base with random B of this size, and the logits that it gives there."""
    recipe = tiny_recipe(base, base / "none.jsonl", method=method, evaluate={"prompts": ["你好", "Who are you?"]})
    model = quantized(base, recipe.method.name)
    mark = fingerprint(model)
    torch.manual_seed(3)
    model = apply_method(model, recipe.method)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=size)
    wanted = logits(model)
    return export(model, tiny_tokenizer(), out, recipe, mark), wanted


def reloaded(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_both_ways_equal_the_adapter_on_that_base(method: dict[str, Any], tie: bool, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_folder(tmp_path / "base", tie=tie)
    adapter, wanted = quantized_adapter(base, tmp_path / "hf", **method)
    scale = float(wanted.abs().max())
    said: list[str] = []
    out = merge(adapter, tmp_path / "as trained", into="dequantized", say=said.append)
    assert torch.allclose(reloaded(out), wanted, rtol=0, atol=1e-5 * scale)
    facts = json.loads((out / "minituner.json").read_text())["merged"]
    assert facts["base"] == "dequantized"
    assert facts["kl"] < 1e-6 < 1e-3 < facts["effect"]
    assert any(line.startswith("KL(merged") and "ratio" in line for line in said)
    assert not any("careful" in line for line in said)

    full = merge(adapter, tmp_path / "full", force_merge=True, say=silent)
    on_full = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    assert torch.allclose(reloaded(full), on_full, rtol=0, atol=1e-5 * scale)
    other = json.loads((full / "minituner.json").read_text())["merged"]
    assert other["effect"] == pytest.approx(facts["effect"], rel=1e-3)
    assert other["kl"] > 10 * facts["kl"], "the rounding of the base is in it"
    assert "KL of the merge" in (full / "README.md").read_text()


def test_a_merge_that_undoes_the_training_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    """A small adapter: what 4 bits round away is larger than what was learned."""
    base = tiny_folder(tmp_path / "base")
    adapter, _ = quantized_adapter(base, tmp_path / "hf", size=0.002, name="qlora")
    out = tmp_path / "merged"
    with pytest.raises(MinitunerError, match="undoes too much of the training") as error:
        merge(adapter, out, say=silent)
    assert "--base dequantized" in error.value.text()
    assert "--force-merge" in error.value.text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "hf"]
    merge(adapter, out, force_merge=True, say=silent)
    facts = json.loads((out / "minituner.json").read_text())["merged"]
    assert facts["kl"] > 0.2 * facts["effect"]
    merge(adapter, out, into="dequantized", force=True, say=silent)
    assert json.loads((out / "minituner.json").read_text())["merged"]["base"] == "dequantized"


@pytest.mark.parametrize("into", ["full", "dequantized"])
def test_another_base_than_that_of_a_quantised_training_is_refused(into: Any, tmp_path: Path) -> None:
    """Its fingerprint is of the quantised weights, so it is asked where those are in memory anyway."""
    base = tiny_folder(tmp_path / "base")
    other = tiny_folder(tmp_path / "other", seed=1)
    adapter, _ = quantized_adapter(base, tmp_path / "hf", name="qlora")
    with pytest.raises(UsageError, match="other weights than this one"):
        merge(adapter, tmp_path / "m", base=other, into=into, say=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "hf", "other"]
    said: list[str] = []
    merge(adapter, tmp_path / "m", base=other, into=into, force_merge=True, say=said.append)
    assert sum("other weights" in line for line in said) == 1


def test_the_dequantised_base_is_only_for_quantised_trainings(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    with pytest.raises(UsageError, match="not trained over a quantised base"):
        merge(adapter_on(base, tmp_path / "hf"), tmp_path / "m", into="dequantized", say=silent)


def test_kl_is_the_textbook_sum() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    by_hand = 0.5 * torch.log(p[0, 0] / q[0, 0]) + 0.5 * torch.log(p[0, 1] / q[0, 1])
    assert mean_kl(p.log(), q.log()) == pytest.approx(float(by_hand))
    assert mean_kl(p.log(), p.log() + 7) == pytest.approx(0, abs=1e-12)
    assert Divergence(0.3, 1.0, 1).too_large
    assert not Divergence(0.1, 1.0, 1).too_large
    assert Divergence(1e-9, 0.0, 1).too_large, "an adapter without effect is overlaid by anything"
    assert not Divergence(0.0, 0.0, 1).too_large
