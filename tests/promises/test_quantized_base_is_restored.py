"""The quantised base == itself, bit for bit, after training: bytes, scales and logits.

A frozen base that moves, however little, makes an adapter that fits nothing anybody else can load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minituner.model.fingerprint import fingerprint
from minituner.model.loading import load_model
from minituner.recipe import MethodSection, ModelSection
from minituner.train.loop import train
from tests.tiny import tiny_recipe, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_home")

IDS = torch.tensor([tiny_tokenizer().encode("Who are you? 你好")])
METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"name": "qlora"},
    "qlora, dora": {"name": "qlora", "use_dora": True},
    "int8_lora": {"name": "int8_lora"},
}


def quantized(folder: Path, method: str) -> Any:
    section = ModelSection(name_or_path=str(folder), dtype="float32", attention="sdpa")
    return load_model(folder, section, MethodSection(name=method), one_document_rows=True, device="cpu")[0].eval()


def numbers(model: Any) -> dict[str, torch.Tensor]:
    """Every number of the base: integers, the scales they are multiplied by, and what is not quantised."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            found |= {f"{name}.absmax": state.absmax.clone(), f"{name}.absmax2": state.state2.absmax.clone()}
            found |= {f"{name}.offset": torch.as_tensor(state.offset).clone(), f"{name}.code": state.code.clone()}
        scales = getattr(getattr(module, "state", None), "SCB", None)
        if scales is not None:
            found[f"{name}.SCB"] = scales.clone()
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS.keys())
def test_training_leaves_the_quantised_base_as_it_was(
    settings: dict[str, Any], model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    fresh = quantized(model_folder, settings["name"])
    before = logits(fresh)  # the first call moves 8-bit scales to where they stay
    result = train(
        tiny_recipe(model_folder, chats, method=settings, train={"max_steps": 4}),
        tmp_path / "w",
        say=lambda line: None,
    )
    result.model.set_attn_implementation("sdpa")
    trained = logits(result.model)
    assert float((trained - before).abs().max()) > 1e-2, "the adapter learned something"
    with result.model.disable_adapter():
        assert torch.equal(logits(result.model), before), "adapter off: the very same logits"
    base = result.model.unload()
    now, then = numbers(base), numbers(fresh)
    assert now.keys() == then.keys()
    assert all(torch.equal(now[name], then[name]) for name in then)
    assert any(t.dtype in (torch.uint8, torch.int8) for t in now.values())
    assert torch.equal(logits(base), before)
    assert fingerprint(base) == fingerprint(fresh)
    assert fingerprint(base).startswith("4bit:" if settings["name"] == "qlora" else "8bit:")


def test_one_changed_byte_would_be_noticed(model_folder: Path) -> None:
    base = quantized(model_folder, "qlora")
    mark, before, then = fingerprint(base), logits(base), numbers(base)
    base.model.layers[0].mlp.up_proj.weight.data[0] ^= 0xFF
    now = numbers(base)
    assert not all(torch.equal(now[name], then[name]) for name in then)
    assert not torch.equal(logits(base), before)
    assert fingerprint(base) != mark
