"""Old configs become recipes; every setting is carried, changed with a reason, or named as not supported."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from minituner.errors import UsageError
from minituner.migrate.importing import import_config
from minituner.recipe import Recipe
from tests.migrate.examples import INTERNEVO, XTUNER


def write(folder: Path, text: str, name: str = "internlm2_1_8b_qlora_alpaca_enzh_e3_copy.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_an_xtuner_config_becomes_the_recipe_it_describes(tmp_path: Path) -> None:
    done = import_config(write(tmp_path, XTUNER))
    recipe = done.recipe
    assert recipe.name == "internlm2_1_8b_qlora_alpaca_enzh_e3_copy"
    assert recipe.model.name_or_path == "internlm/internlm2-1_8b"
    assert recipe.model.trust_remote_code is False
    assert recipe.method.name == "qlora"
    assert (recipe.method.lora_rank, recipe.method.lora_alpha, recipe.method.lora_dropout) == (64, 16, 0.1)
    assert recipe.method.target_modules == "all-linear"
    first, second = recipe.data.sources
    assert (first.path, first.format) == ("tatsu-lab/alpaca", "alpaca")
    assert (second.path, second.format, second.limit) == ("data/中文.json", "alpaca_zh", 200)
    assert (recipe.data.template, recipe.data.max_length) == ("internlm2_chat", 2048)
    assert (recipe.data.packing, recipe.data.isolate_documents) == ("best_fit", True)
    train = recipe.train
    assert (train.per_device_batch_size, train.gradient_accumulation_steps, train.num_epochs) == (1, 16, 3)
    assert (train.learning_rate, train.weight_decay, train.max_grad_norm, train.seed) == (2e-4, 0, 1, 7)
    assert train.activation_checkpointing is True
    assert recipe.distributed.sequence_parallel_size == 2
    assert recipe.evaluate.prompts == ["请介绍一下你自己", "Name three colours."]
    assert recipe.evaluate.system
    assert (recipe.evaluate.every_steps, recipe.save.every_steps, recipe.save.keep_last) == (32, 32, 2)


def test_what_is_changed_says_why(tmp_path: Path) -> None:
    done = import_config(write(tmp_path, XTUNER))
    why = {row.old: row.why for row in done.rows if row.fate == "changed"}
    assert all(why.values())
    for key in ("trust_remote_code", "use_varlen_attn", "evaluation_freq", "save_steps", "optimizer", "pack_to_max"):
        assert any(key in old for old in why), key
    assert not [row for row in done.rows if row.fate == "not supported"]


def test_every_top_level_name_is_accounted_for(tmp_path: Path) -> None:
    text = XTUNER + "\nmy_own_setting = 5\nfor i in range(3):\n    print(i)\nsecret = compute()\n"
    done = import_config(write(tmp_path, text))
    left = [row.old for row in done.rows if row.fate == "not supported"]
    assert any("my_own_setting" in old for old in left)
    assert any("for i in range" in old for old in left)
    assert any("secret" in old for old in left)


def test_edits_below_the_structures_count_as_in_xtuner(tmp_path: Path) -> None:
    text = XTUNER + "\nmodel['lora']['r'] = 8\ntrain_dataloader['batch_size'] = 4\nmodel['use_varlen_attn'] = True\n"
    done = import_config(write(tmp_path, text))
    assert done.recipe.method.lora_rank == 8
    assert done.recipe.train.per_device_batch_size == 4
    assert any(row.old == "use_varlen_attn = True" and row.fate == "carried" for row in done.rows)


def test_full_and_eight_bit_and_max_iters(tmp_path: Path) -> None:
    text = XTUNER.replace("load_in_4bit=True", "load_in_8bit=True")
    text = text.replace(
        "train_cfg = dict(type=TrainLoop, max_epochs", "train_cfg = dict(type=TrainLoop, max_iters=33, x"
    )
    done = import_config(write(tmp_path, text))
    assert done.recipe.method.name == "int8_lora"
    text = XTUNER + "\nmodel['lora'] = None\nmodel['llm']['quantization_config'] = None\n"
    assert import_config(write(tmp_path, text)).recipe.method.name == "full"


def test_another_task_and_another_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="preference tuning"):
        import_config(write(tmp_path, XTUNER.replace("type=SupervisedFinetune", "type=DPO")))
    with pytest.raises(UsageError, match="neither an XTuner nor an InternEvo"):
        import_config(write(tmp_path, "x = 1"))


def test_an_internevo_config_with_its_batch_arithmetic(tmp_path: Path) -> None:
    done = import_config(write(tmp_path, INTERNEVO, "7b_sft.py"))
    recipe = done.recipe
    assert recipe.name == "7b_train"
    assert recipe.model.name_or_path == "models/internlm2-7b"
    assert (recipe.data.max_length, recipe.train.gradient_accumulation_steps) == (4096, 4)
    assert (recipe.data.packing, recipe.data.isolate_documents) == ("concat", True)
    assert (recipe.train.max_steps, recipe.train.learning_rate) == (50, 1e-4)
    assert tuple(recipe.train.adam_betas) == (0.9, 0.95)
    assert recipe.distributed.zero == "zero3"
    text = "\n".join(done.arithmetic)
    assert "2048 x 2 = 4,096" in text
    assert "4 ranks with rows of their own, 65,536 tokens" in text
    assert "here: 8 ranks with rows of their own, 131,072 tokens a step; divide" in text


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("pack_sample_into_one=False", "pack_sample_into_one=True", {"isolate": False}),
        ('mode="mtp"', 'mode="isp"', {"parallel": 2, "zero": "zero1"}),
        ("tensor=dict(size=2", "tensor=dict(size=1", {"zero": "zero1"}),
    ],
)
def test_internevo_s_switches(tmp_path: Path, old: str, new: str, expected: dict) -> None:
    recipe = import_config(write(tmp_path, INTERNEVO.replace(old, new))).recipe
    seen = {
        "isolate": recipe.data.isolate_documents,
        "parallel": recipe.distributed.sequence_parallel_size,
        "zero": recipe.distributed.zero,
    }
    assert expected.items() <= seen.items()


SHARED_LISTS = "boom = [1]\n" + "boom = [boom, boom]\n" * 200
ODD = [
    "boom",
    "compute()",
    "lambda: 1",
    "None",
    "-1",
    "True",
    "{'a': [1]}",
    "[boom]",
    "'text'",
    "1e300",
    "missing.name",
]
PLACES = sorted(
    {line.split("=")[0].strip() for line in (XTUNER + INTERNEVO).splitlines() if re.match(r"\w+ = ", line)}
    | {
        "model['lora']",
        "model['lora']['modules_to_save']",
        "model['lora']['target_modules']",
        "optim_wrapper['optimizer']",
        "optim_wrapper['optimizer']['betas']",
        "train_dataloader['dataset']",
        "custom_hooks[1]",
        "data['seq_len']",
        "data['dataset_weights']",
        "data['train_folder']",
        "parallel['tensor']",
        "adam['lr']",
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.sampled_from([XTUNER, INTERNEVO]), place=st.sampled_from(PLACES), odd=st.sampled_from(ODD))
@example(text=XTUNER, place="betas", odd="boom")
@example(text=XTUNER, place="optim_wrapper['optimizer']['betas']", odd="boom")
@example(text=XTUNER, place="model['lora']['modules_to_save']", odd="compute()")
@example(text=INTERNEVO, place="data['dataset_weights']", odd="boom")
def test_whatever_stands_anywhere_it_is_a_recipe_or_a_message(
    text: str, place: str, odd: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Lists that share their parts without end included: showing one whole would fill the memory."""
    path = write(tmp_path_factory.mktemp("odd"), f"{SHARED_LISTS}{text}\n{place} = {odd}\n")
    try:
        done = import_config(path)
        said = [json.dumps(done.to_dict()["recipe"]), *done.lines()]
    except UsageError as error:
        said = [error.text()]
    assert all(len(line) < 5000 for line in said)


