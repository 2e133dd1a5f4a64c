"""Loading: what is quantised, what it weighs, and that a quantised layer is one function, with its gradient."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from minituner.errors import MinitunerError, UsageError
from minituner.model import attention, loading
from minituner.model.fingerprint import comparable, fingerprint
from minituner.model.loading import load_model, load_tokenizer, resolve_dtype
from minituner.model.quantized import parameter_bytes
from minituner.recipe import MethodSection, ModelSection
from tests.tiny import tiny_folder

QUANTIZED = ("qlora", "int8_lora")
IDS = torch.arange(40)[None] % 256


def load(folder: Path, method: str = "lora", dtype: str = "float32", **options: Any) -> Any:
    section = ModelSection(name_or_path=str(folder), dtype=dtype, attention="sdpa")
    return load_model(folder, section, MethodSection(name=method), one_document_rows=True, device="cpu", **options)[0]


def whole_weight(layer: Any) -> torch.Tensor:
    """The matrix a quantised layer stands for, (out, in) float32."""
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    return layer.weight.data.float() * scales[:, None] / 127


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux says what is mapped into memory")
@pytest.mark.parametrize("method", QUANTIZED)
def test_the_file_of_a_quantised_model_leaves_the_memory(method: str, tmp_path: Path) -> None:
    """Not quantised, the weights are the file itself; beside their 4 bits it would be in memory a second time."""
    folder = tiny_folder(tmp_path / "m")

    def mapped() -> bool:
        return str(folder / "model.safetensors") in Path("/proc/self/maps").read_text(encoding="utf-8")

    plain = load(folder, "lora")
    assert mapped(), "otherwise this shows nothing"
    del plain
    gc.collect()
    assert not mapped()
    model = load(folder, method)
    gc.collect()
    assert not mapped()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", QUANTIZED)
def test_the_decoder_s_linear_layers_are_quantised_and_nothing_else(method: str, tie: bool, tmp_path: Path) -> None:
    model = load(tiny_folder(tmp_path / "m", tie=tie), method)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    integers = torch.uint8 if method == "qlora" else torch.int8
    for name, dtype in kinds.items():
        inside = "layers" in name and "norm" not in name
        assert dtype == (integers if inside else torch.float32), name
    assert sum(dtype == integers for dtype in kinds.values()) == 14
    assert type(model.lm_head) is torch.nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


def test_bytes_are_what_the_formulas_say(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    plain, four, eight = (load(folder, method) for method in ("lora", "qlora", "int8_lora"))
    rest = 4 * (259 * 32 + 5 * 32)  # embedding (tied with the head) and norms
    matrices = [m.weight for m in plain.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    count, rows = sum(w.numel() for w in matrices), sum(w.shape[0] for w in matrices)
    assert parameter_bytes(plain) == rest + 4 * count
    assert parameter_bytes(eight) == rest + count + 4 * rows, "one float32 scale a row"
    scales_of_scales = 4 * sum(-(-w.numel() // (64 * 256)) for w in matrices)
    assert parameter_bytes(four) == rest + count // 2 + count // 64 + scales_of_scales
    assert (parameter_bytes(four) - rest) / (parameter_bytes(plain) - rest) < 0.14


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("method", QUANTIZED)
def test_a_quantised_layer_is_exactly_its_whole_weight_forward_and_backward(
    method: str, train: bool, model_folder: Path
) -> None:
    model = load(model_folder, method).train(train)
    exact = load(model_folder)
    for layer, original in zip(model.model.layers.modules(), exact.model.layers.modules(), strict=True):
        if not isinstance(layer, torch.nn.Linear):
            continue
        x = torch.randn(2, 5, layer.in_features).requires_grad_()
        x.data[0, 0, 3] = 300.0  # an outlier, which LLM.int8 would treat apart
        out = layer(x)
        weight = whole_weight(layer)
        upstream = torch.randn_like(out)
        out.backward(upstream)
        assert torch.allclose(out, x @ weight.T, rtol=1e-5, atol=2e-4)
        assert torch.allclose(x.grad, upstream @ weight, rtol=1e-5, atol=1e-4)
        error = (weight - original.weight).norm() / original.weight.norm()
        assert error < (0.12 if method == "qlora" else 0.01)


@pytest.mark.parametrize("method", QUANTIZED)
def test_training_and_evaluation_are_one_function_and_documents_stay_apart(method: str, model_folder: Path) -> None:
    attention.register()
    model = load(model_folder, method)
    with torch.no_grad():
        assert torch.equal(model.train()(IDS, use_cache=False).logits, model.eval()(IDS, use_cache=False).logits)
        for parameter in model.model.embed_tokens.parameters():
            parameter[:20] *= 50.0  # activations far above LLM.int8's threshold, in the first document only
    model.set_attn_implementation(attention.PER_DOCUMENT_SDPA)
    assert attention.assert_isolated(model, attention.PER_DOCUMENT_SDPA, 259) == 0.0


def test_evaluating_does_not_rearrange_4_bit_weights(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs with bfloat16 units bitsandbytes would, for good, and then no gradient comes out of the layer."""
    import bitsandbytes as bnb

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    assert bnb.nn.Linear4bit(8, 8).support_avx512bf16_for_cpu, "so it would happen on such a machine"
    model = load(model_folder, "qlora").eval()
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.data.clone()
    with torch.no_grad():
        model(IDS, use_cache=False)
    assert torch.equal(layer.weight.data, before)
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).sum().backward()
    assert float(x.grad.abs().max()) > 0


