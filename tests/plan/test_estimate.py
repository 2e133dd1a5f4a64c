"""The plan before the run: shapes without memory count what real tensors take, and the work is the run's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minituner import Recipe, estimate, train
from minituner.data.collate import collate
from minituner.errors import SourceError, UsageError
from minituner.model.adapters import ON_ATTENTION, apply_method
from minituner.model.attention import PER_DOCUMENT_SDPA
from minituner.model.fused import fuse
from minituner.model.head import find_head, probe
from minituner.model.loading import load_model
from minituner.model.packed_attention import SHORT
from minituner.plan.activations import PHASES, Paper, _Alive, _notices_gradients
from minituner.plan.cards import CARDS, find_card, parse_bytes
from minituner.plan.estimate import HEADROOM
from minituner.plan.estimate_text import size
from minituner.plan.experts import idle_parameters
from tests.catalog.test_native_architectures import tiny as mixture
from tests.tiny import tiny_model, tiny_recipe

LENGTHS = (40, 24, 9)


def _recipe(folder: Path, method: str, *, checkpointing: bool = False) -> Recipe:
    return tiny_recipe(
        folder, folder / "none.jsonl", method={"name": method}, train={"activation_checkpointing": checkpointing}
    )


def _batch(lengths: tuple[int, ...]) -> Any:
    documents = [(torch.arange(n).numpy(), torch.arange(n).numpy()) for n in lengths]
    return collate([documents])


def _really(folder: Path, recipe: Recipe, *, gradients_there: bool) -> dict[str, int]:
    """The same bookkeeping over a real model and real tensors."""
    model, implementation, _ = load_model(folder, recipe.model, recipe.method, device="cpu")
    model = apply_method(model, recipe.method, activation_checkpointing=recipe.train.activation_checkpointing).train()
    fuse(model, recipe.train.fused)
    head, _ = find_head(model, implementation, probe())
    assert head is not None
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if gradients_there else None
    batch = _batch(LENGTHS)
    keep = (batch.shift_labels[0] >= 0).nonzero().squeeze(1)
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)]
    with _Alive([*known, batch.input_ids, batch.position_ids]) as alive, _notices_gradients(trained, alive):
        hidden = head.hidden(batch, implementation)
        alive.phase = "logits"
        loss = head.loss_sum(hidden[keep], batch.shift_labels[0, keep])
        del hidden
        alive.phase = "temporary"
        loss.backward()
    return {phase: alive.at_peak.get(phase, 0) for phase in PHASES}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("gradients_there", [False, True])
def test_shapes_alone_take_what_real_tensors_take(
    method: str, checkpointing: bool, gradients_there: bool, model_folder: Path
) -> None:
    recipe = _recipe(model_folder, method, checkpointing=checkpointing)
    real = _really(model_folder, recipe, gradients_there=gradients_there)
    paper = Paper(model_folder, recipe, torch.float32)
    assert paper.head is not None
    targets = sum(n - 1 for n in LENGTHS)
    plan = paper.rehearse(LENGTHS, targets, gradients_there=gradients_there)
    assert sum(plan.peak.values()) == pytest.approx(sum(real.values()), rel=0.02)
    assert plan.peak["gradients"] == pytest.approx(real["gradients"], rel=0.02, abs=4096)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "targets"), [("full", "all-linear"), ("lora", "all-linear"), ("lora", ON_ATTENTION)]
)
def test_a_mixture_of_experts_takes_what_real_tensors_take(method: str, targets: str, tmp_path: Path) -> None:
    """The products of stacked experts, in float32 too, where torch's own shape rule refuses them."""
    mixture("mixtral").save_pretrained(tmp_path)
    recipe = _recipe(tmp_path, method)
    recipe.method.target_modules = targets
    real = _really(tmp_path, recipe, gradients_there=True)
    paper = Paper(tmp_path, recipe, torch.float32)
    plan = paper.rehearse(LENGTHS, sum(n - 1 for n in LENGTHS), gradients_there=True)
    assert sum(plan.peak.values()) == pytest.approx(sum(real.values()), rel=0.02)
    assert 0 < paper.idle_parameters < paper.base_parameters
    base_only = estimate(recipe, card="a100-80gb")
    assert base_only.active == base_only.parameters - paper.idle_parameters
    assert f"{base_only.active:,} work on one token" in str(base_only)