def test_a_name_is_not_accounted_for_by_being_a_piece_of_another(tmp_path: Path) -> None:
    done = import_config(write(tmp_path, XTUNER + "\nra = 5\n"))
    assert any(row.old == "ra = 5" and row.fate == "not supported" for row in done.rows)


def test_varlen_without_packing_is_said_to_be_nothing(tmp_path: Path) -> None:
    text = XTUNER.replace("pack_to_max_length = True", "pack_to_max_length = False")
    done = import_config(write(tmp_path, text.replace("use_varlen_attn = False", "use_varlen_attn = True")))
    assert done.recipe.data.packing == "none"
    (row,) = [row for row in done.rows if row.old == "use_varlen_attn = True"]
    assert "nothing to keep apart" in row.why


def test_a_tokenized_folder_is_a_source(tmp_path: Path) -> None:
    dataset = """
train_dataset = dict(
    type=build_packed_dataset, packed_length=4096, seed=1024,
    dataset_cfg=dict(type=load_intern_repo_tokenized_dataset, folder='data/bin', min_length=50, file_type='.bin'),
)
train_dataloader = dict(batch_size=1, dataset=train_dataset)
"""
    done = import_config(write(tmp_path, XTUNER + dataset))
    assert [(s.path, s.format) for s in done.recipe.data.sources] == [("data/bin", "tokenized")]
    assert done.recipe.data.max_length == 4096
    assert any("min_length = 50" in row.old and row.fate == "not supported" for row in done.rows)


