"""The recipe: every problem at once, the nearest name for each, and what is written loads back equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner import Recipe
from minituner.errors import UsageError

SMALL = {"model": {"name_or_path": "m"}, "data": {"sources": [{"path": "d.json"}]}}
QUICKSTART = "smollm2_135m_instruct_lora_personal_assistant_e3"


def recipe(**sections: Any) -> Recipe:
    return Recipe.from_values({**SMALL, **sections})


def problems(**sections: Any) -> str:
    with pytest.raises(UsageError) as caught:
        recipe(**sections)
    assert caught.value.exit_code == 2
    return caught.value.text()


TEXT = st.text(alphabet=st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=30)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    notes=st.one_of(
        TEXT, st.sampled_from(["yes", "1e3", "a: b # c", "'\"", "多行\n说明\n", "null", "- x", "long 长 " * 300])
    ),
    path=TEXT.filter(bool),
    prompts=st.lists(TEXT, max_size=3),
    rate=st.floats(1e-12, 1.0),
    epochs=st.floats(0.001, 1000),
    targets=st.one_of(st.just("all-linear"), st.lists(st.text("abc_", min_size=1, max_size=6), max_size=3)),
    init=st.sampled_from([True, False, "gaussian", "pissa"]),
    norm=st.one_of(st.none(), st.floats(0.001, 10)),
)
def test_what_is_written_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, notes: str, path: str, prompts: list[str], rate: float, epochs: float,
    targets: Any, init: Any, norm: float | None,
) -> None:  # fmt: skip
    one = recipe(
        notes=notes,
        data={"sources": [{"path": path}, {"path": "二.jsonl", "weight": 0.5}]},
        method={"target_modules": targets, "init_lora_weights": init},
        train={"learning_rate": rate, "num_epochs": epochs, "max_grad_norm": norm},
        evaluate={"prompts": prompts, "identity": notes or None},
    )
    file = tmp_path_factory.mktemp("r") / "r.yaml"
    one.dump(file)
    assert Recipe.load(file) == one
    file.write_text(one.dump_commented(), encoding="utf-8")
    assert Recipe.load(file) == one


def test_every_field_is_explained_in_the_written_file() -> None:
    text = Recipe.load(QUICKSTART).dump_commented()

    def fields(model: Any) -> None:
        for name, field in model.model_fields.items():
            if field.description:
                assert f"# {field.description}" in text, name
            else:
                assert hasattr(field.annotation, "model_fields"), f"{name} has neither description nor fields"
                fields(field.annotation)

    fields(Recipe)


def test_several_problems_come_at_once_each_with_path_value_and_nearest_name() -> None:
    text = problems(
        method={"name": "lroa", "lora_rnak": 8, "lora_dropout": 1.5},
        train={"learning_rate": -1, "seed": "x", "adam_betas": [0.9, 1.0]},
        evalaute={},
        data={"sources": [{"path": "d.json", "formta": "openai"}], "packing": "bestfit"},
    )
    assert "8 problems" in text or "9 problems" in text
    assert "method.name = 'lroa'" in text
    assert "did you mean 'lora'?" in text
    assert "method.lora_rnak: unknown key; did you mean 'lora_rank'?" in text
    assert "method.lora_dropout = 1.5" in text
    assert "train.learning_rate = -1" in text
    assert "train.seed = 'x'" in text
    assert "train.adam_betas" in text
    assert "evalaute: unknown key; did you mean 'evaluate'?" in text
    assert "data.sources.0.formta: unknown key; did you mean 'format'?" in text
    assert "data.packing = 'bestfit'" in text
    assert "did you mean 'best_fit'?" in text


def test_what_has_no_default_is_named_when_missing() -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_values({"model": {}, "data": {"sources": []}})
    assert "model.name_or_path: missing" in caught.value.text()
    assert "data.sources = []" in caught.value.text()
    with pytest.raises(UsageError, match="model: missing"):
        Recipe.from_values({})


def test_a_key_far_from_every_name_lists_the_known_ones() -> None:
    text = problems(save={"zzz": 1})
    assert "save.zzz: unknown key; known here: every_steps, keep_last" in text


def test_nan_is_no_learning_rate() -> None:
    with pytest.raises(UsageError, match="learning_rate"):
        recipe(train={"learning_rate": float("nan")})
    with pytest.raises(UsageError, match="num_epochs"):
        recipe(train={"num_epochs": float("inf")})


def test_overrides_reach_every_depth_and_are_typed_by_yaml() -> None:
    loaded = Recipe.load(
        QUICKSTART,
        [
            "train.learning_rate=1e-4",
            "data.sources.0.path=我的 数据.json",
            "method.target_modules=[q_proj, v_proj]",
            "train.max_grad_norm=null",
            "data.shuffle=false",
            "name=mine",
        ],
    )
    assert loaded.train.learning_rate == 1e-4
    assert loaded.data.sources[0].path == "我的 数据.json"
    assert loaded.method.target_modules == ["q_proj", "v_proj"]
    assert loaded.train.max_grad_norm is None
    assert loaded.data.shuffle is False
    assert loaded.name == "mine"
    assert Recipe.load(QUICKSTART, {"train.seed": 7}).train.seed == 7


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rate", "not an override"),
        ("=3", "not an override"),
        ("train.learning_rte=1", "did you mean 'learning_rate'?"),
        ("trian.seed=1", "did you mean 'train'?"),
        ("data.sources.1.path=x", "not an item of that list"),
        ("data.sources.first.path=x", "not an item of that list"),
        ("train.seed=[1", "not valid YAML"),
        ("train.seed.deep=1", "train.seed"),
        ("train=5", "train = 5"),
        ("train.=5", "unknown key"),
        ("model.dtype=float23", "did you mean 'float32'?"),
    ],
)
def test_a_bad_override_says_what_is_wrong(override: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.load(QUICKSTART, [override])
    assert said in caught.value.text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: [1, 2", "not valid YAML"),
        ("model: {name_or_path: a}\nmodel: {name_or_path: b}\n", "stands twice"),
        ("just text", "holds no settings"),
        ("", "holds no settings"),
        ("- 1\n", "holds no settings"),
        ("model: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("model: {name_or_path: m}\ndata: 5\n", "data = 5"),
        ("1: 2\n", "1"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        Recipe.load(file)
    assert said in caught.value.text()


def test_bytes_a_folder_and_a_missing_file_are_messages(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(UsageError, match="cannot read the recipe"):
        Recipe.load(tmp_path / "r.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        Recipe.load(tmp_path)
    with pytest.raises(UsageError, match="no such recipe file"):
        Recipe.load(tmp_path / "no.yaml")


def test_a_recipe_is_never_code(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: !!python/object/apply:os.system ['touch " + str(tmp_path / "ran") + "']\n")
    with pytest.raises(UsageError):
        Recipe.load(file)
    assert not (tmp_path / "ran").exists()


def test_assignment_is_checked_like_loading() -> None:
    from pydantic import ValidationError

    one = recipe()
    with pytest.raises(ValidationError):
        one.train.learning_rate = -1
    with pytest.raises(ValidationError):
        one.train.unknown = 1


def test_the_design_s_example_is_a_recipe() -> None:
    text = """