@pytest.mark.slow
def test_adapters_on_experts_are_seen_to_copy_them_and_attention_alone_is_proposed(tmp_path: Path) -> None:
    mixture("mixtral").save_pretrained(tmp_path)
    recipe = _recipe(tmp_path, "lora", checkpointing=True)
    need = estimate(recipe, gpu_memory="1TB").peak_bytes
    plan = estimate(recipe, gpu_memory=int(need))
    assert plan.cheapest.name == "adapters on attention only"
    assert f"'method.target_modules={ON_ATTENTION}'" in str(plan), "quoted, so that a shell leaves it alone"
    again = Recipe.from_values(recipe.model_dump(mode="json"), "again", plan.cheapest.overrides)
    experts = 2 * 3 * 4 * 32 * 64 * 4  # bytes: two layers, three matrices of four experts
    assert need - estimate(again, gpu_memory="1TB").peak_bytes > experts / 2, "of one layer at a time"


# (in all, at work on a token), in 1e9, as published; each is its config class's default
PUBLISHED = {"mixtral": (46.7, 12.9), "qwen2_moe": (14.3, 2.7), "deepseek_v3": (671, 37.6)}


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_published_mixtures_have_their_published_sizes(architecture: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture]())
    whole = sum(p.numel() for p in model.parameters())
    published = PUBLISHED[architecture]
    assert whole / 1e9 == pytest.approx(published[0], rel=0.01)
    assert (whole - idle_parameters(model)) / 1e9 == pytest.approx(published[1], rel=0.01)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_kept_is_what_autograd_saves(method: str, model_folder: Path) -> None:
    """Another way to count: what autograd itself says it saves in a real forward pass."""
    recipe = _recipe(model_folder, method)
    model, implementation, _ = load_model(model_folder, recipe.model, recipe.method, device="cpu")
    model = apply_method(model, recipe.method).train()
    fuse(model, recipe.train.fused)
    head, _ = find_head(model, implementation, probe())
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = head.hidden(_batch(LENGTHS), implementation)
    plan = Paper(model_folder, recipe, torch.float32).rehearse(LENGTHS, 70, gradients_there=True)
    assert len(hidden) == sum(LENGTHS)
    assert sum(saved.values()) == pytest.approx(plan.kept, rel=0.06)
    assert sum(saved.values()) <= plan.kept


@pytest.fixture(scope="module")
def paper(model_folder: Path) -> Paper:
    return Paper(model_folder, _recipe(model_folder, "lora"), torch.float32)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(8, 300))
def test_activations_grow_with_tokens_in_a_straight_line(tokens: int, paper: Paper) -> None:
    """More documents, and longer ones; of those past SHORT the attention keeps one number a head and token besides."""
    for rows in ([[tokens] * n for n in (1, 2, 3)], [[SHORT + n * tokens] for n in (1, 2, 3)]):
        kept = [paper.rehearse(row, tokens, gradients_there=True).kept for row in rows]
        assert kept[2] - kept[1] == kept[1] - kept[0] > 0


def test_a_cut_row_keeps_the_same_but_for_its_tables_of_weights(paper: Paper) -> None:
    """Of 4 heads in each of 2 layers, in float32; past SHORT the attention keeps none."""
    whole, cut = (paper.rehearse(row, 50, gradients_there=True).kept for row in ([120], [60, 60]))
    assert whole - 4 * 2 * 4 * 120**2 == pytest.approx(cut - 4 * 2 * 4 * 2 * 60**2, rel=0.001)
    whole, cut = (paper.rehearse(row, 50, gradients_there=True).kept for row in ([400], [200, 200]))
    assert cut == pytest.approx(whole, rel=0.001)


