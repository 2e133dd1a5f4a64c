"""The catalog: every entry composes into a valid recipe, wrong names say which part is wrong, texts equal XTuner's."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.catalog import (
    compose,
    find_model,
    find_template,
    list_recipes,
    load,
    system_prompt,
)
from minituner.catalog.names import parse
from minituner.data.formats_table import FORMATS
from minituner.errors import UsageError
from minituner.recipe import Recipe

MODELS, METHODS, DATASETS = load("models"), load("methods"), load("datasets")
TEMPLATES, SYSTEM_PROMPTS = load("templates"), load("system_prompts")
FOLDER = Path(__file__).resolve().parents[2] / "minituner" / "catalog"
QUICKSTART = "smollm2_135m_instruct_lora_personal_assistant_e3"


def recipe(name: str) -> Recipe:
    return Recipe.from_values(compose(name), name)


# ---- every key composes


@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes_with_every_method(model: str) -> None:
    for method in METHODS:
        made = recipe(f"{model}_{method}_alpaca_e3")
        assert made.name == f"{model}_{method}_alpaca_e3"
        assert made.method.name == method
        assert made.data.max_length <= MODELS[model]["context"]
        assert made.data.template == MODELS[model]["template"]
        assert not made.model.trust_remote_code
        assert find_model(made.model.name_or_path)["key"] == model


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_dataset_composes(dataset: str) -> None:
    entry = DATASETS[dataset]
    made = recipe(f"qwen2_5_7b_instruct_qlora_{dataset}_e{entry['epochs']}")
    assert made.train.num_epochs == entry["epochs"]
    assert made.data.sources
    assert made.evaluate.prompts
    assert entry["for"] in made.notes
    if key := entry.get("system_prompt"):
        assert made.evaluate.system == SYSTEM_PROMPTS[key]


@pytest.mark.slow
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(METHODS)),
    st.sampled_from(sorted(DATASETS)),
    st.sampled_from(["1", "3", "10", "0.5", "2.25"]),
    st.lists(st.sampled_from(["gpu8", "sp4", "varlen", "32k", "400iters", "hf"]), unique=True, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_any_combination_is_a_valid_recipe(
    model: str, method: str, dataset: str, epochs: str, suffixes: list[str]
) -> None:
    name = "_".join([model, method, dataset, f"e{epochs}", *suffixes])
    made = recipe(name)
    assert made.name == name
    assert made.train.num_epochs == float(epochs)
    assert Recipe.from_values(yaml.safe_load(made.dump())) == made


def test_names_have_one_reading() -> None:
    """No two triples make the same name, whatever underscores their keys contain."""
    names = list_recipes()
    assert len(names) == len(set(names)) == len(MODELS) * len(METHODS) * len(DATASETS)
    spelled = {key: key for key in MODELS}, list(METHODS), {key: key for key in DATASETS}
    for triple in itertools.islice(itertools.product(MODELS, METHODS, DATASETS), 0, None, 37):
        parts = parse("_".join(triple) + "_e3", *spelled)
        assert (parts.model, parts.method, parts.dataset) == triple


# ---- what the composed recipe says


def test_quickstart_recipe_is_the_tuned_one() -> None:
    made = recipe(QUICKSTART)
    assert made.model.name_or_path == "smollm2-135m-instruct"
    assert made.data.template == "native"
    assert made.data.sources[0].path == "data/personal_assistant.json"
    assert made.data.sources[0].format == "openai"
    assert made.train.num_epochs == 3
    assert made.evaluate.every_steps is None
    assert made.save.every_steps is None
    tuned = DATASETS["personal_assistant"]["tuned"][0]
    for section, values in tuned["recipe"].items():
        for key, value in values.items():
            assert getattr(getattr(made, section), key) == value
    assert tuned["notes"].strip() in made.notes
    # another model gets the ordinary settings, not the measured ones
    assert recipe("smollm2_360m_instruct_lora_personal_assistant_e3").save.every_steps == 100


def test_sources_of_a_mix() -> None:
    assert [s.path for s in recipe("internlm2_7b_qlora_alpaca_enzh_oasst1_e3").data.sources] == [
        "tatsu-lab/alpaca",
        "silk-road/alpaca-data-gpt4-chinese",
        "timdettmers/openassistant-guanaco",
    ]
    assert [s.format for s in recipe("qwen_7b_qlora_lawyer_e3").data.sources] == ["crime_kg_assistant", "law_reference"]


def test_methods_have_their_learning_rates() -> None:
    assert recipe("llama2_7b_full_alpaca_e3").train.learning_rate == 2e-5
    assert recipe("llama2_7b_qlora_alpaca_e3").train.learning_rate == 2e-4
    assert recipe("llama2_7b_lora_alpaca_e3").train.learning_rate == 2e-4
    assert recipe("llama2_70b_qlora_alpaca_e3").train.learning_rate == 1e-4
    assert recipe("llama2_70b_qlora_alpaca_e3").method.lora_dropout == 0.05
    assert not recipe("smollm2_135m_full_alpaca_e3").train.activation_checkpointing


def test_suffixes_change_the_recipe() -> None:
    made = recipe("yi_34b_200k_full_alpaca_enzh_128k_sp8")
    assert made.data.max_length == 131072
    assert made.distributed.sequence_parallel_size == 8
    assert made.distributed.zero == "zero3"
    assert made.train.gradient_accumulation_steps == 8
    assert made.train.num_epochs == DATASETS["alpaca_enzh"]["epochs"]
    assert recipe("qwen1_5_110b_chat_qlora_alpaca_e3_16k_2gpus").data.max_length == 16384
    assert recipe("llama2_7b_full_pgbooks_400iters_sp4").train.max_steps == 400
    assert recipe("internlm2_7b_full_alpaca_e1_sequence_parallel_4").distributed.sequence_parallel_size == 4
    assert recipe("qwen_7b_qlora_moss_sft_all_e2_gpu8").train.gradient_accumulation_steps == 2
    assert recipe("qwen2_5_7b_lora_alpaca_512_e3").data.max_length == 512
    small = recipe("llama_7b_full_finetune_custom_dataset_e1")
    assert small.data.max_length == 2048
    assert "cut from 32768 to the model's 2048" in small.notes


def test_notes_warn_before_foreign_code_runs() -> None:
    assert "trust_remote_code" in recipe("internlm2_7b_qlora_alpaca_e3").notes
    assert "trust_remote_code=true" not in recipe("llama3_8b_qlora_alpaca_e3").notes


def test_no_system_text_for_a_template_without_a_place() -> None:
    assert recipe("minicpm_2b_lora_colorist_e5").evaluate.system is None


def test_results_are_yours_to_change() -> None:
    first = compose(QUICKSTART)
    rate = first["train"]["learning_rate"]
    first["train"]["learning_rate"] = rate + 1
    first["data"]["sources"][0]["path"] = "elsewhere"
    load("models")["llama_7b"]["hub"] = "elsewhere"
    find_template("qwen_chat")["STOP_WORDS"].append("elsewhere")
    find_model("llama_7b")["hub"] = "elsewhere"
    again = compose(QUICKSTART)
    assert again["train"]["learning_rate"] == rate
    assert again["data"]["sources"][0]["path"] == "data/personal_assistant.json"
    assert find_model("llama_7b")["hub"] == "huggyllama/llama-7b"
    assert find_template("qwen_chat")["STOP_WORDS"] == ["<|im_end|>", "<|endoftext|>"]


# ---- wrong names


@pytest.mark.parametrize(
    ("name", "said", "corrected"),
    [
        ("internlm2_1_8_qlora_alpaca_e3", ["model 'internlm2_1_8' is unknown"], "internlm2_1_8b_qlora_alpaca_e3"),
        ("qwen3_8b_qlroa_alpaca_e3", ["method 'qlroa' is unknown"], "qwen3_8b_qlora_alpaca_e3"),
        ("qwen3_8b_lora_alpacca_e3", ["data set 'alpacca' is unknown"], "qwen3_8b_lora_alpaca_e3"),
        ("qwen3_8b_lora_alpaca", ["epochs are missing"], "qwen3_8b_lora_alpaca_e3"),
        ("qwen3_8b_lora_alpaca_e0", ["'e0' must be above 0"], "qwen3_8b_lora_alpaca_e1"),
        ("qwen3_8b_lora_alpaca_ethree", ["'ethree' is no number"], "qwen3_8b_lora_alpaca_e3"),
        ("qwen3_8b_lora_alpaca_e3_fast", ["ending 'fast' is unknown"], "qwen3_8b_lora_alpaca_e3"),
        ("qwen3_8b_lora_alpaca_e3_sp2_sp4", ["stands twice"], "qwen3_8b_lora_alpaca_e3"),
        ("qwen3_8b__lora_alpaca_e3", ["underscore"], "qwen3_8b_lora_alpaca_e3"),
        ("lora_alpaca_e3", ["the model is missing"], QUICKSTART),
        ("qwen3_8_lorra_alpaca_zhh_e3", ["model", "data set"], "e3"),
        ("", ["missing"], QUICKSTART),
        ("个人助手", ["model '个人助手' is unknown"], QUICKSTART),
    ],
)
def test_an_unknown_name_says_which_part(name: str, said: list[str], corrected: str) -> None:
    with pytest.raises(UsageError) as caught:
        compose(name)
    error = caught.value
    for text in said:
        assert text in error.why
    assert corrected in error.fix
    assert error.next_command.startswith("minituner list-cfg")
    assert error.exit_code == 2


@pytest.mark.parametrize("name", ["llava_v15_7b_pretrain", "internlm2_chat_1_8b_dpo_full", "convert_phi_to_llama"])
def test_a_feature_that_is_not_here_is_named(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.load(name)
    assert caught.value.what.startswith(repr(name))
    assert caught.value.fix


@given(st.text(alphabet=st.sampled_from("qwen3_8b_lora_alpaca_e30._ -{}中"), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_recipe_or_a_usage_error(name: str) -> None:
    try:
        values = compose(name)
    except UsageError:
        return
    Recipe.from_values(values)


# ---- looking things up


def test_find_model_by_each_of_its_names() -> None:
    for name in (
        "smollm2_135m_instruct",
        "smollm2-135m-instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "huggingfacetb/smollm2-135m-instruct",
    ):
        assert find_model(name)["key"] == "smollm2_135m_instruct"
    assert find_model("ZhipuAI/chatglm3-6b")["key"] == "chatglm3_6b"
    assert find_model("deepseek_coder_6_7b_instruct")["key"] == "deepseekcoder_6_7b_instruct"
    assert find_model("no/such-model") is None
    assert next(iter(MODELS)) == "smollm2_135m_instruct"


def test_list_recipes_filters_and_sorts() -> None:
    names = list_recipes()
    assert len(names) > 1000
    assert names == sorted(names)
    found = list_recipes("InternLM2_1_8B_QLoRA")
    assert "internlm2_1_8b_qlora_alpaca_e3" in found
    assert all("internlm2_1_8b_qlora" in name for name in found)
    assert list_recipes("no such recipe") == []
    assert QUICKSTART in names


def test_unknown_keys_give_the_nearest() -> None:
    with pytest.raises(UsageError, match="qwen_chat"):
        find_template("qwenchat")
    with pytest.raises(UsageError, match="lawyer"):
        system_prompt("lawyr")
    with pytest.raises(UsageError, match="models"):
        load("nothing")


# ---- the lists themselves


def test_models_are_described() -> None:
    hubs = [entry["hub"] for entry in MODELS.values()]
    assert len(hubs) == len(set(hubs))
    for key, entry in MODELS.items():
        assert entry["kind"] in {"base", "chat"}, key
        assert entry["template"] == "native" or entry["template"] in TEMPLATES, key
        assert entry["kind"] == "chat" or entry["template"] != "native", key
        assert entry["attention"] in {"interface", "softcap", "own"}, key
        assert entry["native"] is (entry["needs"] is None), key
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry["hub"]), key
        assert entry["modelscope"] is None or re.fullmatch(r"[\w.-]+/[\w.-]+", entry["modelscope"]), key
        assert entry["licence"], key


def test_model_sizes_agree_with_their_names() -> None:
    """A size three times off (a slip of a digit) would mislead the memory plan."""
    checked = 0
    for key, entry in MODELS.items():
        said = re.search(r"(\d+(?:_\d+)?)(b|m)(?:_|$)", key)
        if said is None or "x" in key or "moe" in key or "a3b" in key:
            continue
        unit = {"b": 1e9, "m": 1e6}[said[2]]
        # 1_8b is 1.8b; in internlm2_7b the 2 belongs to the family
        readings = {float(said[1].replace("_", ".")), float(said[1].split("_")[-1])}
        assert any(0.7 < entry["size"] / (number * unit) < 1.45 for number in readings), key
        checked += 1
    assert checked > 100


def test_native_models_are_known_to_transformers() -> None:
    known = pytest.importorskip("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for key, entry in MODELS.items():
        assert (entry["architecture"] in known) is entry["native"], key


def test_data_sets_are_described() -> None:
    for key, entry in DATASETS.items():
        assert ("sources" in entry) is not ({"path", "format", "split"} <= entry.keys()), key
        assert entry["epochs"] > 0, key
        assert entry["for"], key
        assert "licence" in entry, key
        columns = FORMATS[entry["format"]].columns if entry.get("format") in FORMATS else None
        if columns and entry["format"] != "tokenized":  # whose columns are those of another file layout
            assert set(columns) <= set(entry["columns"]), key
        assert entry.get("rows", 1) > 0, key
        assert entry.get("system_prompt") is None or entry["system_prompt"] in SYSTEM_PROMPTS, key
        for tuned in entry.get("tuned", ()):
            assert tuned["model"] in MODELS, key
            assert tuned["method"] in METHODS, key


def _duplicates(node: yaml.Node, path: str) -> list[str]:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        found = [f"{path}: {key}" for key in keys if keys.count(key) > 1]
        return found + [text for key, value in node.value for text in _duplicates(value, f"{path}.{key.value}")]
    if isinstance(node, yaml.SequenceNode):
        return [text for item in node.value for text in _duplicates(item, path)]
    return []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_no_key_stands_twice(path: Path) -> None:
    """YAML keeps the last of two equal keys without a word."""
    assert _duplicates(yaml.compose(path.read_text(encoding="utf-8")), path.name) == []


def test_templates_have_known_fields() -> None:
    known = {"SYSTEM", "INSTRUCTION", "SUFFIX", "SUFFIX_AS_EOS", "SEP", "STOP_WORDS"}
    for key, entry in TEMPLATES.items():
        assert entry["for"], key
        fields = find_template(key)
        assert fields.keys() <= known, key
        assert "{input}" in fields["INSTRUCTION"], key
        assert "SYSTEM" not in fields or "{system}" in fields["SYSTEM"], key
    assert find_template("chatglm2")["INSTRUCTION"] == "[Round {round}]\n\n问：{input}\n\n答："
    assert system_prompt("medical").startswith("如果你是一名医生")


# ---- the shell


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("train internlm2_1_8b_qlora_alpaca_z", "internlm2_1_8b_qlora_alpaca_zh_e3"), ("list-mod", "list-models")],
)
def test_the_shell_completes_commands_and_recipe_names(typed: str, offered: str) -> None:
    words = f"minituner {typed}"
    environment = {"_MINITUNER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "import sys; sys.argv[0] = 'minituner'; from minituner.cli import app; app(prog_name='minituner')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.stdout.split() == [offered], done.stderr


# ---- what it costs


def test_listing_imports_little() -> None:
    """A fresh interpreter lists all names; heavy packages stay out (which is what makes it fast)."""
    code = (
        "import sys; from minituner.catalog import list_recipes; assert list_recipes('alpaca'); "
        "sys.exit(bool({'pydantic', 'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
