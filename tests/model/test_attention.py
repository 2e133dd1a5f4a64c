"""Attention: every implementation computes the same, each model is proved isolated or refused, no GPU needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from minituner.data.collate import collate
from minituner.errors import MinitunerError, UsageError
from minituner.model import attention
from minituner.model.attention_kernels import per_document_sdpa, varlen
from minituner.model.loss import loss_sum
from tests.model import stand_ins
from tests.promises.common import TOLERANCE, documents, gradients, largest_difference
from tests.tiny import tiny_model

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 1024,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Class of the config, what it has of its own.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 64}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 64}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 8, "sliding_window": 64, **EXPERTS}),
    "mixtral": ("MixtralConfig", EXPERTS),
    "mamba": ("MambaConfig", {}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
}
ISOLATED = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "mixtral", "deepseek_v3")
CARRYING = ("mamba", "lfm2", "qwen3_next")  # layers whose state runs on over the border


def build(name: str, **changes: Any) -> Any:
    """A tiny random model of that architecture, with the attention that `auto` takes for it here."""
    import transformers

    attention.register()
    kind, own = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(SMALL | own | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    # Sinks and such start at 0 or at chance; none must be small enough to be overlooked.
    for key, parameter in model.named_parameters():
        if key.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    return model


def chosen(model: Any) -> str:
    """What `auto` takes for this model on a CPU; the model is set to it."""
    implementation, _ = attention.choose(
        "auto", attention.facts_here("cpu"), attention.needs_of(model.config), one_document_rows=False
    )
    model.set_attn_implementation(implementation)
    return implementation


# Same result everywhere: the functions themselves


def inputs(total: int, heads: int, groups: int, head_dim: int, seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(1, heads * groups, total, head_dim), (1, heads, total, head_dim), (1, heads, total, head_dim)]
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int], window: int | None) -> torch.Tensor:
    """SDPA with one block mask for the whole row, made here from document numbers."""
    total, groups = sum(lens), q.shape[1] // k.shape[1]
    number = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
    back = torch.arange(total)[:, None] - torch.arange(total)[None, :]
    mask = (number[:, None] == number[None, :]) & (back >= 0) & (back < (window or total))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def by_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int], window: int | None) -> torch.Tensor:
    return per_document_sdpa(torch.nn.Module(), q, k, v, seq_lens=lens, sliding_window=window)[0]


def by_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int], window: int | None) -> torch.Tensor:
    cu = F.pad(torch.tensor(lens).cumsum(0), (1, 0)).int()
    with stand_ins.in_place(float32=True):
        return varlen(torch.nn.Module(), q, k, v, cu_seq_lens_q=cu, max_length_q=max(lens), sliding_window=window)[0]


@pytest.mark.parametrize("implementation", [by_sdpa, by_varlen])
@settings(max_examples=40, deadline=None)
@given(
    lens=st.lists(st.one_of(st.just(1), st.integers(1, 24)), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 30)),
    heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 12]),
    seed=st.integers(0, 9),
)
def test_outputs_and_gradients_equal_one_block_mask(
    implementation: Callable[..., torch.Tensor],
    lens: list[int],
    window: int | None,
    heads: int,
    groups: int,
    head_dim: int,
    seed: int,
) -> None:
    """Grouped heads, one-token documents, sliding windows, heads that have to be padded."""
    results = []
    for function in (reference, implementation):
        tensors = inputs(sum(lens), heads, groups, head_dim, seed)
        out = function(*tensors, lens, window)
        (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
        results.append([out.detach(), *(t.grad for t in tensors)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=TOLERANCE)


def test_the_stand_in_has_the_signature_of_the_installed_kernel() -> None:
    real = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    ours = [(p.name, p.kind, p.default) for p in inspect.signature(stand_ins.varlen_attn).parameters.values()]
    assert ours == [(p.name, p.kind, p.default) for p in inspect.signature(real).parameters.values()]


def test_varlen_refuses_what_its_kernel_would_leave_out() -> None:
    q, k, v = inputs(6, 2, 1, 8, 0)
    borders = {"cu_seq_lens_q": torch.tensor([0, 6], dtype=torch.int32), "max_length_q": 6}
    for wrong, name in (
        ({"softcap": 50.0}, "soft-capping"),
        ({"dropout": 0.1}, "dropout"),
        ({"s_aux": torch.zeros(2)}, "sinks"),
    ):
        with pytest.raises(MinitunerError, match=name):
            varlen(torch.nn.Module(), q, k, v, **borders, **wrong)
    with pytest.raises(MinitunerError, match="without document borders"):
        varlen(torch.nn.Module(), q, k, v)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a CUDA GPU")
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_real_kernel_equals_per_document_sdpa(window: int | None, dtype: torch.dtype) -> None:
    lens, results = [1, 33, 7, 128, 1], []
    cu = F.pad(torch.tensor(lens).cumsum(0), (1, 0)).int().cuda()
    for function in (per_document_sdpa, varlen):
        tensors = [t.detach().cuda().to(dtype).requires_grad_() for t in inputs(sum(lens), 2, 2, 64, 0)]
        out, _ = function(
            torch.nn.Module(),
            *tensors,
            seq_lens=lens,
            cu_seq_lens_q=cu,
            max_length_q=max(lens),
            sliding_window=window,
        )
        out.float().square().sum().backward()
        results.append([out.detach(), *(t.grad for t in tensors)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours.float(), theirs.float(), atol=3e-2, rtol=3e-2)


# Same result everywhere: whole models, through transformers


def separate(model: Any, pack: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss of documents fed one at a time, by transformers' written-out attention."""
    model.set_attn_implementation("eager")
    total = torch.zeros(())
    for ids, labels in pack:
        logits = model(torch.tensor(ids)[None], use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
    total.backward()
    return float(total.detach()), gradients(model)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("llama", "per_document_sdpa"),
        ("llama", "varlen"),
        ("llama", "flash_attention_2"),
        ("mistral", "per_document_sdpa"),
        ("mistral", "varlen"),
        ("mistral", "flash_attention_2"),
        ("gemma3", "varlen"),
        ("gemma2", "per_document_eager"),
        ("gemma2", "flash_attention_2"),
        ("gpt_oss", "per_document_eager"),
        ("deepseek_v3", "varlen"),
        ("deepseek_v3", "flash_attention_2"),
    ],
)
def test_packed_loss_and_gradients_are_those_of_separate_documents(name: str, implementation: str) -> None:
    changes = {"sliding_window": 6} if "sliding_window" in MODELS[name][1] else {}
    pack = documents((9, 1, 14, 2))
    loss, expected = separate(build(name, **changes), pack)
    model = build(name, **changes)
    with stand_ins.in_place(float32=True) as seen:
        model.config._attn_implementation_internal = implementation  # without asking for a GPU
        packed = loss_sum(model, collate([pack]), implementation)
        packed.backward()
    assert float(packed.detach()) == pytest.approx(loss, rel=TOLERANCE)
    assert largest_difference(gradients(model), expected) <= TOLERANCE
    kernel = {"varlen": "varlen", "flash_attention_2": "flash"}.get(implementation)
    assert {key: len(calls) for key, calls in seen.items()} == {
        key: model.config.num_hidden_layers * (key == kernel) for key in seen
    }