model:   {name_or_path: smollm2-135m-instruct, dtype: auto, attention: auto, trust_remote_code: false}
method:  {name: lora, lora_rank: 16, lora_alpha: 32, lora_dropout: 0.0, target_modules: all-linear}
data:
  sources: [{path: data/personal_assistant.json, format: openai, weight: 1.0}]
  template: native
  max_length: 1024
  packing: best_fit
  isolate_documents: true
  loss_on: assistant
train:   {num_epochs: 3, per_device_batch_size: 1, gradient_accumulation_steps: 4, learning_rate: 2.0e-4,
          lr_schedule: cosine, warmup_ratio: 0.03, weight_decay: 0.0, adam_betas: [0.9, 0.999], max_grad_norm: 1.0,
          activation_checkpointing: false, seed: 42}
distributed: {zero: null, sequence_parallel_size: 1}
evaluate: {every_steps: 100, prompts: ["Please introduce yourself."], system: null, max_new_tokens: 64}
save:    {every_steps: 100, keep_last: 2}
log:     {every_steps: 1, to: []}
"""
    loaded = Recipe.from_values(yaml.safe_load(text))
    defaults = Recipe.from_values({"model": {"name_or_path": "smollm2-135m-instruct"}, "data": {"sources": [
        {"path": "data/personal_assistant.json", "format": "openai"}]}})  # fmt: skip
    assert loaded == defaults, "it spells the defaults out"


CONTRADICTIONS = {
    "one mask for a packed row": (["model.attention=sdpa"], "would see each other"),
    "one mask for several records": (
        ["model.attention=eager", "data.packing=none", "train.per_device_batch_size=2"],
        "micro-batch",
    ),
    "16-bit kernels": (["model.attention=varlen", "model.dtype=float32"], "16 bits"),
    "nothing packed": (["model.attention=varlen", "data.packing=none"], "each row is one"),
    "4 bits in pieces": (["method.name=qlora", "distributed.zero=zero3"], "zero2"),
    "DoRA in pieces": (["method.use_dora=true", "distributed.zero=deepspeed_zero3"], "DoRA"),
    "rewriting a quantised base": (["method.name=qlora", "method.init_lora_weights=pissa"], "rewrites the base"),
    "8-bit states in pieces": (["train.optimizer=adamw_8bit", "distributed.zero=zero1"], "adamw"),
    "one mask for a shared row": (
        ["model.attention=sdpa", "data.packing=none", "distributed.sequence_parallel_size=2"],
        "shared rows",
    ),
}


@pytest.mark.parametrize(("overrides", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_settings_that_contradict_each_other_are_refused_with_the_change(overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError, match="1 problem") as caught:
        Recipe.load("smollm2_135m_instruct_lora_personal_assistant_e3", overrides)
    assert said in str(caught.value)
    assert "; take " in str(caught.value)


def test_what_is_wrong_alone_and_what_is_wrong_together_are_in_one_message() -> None:
    wrong = ["train.learning_rate=-1", "method.name=qlora", "distributed.zero=zero3", "trian.seed=1"]
    with pytest.raises(UsageError, match="3 problems") as caught:
        Recipe.load("smollm2_135m_instruct_lora_personal_assistant_e3", wrong)
    assert all(said in str(caught.value) for said in ("learning_rate = -1", "did you mean 'train'", "zero2"))


def test_ranks_and_the_model_s_own_length_are_among_the_contradictions(tmp_path: Path) -> None:
    """Each is one line with its change; where the number of ranks is not known, a recipe for many is right."""
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    name = "smollm2_135m_instruct_lora_personal_assistant_e3"
    longer = ["data.isolate_documents=false", "data.max_length=100000"]
    shared = ["distributed.sequence_parallel_size=4"]
    for model, context in (("smollm2-135m-instruct", "8192"), (str(tmp_path), "512")):
        wrong = [*longer, *shared, f"model.name_or_path={model}", "method.name=qlora", "distributed.zero=zero3"]
        with pytest.raises(UsageError, match="3 problems") as caught:
            Recipe.load(name, wrong, world_size=1)
        for said in (f"data.max_length={context}", "NPROC_PER_NODE=4", "distributed.zero=zero2"):
            assert said in str(caught.value)
    assert Recipe.load(name, shared, world_size=8) == Recipe.load(name, shared)
    # positions begin anew at each document that is kept apart, so a long pack alone is no contradiction
    assert Recipe.load(name, ["data.max_length=100000"]).data.max_length == 100000


def test_all_contradictions_are_in_one_message() -> None:
    wrong = ["model.attention=sdpa", "method.name=qlora", "distributed.zero=zero3", "method.init_lora_weights=olora"]
    with pytest.raises(UsageError, match="3 problems"):
        Recipe.load("smollm2_135m_instruct_lora_personal_assistant_e3", wrong)