def test_internevo_s_weights_become_sources(tmp_path: Path) -> None:
    weights = "min_length=50, dataset_weights={'en': 1.0, 'cn': 0.5, 'old': 0},"
    done = import_config(write(tmp_path, INTERNEVO.replace("min_length=50,", weights)))
    sources = [(s.path, s.format, s.weight) for s in done.recipe.data.sources]
    assert sources == [
        ("data/tokenized/train/en", "tokenized", 1.0),
        ("data/tokenized/train/cn", "tokenized", 0.5),
    ]
    (row,) = [row for row in done.rows if row.old == "data.dataset_weights"]
    assert "how often a record is used" in row.why
    listed = INTERNEVO.replace("min_length=50,", "min_length=50, dataset_weights=[0.3, 0.7],")
    (row,) = [row for row in import_config(write(tmp_path, listed)).rows if "dataset_weights" in row.old]
    assert row.fate == "not supported"


def test_every_setting_inside_internevo_s_sections_is_accounted_for(tmp_path: Path) -> None:
    text = INTERNEVO.replace("adam_eps=1e-8", "adam_eps=1e-8, amsgrad=True")
    text += "loss = dict(label_smoothing=0.1)\nmonitor = dict(alert=True)\n"
    rows = import_config(write(tmp_path, text)).rows
    said = " ".join(row.old for row in rows)
    for inner in ("amsgrad", "adam_eps", "overlap_sync_grad", "valid_folder", "num_layers", "enable_save_ckpt", "loss"):
        assert inner in said, inner
    fates = {row.old.split(" =")[0]: row.fate for row in rows}
    assert fates["loss"] == "not supported"
    assert fates["monitor"] == "not needed"


def test_internevo_s_sequence_parallel_keeps_the_number_of_rows(tmp_path: Path) -> None:
    text = INTERNEVO.replace("parallel = dict(", "parallel = dict(sequence_parallel=True, ")
    done = import_config(write(tmp_path, text))
    assert done.recipe.distributed.sequence_parallel_size == 2
    assert done.recipe.distributed.zero == "zero3"
    assert any("here: 4 ranks with rows of their own, 65,536 tokens a step" in line for line in done.arithmetic)
    whole = INTERNEVO.replace("zero1=dict(size=8), tensor=dict(size=2", "zero1=dict(size=1), tensor=dict(size=1")
    assert import_config(write(tmp_path, whole)).recipe.distributed.zero is None


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(UsageError, match="is no file"):
        import_config(path)


def test_the_command_writes_a_recipe_that_loads_and_replaces_nothing(tmp_path: Path) -> None:
    from minituner.cli import app

    source = write(tmp_path, XTUNER)
    out = tmp_path / "mine.yaml"
    done = CliRunner().invoke(app, ["import-cfg", str(source), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "carried (" in done.output
    assert "minituner train" in done.output
    assert Recipe.load(out) == import_config(source).recipe
    again = CliRunner().invoke(app, ["import-cfg", str(source), "-o", str(out)])
    assert isinstance(again.exception, UsageError)
    facts = CliRunner().invoke(app, ["import-cfg", str(source), "-o", str(out), "--force", "--json"])
    loaded = json.loads(facts.output)
    assert loaded["kind"] == "XTuner"
    assert loaded["recipe"]["method"]["lora_rank"] == 64