@pytest.mark.parametrize("method", ["qlora", "int8_lora"])
def test_a_quantised_base_takes_what_it_takes(method: str, model_folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    from minituner.model.quantized import parameter_bytes

    recipe = _recipe(model_folder, method)
    model, _, _ = load_model(model_folder, recipe.model, recipe.method, device="cpu")
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    predicted = Paper(model_folder, recipe, torch.float32).frozen_bytes
    assert predicted == pytest.approx(parameter_bytes(model) + buffers, rel=0.02)


def test_steps_tokens_and_operations_are_those_of_the_run(
    model_folder: Path, chats: Path, own_home: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(model_folder, chats)
    plan = estimate(recipe, device="cpu")
    done = train(recipe, tmp_path / "run", progress=False, say=lambda line: None)
    assert plan.workload.steps == done.steps
    assert plan.workload.tokens == sum(line["tokens"] for line in done.metrics)
    assert plan.flops == pytest.approx(done.summary["model_flops"], rel=0.01)


def test_config_alone_is_enough_and_nothing_is_made_up(model_folder: Path, tmp_path: Path, own_home: Path) -> None:
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    plan = estimate(tiny_recipe(tmp_path, tmp_path / "nowhere.jsonl"), card="a100-80gb")
    assert plan.parameters > plan.trained > 0
    assert plan.row.tokens == 128
    assert plan.workload.steps is None
    assert plan.flops is None
    assert plan.seconds is None
    assert "could not be read" in plan.notes[0]


def test_no_config_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, own_home: Path, chats: Path) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(SourceError) as error:
        estimate(tiny_recipe(Path("some/model"), chats))
    assert "no route to the hub" in error.value.why
    assert "config.json, alone" in error.value.fix


def test_of_a_model_on_the_hub_everything_but_the_weights_is_fetched(
    monkeypatch: pytest.MonkeyPatch, own_home: Path, chats: Path, model_folder: Path
) -> None:
    from fnmatch import fnmatch

    asked: dict[str, Any] = {}

    def snapshot(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(model_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    plan = estimate(tiny_recipe(Path("some/model"), chats), device="cpu")
    assert asked["repository"] == "some/model"
    taken = [f.name for f in model_folder.iterdir() if any(fnmatch(f.name, p) for p in asked["allow_patterns"])]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(taken)
    assert not [name for name in taken if name.endswith((".safetensors", ".bin", ".py"))]
    assert plan.workload.steps, "the tokenizer is there, so steps are counted"


def test_zero_cuts_what_it_says_and_nothing_else(model_folder: Path, chats: Path, own_home: Path) -> None:
    plan = estimate(tiny_recipe(model_folder, chats, method={"name": "full"}), gpus=4, device="cpu")
    none, one, two = (plan.stages[name] for name in ("none", "zero1", "zero2"))
    # 8 bytes a number become (8 + 4 for DeepSpeed's own copy) / 4
    assert one["optimizer"] == pytest.approx(none["optimizer"] * 12 / 8 / 4)
    assert two["gradients"] == pytest.approx(one["gradients"] / 4)
    assert none["activations"] == one["activations"] == two["activations"]
    assert list(plan.stages) == ["none", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


def test_a_change_that_fits_leads_to_a_plan_that_fits(model_folder: Path, chats: Path, own_home: Path) -> None:
    recipe = tiny_recipe(model_folder, chats, method={"name": "full"})
    need = estimate(recipe, gpu_memory="1TB").peak_bytes
    plan = estimate(recipe, gpu_memory=int(need))  # a tenth is to be left, so this is too little
    assert plan.fits is False
    assert plan.cheapest is not None
    assert plan.cheapest.name == "activation checkpointing"
    again = estimate(
        Recipe.from_values(recipe.model_dump(mode="json"), "again", plan.cheapest.overrides), gpu_memory=int(need)
    )
    assert again.fits
    assert again.peak_bytes == pytest.approx(plan.cheapest.peak_bytes)
    assert "next: minituner train RECIPE train.activation_checkpointing=true" in str(plan).replace("\n", " ")


def test_short_rows_are_told_how_to_make_the_same_steps_in_fewer_passes(
    model_folder: Path, chats: Path, own_home: Path
) -> None:
    recipe = tiny_recipe(model_folder, chats, train={"gradient_accumulation_steps": 4})
    plan = estimate(recipe, device="cpu")
    (note,) = plan.notes
    overrides = [word for word in note.split() if word.startswith("train.")]
    assert overrides == ["train.per_device_batch_size=4", "train.gradient_accumulation_steps=1"]
    again = estimate(Recipe.from_values(recipe.model_dump(mode="json"), "again", overrides), device="cpu")
    assert not again.notes
    assert again.workload.steps == plan.workload.steps
    assert again.workload.tokens == plan.workload.tokens
    assert f"in {size(again.peak_bytes)} of memory" in note, "the packs are equally full"
    assert again.peak_bytes > plan.peak_bytes


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"train": {"gradient_accumulation_steps": 3}}, {"device": "cpu"}),
        ({"data": {"packing": "none"}}, {"device": "cpu"}),
        ({}, {"gpu_memory": "1TB", "device": "cuda"}),
    ],
    ids=["nothing to divide", "documents alone", "a GPU"],
)
def test_short_rows_are_left_alone(
    changes: dict[str, Any], options: dict[str, Any], model_folder: Path, chats: Path, own_home: Path
) -> None:
    values = {"train": {"gradient_accumulation_steps": 4}, **changes}
    assert not [n for n in estimate(tiny_recipe(model_folder, chats, **values), **options).notes if "short" in n]