@pytest.mark.parametrize("implementation", ["varlen", "flash_attention_2"])
def test_kernels_get_the_compute_dtype_though_norms_and_adapters_are_float32(implementation: str) -> None:
    """What makes q and k float32 in a bfloat16 model: norms kept in float32 (Qwen3 has them on q and k), LoRA."""
    from peft import LoraConfig, get_peft_model

    attention.register()
    model = get_peft_model(build("qwen3", dtype=torch.bfloat16).bfloat16(), LoraConfig(target_modules="all-linear"))
    base = model.get_base_model()
    for key, module in base.named_modules():
        if key.endswith(("q_norm", "k_norm")):
            module.register_forward_hook(lambda _module, _inputs, output: output.float())
    base.config._attn_implementation_internal = implementation
    with stand_ins.in_place() as seen:
        loss = loss_sum(model, collate([documents((9, 5))]), implementation)
        loss.backward()
    kernel = "varlen" if implementation == "varlen" else "flash"
    assert seen[kernel] == [torch.bfloat16] * base.config.num_hidden_layers
    assert all(torch.isfinite(value).all() for value in gradients(model).values())


def test_mixed_types_are_brought_together_for_sdpa_too() -> None:
    q, k, v = inputs(8, 2, 2, 8, 0)
    out, _ = per_document_sdpa(torch.nn.Module(), q, k, v.bfloat16(), seq_lens=[3, 5])
    assert out.dtype == torch.bfloat16