def test_a_quantised_base_has_a_fingerprint_of_its_own_kind(tmp_path: Path) -> None:
    one, other = tiny_folder(tmp_path / "one"), tiny_folder(tmp_path / "other", seed=1)
    marks = {method: fingerprint(load(one, method)) for method in ("lora", *QUANTIZED)}
    assert len(set(marks.values())) == 3
    for method, mark in marks.items():
        assert fingerprint(load(one, method)) == mark, "the same each time"
        assert fingerprint(load(other, method)) != mark
        assert comparable(mark, fingerprint(load(other, method)))
    assert not comparable(marks["lora"], marks["qlora"]), "quantised or not cannot be asked"
    assert not comparable(marks["int8_lora"], marks["qlora"])
    assert not comparable(None, marks["lora"])


@pytest.mark.parametrize("method", QUANTIZED)
def test_without_bitsandbytes_it_says_what_to_install(
    method: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"method.name={method} needs the package bitsandbytes") as caught:
        load(model_folder, method)
    assert caught.value.next_command == "pip install 'minituner[quantization]'"


def test_the_notes_say_what_was_chosen_and_what_the_base_weighs(model_folder: Path) -> None:
    section = ModelSection(name_or_path=str(model_folder), dtype="float32", attention="sdpa")
    for method in ("lora", *QUANTIZED):
        model, _, notes = load_model(
            model_folder, section, MethodSection(name=method), one_document_rows=True, device="cpu"
        )
        text = "\n".join(notes)
        assert "dtype float32: as the recipe says" in text
        assert (f"{parameter_bytes(model) / 1e6:,.1f} MB" in text) == (method != "lora")


def test_auto_takes_the_faster_type_and_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for speeds, best in (((100e9, 50e9), torch.float32), ((50e9, 400e9), torch.bfloat16)):
        loading.fast_dtype.cache_clear()
        monkeypatch.setattr(loading, "_gemm_speeds", lambda dtypes, s=speeds: dict(zip(dtypes, s, strict=True)))
        dtype, why = resolve_dtype("auto", "cpu")
        assert dtype == best
        assert f"{speeds[0] / 1e9:.0f}" in why
    loading.fast_dtype.cache_clear()
    assert resolve_dtype("bfloat16", "cpu") == (torch.bfloat16, "as the recipe says")


def test_full_under_auto_keeps_its_weights_in_float32(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "fast_dtype", lambda device: (torch.bfloat16, "forced"))
    assert {p.dtype for p in load(model_folder, "full", "auto").parameters()} == {torch.float32}
    assert {p.dtype for p in load(model_folder, "lora", "auto").parameters()} == {torch.bfloat16}


def test_a_folder_without_a_model_is_an_error_that_helps(tmp_path: Path) -> None:
    with pytest.raises(MinitunerError, match="cannot load a model from") as caught:
        load(tmp_path)
    assert "safetensors" in caught.value.fix
    with pytest.raises(MinitunerError, match="cannot load a tokenizer from"):
        load_tokenizer(tmp_path)