def test_short_rows_are_left_alone_where_longer_ones_would_not_fit(
    model_folder: Path, chats: Path, own_home: Path
) -> None:
    recipe = tiny_recipe(model_folder, chats, train={"gradient_accumulation_steps": 4})
    just_enough = int(estimate(recipe, device="cpu").peak_bytes / HEADROOM) + 1
    plan = estimate(recipe, device="cpu", gpu_memory=just_enough)
    assert plan.fits
    assert not plan.notes


@pytest.mark.slow
def test_when_nothing_is_enough_it_says_so(model_folder: Path, chats: Path, own_home: Path) -> None:
    plan = estimate(tiny_recipe(model_folder, chats), gpu_memory="1kB")
    assert plan.cheapest is None
    assert plan.changes[-1].name == "all that helps, together"
    assert "none of them is enough" in str(plan)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"card": "a1000"}, "a100-40gb"),
        ({"gpu_memory": "24 potatoes"}, "24GiB"),
        ({"gpu_memory": "0GB"}, "24GiB"),
        ({"card": "t4", "probe": True}, "leave --probe out"),
        ({"device": "tpu"}, "cpu or cuda"),
        ({"gpus": 3, "sp": 2}, "does not divide 3 ranks"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], words: str, model_folder: Path, chats: Path) -> None:
    shared = options.pop("sp", 1)
    recipe = tiny_recipe(model_folder, chats, distributed={"sequence_parallel_size": shared})
    with pytest.raises(UsageError, match=words):
        estimate(recipe, **options)


def test_cards_and_sizes() -> None:
    assert parse_bytes("24GB") == 24_000_000_000
    assert parse_bytes("24 GiB") == 24 * 2**30
    assert find_card("A100 80GB") is CARDS["a100-80gb"]
    assert all(card.memory_bytes > 14 * 2**30 for card in CARDS.values())


def test_the_head_on_paper_is_the_head_of_the_model(tmp_path: Path) -> None:
    """A model that squashes its logits goes through its own forward, here as in training."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    small = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = Gemma2Config(**small, num_attention_heads=4, num_key_value_heads=2)
    config.save_pretrained(tmp_path)
    recipe = _recipe(tmp_path, "lora")
    assert Paper(tmp_path, recipe, torch.float32).head is None
    model = Gemma2ForCausalLM(config)
    model.set_attn_implementation("eager")
    assert find_head(model, "eager", probe())[0] is None
    plain = tiny_model()
    plain.set_attn_implementation(PER_DOCUMENT_SDPA)
    assert find_head(plain, PER_DOCUMENT_SDPA, probe())[0] is not None


def test_command_line(
    model_folder: Path, chats: Path, own_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from minituner.cli import app

    tiny_recipe(model_folder, chats).dump(tmp_path / "r.yaml")
    done = CliRunner().invoke(app, ["estimate", str(tmp_path / "r.yaml"), "--gpus", "2", "--card", "t4", "--json"])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["world_size"] == 2
    assert values["fits"] is True
    assert values["peak_bytes"] == pytest.approx(sum(values["parts"].values()))
    text = CliRunner().invoke(app, ["estimate", str(tmp_path / "r.yaml"), "train.num_epochs=1", "--device", "cpu"])
    assert "memory of one rank at its worst moment" in text.stdout


def test_gpu_plans_have_no_program_and_offload_moves_to_the_host(
    model_folder: Path, chats: Path, own_home: Path
) -> None:
    recipe = tiny_recipe(model_folder, chats, method={"name": "full"}, distributed={"zero": "zero2_offload"})
    plan = estimate(recipe, gpus=2, card="l40s")
    assert plan.parts["program"] == plan.parts["fragments"] == plan.parts["optimizer"] == 0
    assert plan.host == pytest.approx(16 * plan.trained / 2)
    assert plan.stages["zero2"]["optimizer"] == pytest.approx(12 * plan.trained / 2)
    # the bucket of our presets is set aside whole, however small the model
    assert plan.parts["communication"] == 4 * 50_000_000