def test_autocast_and_weights_say_the_compute_dtype_and_float32_is_refused() -> None:
    q, k, v = inputs(6, 2, 1, 8, 0)
    borders = {"cu_seq_lens_q": torch.tensor([0, 2, 6], dtype=torch.int32), "max_length_q": 4}
    with stand_ins.in_place() as seen:
        with torch.autocast("cpu", torch.float16):
            varlen(torch.nn.Module(), q, k, v, **borders)
        varlen(torch.nn.Linear(2, 2, dtype=torch.bfloat16), q, k, v, **borders)
        quantised = torch.nn.Module()
        quantised.config = type("Config", (), {"dtype": torch.float16})()
        varlen(quantised, q, k, v, **borders)
        assert seen["varlen"] == [torch.float16, torch.bfloat16, torch.float16]
        with pytest.raises(MinitunerError, match="computes in float32"):
            varlen(torch.nn.Linear(2, 2), q, k, v, **borders)


def test_no_layer_reads_a_number_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-back stops a GPU until it has caught up; borders travel as Python numbers and as they are."""
    batch = collate([documents((9, 1, 14))])

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a device sync")

    for implementation in (attention.PER_DOCUMENT_SDPA, attention.VARLEN):
        model = tiny_model().eval()
        attention.register()
        model.set_attn_implementation(implementation)
        borders = attention.packed_kwargs(batch, implementation)
        with monkeypatch.context() as patch:
            patch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, *_, **__: q)
            patch.setattr("minituner.model.attention_kernels.HALF", (torch.float32,))
            for name in ("item", "tolist", "__int__", "__bool__", "__index__", "__float__", "cpu", "numpy"):
                patch.setattr(torch.Tensor, name, refuse)
            model(batch.input_ids, position_ids=batch.position_ids, use_cache=False, **borders)


# The proof at step 0


@pytest.mark.parametrize("name", ISOLATED)
def test_every_architecture_is_proved_isolated(name: str) -> None:
    model = build(name).train()
    implementation = chosen(model)
    windows = [getattr(module, "sliding_window", None) for module in model.modules()]
    influence = attention.assert_isolated(model, implementation, 259)
    assert influence == 0.0 or (name in ("gpt_oss", "mixtral", "deepseek_v3") and influence < 1e-4)
    assert model.training
    assert model.config._attn_implementation == implementation
    assert [getattr(module, "sliding_window", None) for module in model.modules()] == windows
    assert getattr(model.config, "sliding_window", None) in (None, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_proved_in_half_precision_and_with_kernels(dtype: torch.dtype) -> None:
    model = build("mistral", dtype=dtype).to(dtype)
    assert attention.assert_isolated(model, chosen(model), 259) == 0.0
    model.config._attn_implementation_internal = "varlen"
    with stand_ins.in_place() as seen:
        assert attention.assert_isolated(model, "varlen", 259) == 0.0
    assert seen["varlen"]


@pytest.mark.parametrize("name", CARRYING)
def test_layers_that_carry_a_state_are_refused(name: str) -> None:
    model = build(name)
    with pytest.raises(UsageError, match="packed documents would see each other"):
        attention.assert_isolated(model, "per_document_sdpa", 259)
    with pytest.raises(UsageError, match=r"packing=none"):
        chosen(model)
    needs = attention.needs_of(model.config)
    alone, _ = attention.choose("auto", attention.facts_here("cpu"), needs, one_document_rows=True)
    assert alone in ("sdpa", "eager"), "alone in its row, a document may be read by transformers' own"


def broken(**wrong: Any) -> Callable[..., Any]:
    """Our function, with some of its arguments changed before it sees them."""

    def function(module: Any, q: Any, k: Any, v: Any, mask: Any = None, **kwargs: Any) -> Any:
        changed = {key: change(kwargs.get(key)) for key, change in wrong.items()}
        return per_document_sdpa(module, q, k, v, mask, **(kwargs | changed))

    return function


def backwards(module: Any, q: Any, k: Any, v: Any, mask: Any = None, **kwargs: Any) -> Any:
    """Every document sees the first token of the next."""
    lens = kwargs["seq_lens"]
    shifted = [lens[0] + 1, *lens[1:-1], lens[-1] - 1]
    return per_document_sdpa(module, q, k, v, **(kwargs | {"seq_lens": shifted}))


def not_causal(module: Any, q: Any, k: Any, v: Any, mask: Any = None, **kwargs: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2), None


FAULTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "no borders": ("llama", broken(seq_lens=lambda lens: [sum(lens)]), "see each other"),
    "a border one too late": ("llama", backwards, "see each other"),
    "not causal": ("llama", not_causal, "see each other"),
    "window left out": ("mistral", broken(sliding_window=lambda _: None), "not what they are alone"),
    "window one too long": ("mistral", broken(sliding_window=lambda w: w + 1), "not what they are alone"),
    "soft-capping left out": ("gemma2", broken(softcap=lambda _: None), "not what they are alone"),
    "another scale": ("llama", broken(scaling=lambda s: s * 1.1), "not what they are alone"),
    "a leak among experts": ("mixtral", broken(seq_lens=lambda lens: [sum(lens)]), "see each other"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_attention_is_refused(fault: str) -> None:
    from transformers import AttentionInterface

    name, function, message = FAULTS[fault]
    own = {"attn_logit_softcapping": 2.0} if name == "gemma2" else {}  # so low that tiny scores feel it
    model = build(name, **own)
    implementation = chosen(model)
    attention.assert_isolated(model, implementation, 259)
    AttentionInterface.register(implementation, function)
    try:
        with pytest.raises(MinitunerError, match=message):
            attention.assert_isolated(model, implementation, 259)
    finally:
        attention.register()


def test_sinks_left_out_are_noticed() -> None:
    """What flash-attn 2 would do to gpt-oss, without a word."""
    model = build("gpt_oss")
    implementation = chosen(model)
    attention.assert_isolated(model, implementation, 259)
    model.config._attn_implementation_internal = "flash_attention_2"
    with stand_ins.in_place(float32=True), pytest.raises(MinitunerError, match="not what they are alone"):
        attention.assert_isolated(model, "flash_attention_2", 259)


def test_positions_that_run_on_are_noticed() -> None:
    """A model that ignores position_ids numbers its tokens through the row."""
    model = build("llama")
    implementation = chosen(model)
    plain = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: plain(*args, **kwargs)
    # Rotary positions are relative: inside a document nothing changes, so learned ones show it.
    assert attention.assert_isolated(model, implementation, 259) == 0.0
    learned = gpt2()
    attention.assert_isolated(learned, chosen(learned), 259)
    forward = learned.transformer.forward
    learned.transformer.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(MinitunerError, match="not what they are alone"):
        attention.assert_isolated(learned, "per_document_sdpa", 259)


def gpt2() -> Any:
    import transformers

    attention.register()
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=259, n_embd=32, n_head=4, n_layer=2, initializer_range=0.2)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_weights_that_are_not_numbers_are_refused() -> None:
    model = build("llama")
    implementation = chosen(model)
    model.model.layers[1].mlp.up_proj.weight.data[0] = torch.nan
    with pytest.raises(MinitunerError, match="not finite"):
        attention.assert_isolated(model, implementation, 259)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models_are_proved_too_and_plain_llm_int8_is_caught(bits: int, tmp_path: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from minituner.model.quantized import differentiable_everywhere

    attention.register()
    small = build("llama")
    small.model.embed_tokens.weight.data[:, 3] *= 40  # an outlier column, which LLM.int8 treats apart
    small.save_pretrained(tmp_path)
    quantised = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 8: {"load_in_8bit": True}}[bits]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**quantised), dtype=torch.float32, device_map="cpu"
    )
    if bits == 8:  # its outlier columns are picked from the whole batch: documents touch each other by rounding
        with pytest.raises(MinitunerError, match="see each other"):
            attention.assert_isolated(model, chosen(model), 259)
    assert differentiable_everywhere(model) == 14  # seven matrices in each of two layers
    assert attention.assert_isolated(model, chosen(model), 259) == 0.0


# Generation


@pytest.mark.parametrize(
    ("name", "within"), [("llama", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager"), ("gemma3", "sdpa")]
)
def test_generation_steps_back_to_an_attention_that_can_do_what_the_model_needs(name: str, within: str) -> None:
    model = build(name)
    implementation = chosen(model)
    with attention.for_generation(model):
        assert model.config._attn_implementation == within
    assert model.config._attn_implementation == implementation
    model.set_attn_implementation("eager")
    with attention.for_generation(model):
        assert model.config._attn_implementation == "eager"


def test_packed_kwargs_of_each_implementation() -> None:
    batch = collate([documents((3, 1)), documents((5,))])
    cu = batch.cu_seqlens
    assert cu.tolist() == [0, 3, 4, 9]
    assert cu.dtype == torch.int32
    assert attention.packed_kwargs(batch, "per_document_sdpa") == {"seq_lens": [3, 1, 5]}
    assert attention.packed_kwargs(batch, "per_document_eager") == {"seq_lens": [3, 1, 5]}
    assert attention.packed_kwargs(batch, "varlen") == {"cu_seq_lens_q": cu, "max_length_q": 5}
    flash = attention.packed_kwargs(batch, "flash_attention_3")
    assert flash == {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 5, "max_length_k": 5}
    assert attention.packed_kwargs(batch, "sdpa") == {}


# From a folder, as training loads it


@pytest.mark.parametrize(("name", "expected"), [("llama", "per_document_sdpa"), ("gemma2", "per_document_eager")])
def test_loading_chooses_by_the_model_s_config_and_says_why(name: str, expected: str, tmp_path: Any) -> None:
    from minituner.model.loading import load_model
    from minituner.recipe import MethodSection, ModelSection

    build(name).save_pretrained(tmp_path)
    section = ModelSection(name_or_path=str(tmp_path), dtype="float32")
    model, implementation, notes = load_model(tmp_path, section, MethodSection(), device="cpu")
    assert implementation == expected == model.config._attn_implementation
    assert any(note.startswith(f"attention {expected}: ") and "needs a CUDA GPU" in note for note in notes)
    with attention.for_generation(model):
        assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape == (1, 5)
    with pytest.raises(UsageError, match="needs a CUDA GPU"):
        load_model(tmp_path, section.model_copy(update={"attention": "varlen"}), MethodSection(), device="cpu")


def test_loading_refuses_to_pack_for_layers_that_carry_a_state(tmp_path: Any) -> None:
    from minituner.model.loading import load_model
    from minituner.recipe import MethodSection, ModelSection

    build("lfm2").save_pretrained(tmp_path)
    section = ModelSection(name_or_path=str(tmp_path), dtype="float32")
    with pytest.raises(UsageError, match="conv layers"):
        load_model(tmp_path, section, MethodSection(), device="cpu")
    _, implementation, _ = load_model(tmp_path, section, MethodSection(), one_document_rows=True, device="cpu")
    assert implementation == "sdpa"
