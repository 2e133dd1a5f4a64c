"""DeepSpeed behind the loop: recipes and JSON files, checkpoints across stages, kills, stops, and no compiler."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minituner import Recipe
from minituner.errors import UsageError
from minituner.train import checkpoint
from minituner.train.engines import TorchEngine
from minituner.train.launch import world_of
from minituner.train.ranks import Ranks
from minituner.train.zero import PRESETS, check_zero, deepspeed_config, stage_of
from tests.promises.test_one_rank_equals_two import uneven_chats
from tests.tiny import tiny_folder, tiny_model, tiny_recipe
from tests.train.processes import Command, Process, finish_all, rank_environments, ranks_of
from tests.train.zero_ranks import FINE, exported, finely_cut, largest_gap, metrics, run_all, saved

pytest.importorskip("deepspeed")

XTUNER_ZERO2 = {  # the file that XTuner ships, value for value
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 2, "overlap_comm": True},
    "fp16": {"enabled": "auto", "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
}


def recipe_with(zero: str | None, tmp_path: Path, **sections: dict[str, Any]) -> Recipe:
    return tiny_recipe(tmp_path / "m", tmp_path / "d.jsonl", distributed={"zero": zero}, **sections)


def json_file(values: Any, tmp_path: Path) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


# ---- recipes and files ----


@pytest.mark.parametrize("name", PRESETS)
def test_the_ancestors_names_are_the_same_presets(name: str, tmp_path: Path) -> None:
    assert recipe_with(f"deepspeed_{name}", tmp_path).distributed.zero == name
    assert stage_of(recipe_with(name, tmp_path)) == int(name[4])


@pytest.mark.parametrize(
    ("name", "said"),
    [("zero22", "did you mean 'zero2'?"), ("nowhere.json", "there is no such file"), ("fsdp", "known: zero1, zero2")],
)
def test_an_unknown_name_is_refused_at_load(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="problem") as caught:
        recipe_with(name, tmp_path)
    assert said in caught.value.text()


def test_auto_in_a_file_is_filled_from_the_recipe(tmp_path: Path) -> None:
    recipe = recipe_with(json_file(XTUNER_ZERO2, tmp_path), tmp_path, train={"max_grad_norm": 0.3})
    config = deepspeed_config(recipe, 4, bfloat16=True)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert (config["gradient_clipping"], config["gradient_accumulation_steps"]) == (0.3, 2)
    assert config["train_batch_size"] == 1 * 2 * 4
    assert config["bf16"]["enabled"] is True
    assert config["fp16"] == {"enabled": False, "initial_scale_power": 16}
    assert config["managed_gradient_accumulation"] is False
    assert "auto" not in json.dumps(config)


def test_every_contradiction_with_the_recipe_is_named(tmp_path: Path) -> None:
    given = {
        "zero_optimization": {"stage": 2},
        "gradient_accumulation_steps": 16,
        "gradient_clipping": 5.0,
        "fp16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100, "warmup_max_lr": "auto"}},
    }
    with pytest.raises(UsageError) as caught:
        check_zero(recipe_with(json_file(given, tmp_path), tmp_path))
    for name in given.keys() - {"zero_optimization"}:
        assert f"\n  {name}" in caught.value.what, name
    assert "gradient_accumulation_steps: 16 there, 2 by the recipe" in caught.value.what
    assert "optimizer.params.lr: 0.001 there, 0.01 by the recipe" in caught.value.what
    assert "betas" not in caught.value.what


@pytest.mark.parametrize("given", [[], {}, {"zero_optimization": {"stage": 0}}, {"zero_optimization": 2}])
def test_a_file_must_be_an_object_with_a_stage(given: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stage 1, 2 or 3"):
        check_zero(recipe_with(json_file(given, tmp_path), tmp_path))


def test_what_does_not_go_together_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    stage_3 = json_file({"zero_optimization": {"stage": 3}}, tmp_path)  # the presets are refused when a recipe loads
    with pytest.raises(UsageError, match="does not go with"):
        check_zero(recipe_with(stage_3, tmp_path, method={"name": "qlora"}))
    check_zero(recipe_with("zero2", tmp_path, method={"name": "qlora"}))
    with pytest.raises(UsageError, match="use_dora"):
        check_zero(recipe_with(stage_3, tmp_path, method={"use_dora": True}))
    with pytest.raises(UsageError, match="loss scaling"):
        check_zero(recipe_with("zero2", tmp_path, method={"name": "full"}, model={"dtype": "float16"}))


def test_without_the_package_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed") as caught:
        check_zero(recipe_with("zero2", tmp_path))
    assert "pip install 'minituner[deepspeed]'" in caught.value.text()
    check_zero(recipe_with(None, tmp_path))


# ---- the engine ----


def loss_of(model: Any, scale: float) -> torch.Tensor:
    return model(input_ids=torch.arange(12)[None]).logits.float().logsumexp(-1).sum() * scale


def equal_steps(ranks: Ranks, files: dict[str, str]) -> None:
    """Skips, gradients that are not finite, clipping, several rates: each engine after each event."""
    from minituner.train.deepspeed_engine import DeepSpeedEngine

    me = ranks.rank + 1.0
    events = [("step", [me, 1.0]), ("skip", [me]), ("step", [me]), ("step", [math.nan, 1.0]), ("step", [1.0, me, me])]
    for name, file in files.items():
        recipe = Recipe.load(file)
        plain, model = tiny_model(), tiny_model()
        engines = TorchEngine(recipe.train, "cpu", ranks), DeepSpeedEngine(recipe, "cpu", ranks)
        engines[0].prepare(plain)
        engines[1].prepare(model)
        assert engines[1].state() == {}, "nothing was updated yet"
        for number, (what, scales) in enumerate(events):
            norms = []
            for engine in engines:
                for scale in scales:
                    engine.backward(loss_of(engine.model, scale / 10))
                # A small rate: where a gradient is all but zero, AdamW turns its rounding into a whole step.
                norms.append(engine.skip() or 0.0 if what == "skip" else engine.step(3e-4 / (number + 1)))
            where = f"{name}, event {number}"
            assert math.isfinite(norms[0]) == math.isfinite(norms[1]), where
            if math.isfinite(norms[0]):
                assert norms[1] == pytest.approx(norms[0], rel=1e-5), where
            ours, theirs = engines[0].weights(), engines[1].weights()
            states = engines[0].state(), engines[1].state()
            if ranks.is_main:
                assert largest_gap({n: p.detach() for n, p in ours.items()}, theirs) < 1e-5, where
                assert largest_gap(*states) < 1e-5, where
            else:
                assert theirs == states[1] == {}, "only rank 0 gets them"
        assert loss_of(model, 1.0).item() == pytest.approx(loss_of(plain, 1.0).item(), rel=1e-4), name
        begun = dict(tiny_model().named_parameters())
        assert all(not torch.equal(p, begun[n]) for n, p in plain.named_parameters()), "the steps moved every parameter"
        engines[1].engine.destroy()


def joined(files: dict[str, str]) -> None:
    ranks = Ranks(world_of()).join()
    equal_steps(ranks, files)
    ranks.leave()


@pytest.mark.slow
def test_skips_clipping_and_nan_are_what_the_plain_engine_does(tmp_path: Path) -> None:
    files = {}
    zeros = {name: name for name in PRESETS} | {"finely": finely_cut(tmp_path)}
    for name, zero in zeros.items():
        train = {"max_grad_norm": 0.7, "weight_decay": 0.1, "learning_rate": 1e-2}
        recipe_with(zero, tmp_path, method={"name": "full"}, train=train).dump(tmp_path / f"{name}.yaml")
        files[name] = str(tmp_path / f"{name}.yaml")
    statuses, output = finish_all([Process(joined, files, cwd=tmp_path, environment=p) for p in rank_environments()])
    assert statuses == [0, 0], output


# ---- checkpoints ----


@pytest.mark.slow
def test_a_run_goes_on_under_any_stage_and_bit_for_bit_under_its_own(tmp_path: Path) -> None:
    model, data = tiny_folder(tmp_path / "model"), uneven_chats(tmp_path / "uneven.jsonl")
    finely = finely_cut(tmp_path)

    def recipe(zero: str | None, steps: int = 6) -> Recipe:
        return tiny_recipe(
            model,
            data,
            distributed={"zero": zero},
            method={"name": "full"},
            data={"packing": "none"},
            train={"max_steps": steps, "learning_rate": 1e-3, "lr_schedule": "constant", "weight_decay": 0.1},
            save={"every_steps": 3, "keep_last": 9},
        )

    zeros = {"none": None, "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "finely": finely}
    statuses, output = run_all({name: recipe(zero) for name, zero in zeros.items()}, tmp_path)
    assert statuses == [0, 0], output

    pairs = [(name, name) for name in zeros if name != "none"]
    pairs += [("zero2", "none"), ("zero2", "finely"), ("none", "zero2"), ("finely", "zero1")]
    resume = {f"{a}-{b}": f"{a}/checkpoints/step-000003" for a, b in pairs}
    statuses, output = run_all({f"{a}-{b}": recipe(zeros[b]) for a, b in pairs}, tmp_path, resume=resume)
    assert statuses == [0, 0], output
    assert output.count("at step 3 of 6") == len(pairs)
    for a, b in pairs:
        straight, resumed = (saved(tmp_path / name, 6).path for name in (b, f"{a}-{b}"))
        if a == b:
            for file in ("model.safetensors", "optimizer.safetensors"):
                assert (straight / file).read_bytes() == (resumed / file).read_bytes(), f"{a} resumed: {file}"
        assert largest_gap(saved(tmp_path / f"{a}-{b}", 6).weights, saved(tmp_path / "none", 6).weights) < 1e-6, (a, b)


@pytest.mark.slow
def test_bfloat16_keeps_float32_weights_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """bfloat16 weights are rounded from float32 ones, which are what checkpoints hold; LoRA over them stays float32."""
    model, data = tiny_folder(tmp_path / "model"), uneven_chats(tmp_path / "uneven.jsonl")

    def recipe(zero: str | None, method: str) -> Recipe:
        return tiny_recipe(
            model,
            data,
            distributed={"zero": zero},
            model={"dtype": "bfloat16"},
            method={"name": method},
            train={"max_steps": 4, "learning_rate": 1e-3, "lr_schedule": "constant"},
            save={"every_steps": 2, "keep_last": 9},
        )

    finely = finely_cut(tmp_path)
    full = {"zero2": recipe("zero2", "full"), "finely": recipe(finely, "full")}
    lora = {f"lora-{name}": recipe(zero, "lora") for name, zero in (("none", None), ("2", "zero2"), ("3", finely))}
    statuses, output = run_all(full | lora, tmp_path)
    assert statuses == [0, 0], output
    again = {f"{name}-again": run for name, run in full.items()}
    resume = {f"{name}-again": f"{name}/checkpoints/step-000002" for name in full}
    statuses, output = run_all(again, tmp_path, resume=resume)
    assert statuses == [0, 0], output
    for name in full:
        weights = saved(tmp_path / name, 4).weights
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert any(not torch.equal(t, t.bfloat16().float()) for t in weights.values()), "not merely rounded ones"
        for file in ("model.safetensors", "optimizer.safetensors"):
            files = [saved(tmp_path / run, 4).path / file for run in (name, f"{name}-again")]
            assert files[0].read_bytes() == files[1].read_bytes(), f"{name}: {file}"
        assert {tensor.dtype for tensor in exported(tmp_path / name).values()} == {torch.bfloat16}
    plain = saved(tmp_path / "lora-none").weights
    assert largest_gap(saved(tmp_path / "lora-2").weights, plain) < 1e-5
    # Stage 3 computes its loss through the model's own head (model/head.py), which rounds elsewhere in bfloat16.
    assert {tensor.dtype for tensor in saved(tmp_path / "lora-3").weights.values()} == {torch.float32}
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("lora-3", "lora-none")]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.slow
def test_what_runs_the_model_between_steps_sees_the_whole_model(tmp_path: Path) -> None:
    """Sample chats, held-out loss and identity probes: all ranks compute them under stage 3, one writes them."""
    model, data = tiny_folder(tmp_path / "model"), uneven_chats(tmp_path / "uneven.jsonl")
    runs = {
        name: tiny_recipe(
            model,
            data,
            distributed={"zero": zero},
            data={"holdout": 0.2},
            train={"max_steps": 1},
            evaluate={"identity": "Ada", "prompts": ["Hi", "What is 3?"]},
        )
        for name, zero in {"none": None, "finely": finely_cut(tmp_path)}.items()
    }
    statuses, output = run_all(runs, tmp_path)
    assert statuses == [0, 0], output
    files = {}
    for name in runs:
        (run_dir,) = (tmp_path / name / "runs").iterdir()
        files[name] = {path.name: path.read_text(encoding="utf-8") for path in (run_dir / "samples").iterdir()}
        files[name]["probes"] = json.loads((run_dir / "identity.json").read_text(encoding="utf-8"))["answers"]
        files[name]["eval"] = [line["eval_loss"] for line in metrics(tmp_path / name) if "eval_loss" in line]
    assert len(files["none"]["eval"]) == 2
    assert files["finely"].pop("eval") == pytest.approx(files["none"].pop("eval"), rel=1e-5)
    assert files["finely"] == files["none"]


@pytest.mark.slow
def test_qlora_under_zero_1_and_2_is_qlora(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, data = tiny_folder(tmp_path / "model"), uneven_chats(tmp_path / "uneven.jsonl")
    zeros = {"none": None, "zero1": "zero1", "zero2": "zero2", "offload": "zero2_offload"}
    runs = {
        name: tiny_recipe(model, data, distributed={"zero": zero}, method={"name": "qlora"}, train={"max_steps": 4})
        for name, zero in zeros.items()
    }
    statuses, output = run_all(runs, tmp_path)
    assert statuses == [0, 0], output
    for name in zeros:
        assert largest_gap(saved(tmp_path / name).weights, saved(tmp_path / "none").weights) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "finely"])
def test_killed_and_stopped_ranks_resume_as_if_nothing_had_happened(zero: str, tmp_path: Path) -> None:
    """One of two ranks is killed at a drawn step; resumed, the other gets SIGTERM; resumed again, the run ends."""
    model, data = tiny_folder(tmp_path / "model"), uneven_chats(tmp_path / "uneven.jsonl")
    tiny_recipe(
        model,
        data,
        distributed={"zero": finely_cut(tmp_path) if zero == "finely" else zero},
        method={"lora_dropout": 0.3},
        data={"packing": "none"},
        train={"max_steps": 24},
        save={"every_steps": 4, "keep_last": 9},
    ).dump(tmp_path / "r.yaml")

    def start(work_dir: str) -> list[Command]:
        return ranks_of(["train", "r.yaml", "--work-dir", work_dir, "--resume", "if-any"], tmp_path)

    statuses, output = finish_all(start("never"))
    assert statuses == [0, 0], output
    draw = random.Random(zero)
    victim, step = draw.randrange(2), draw.randrange(5, 10)
    ranks = start("w")
    assert ranks[0].wait_for_step(tmp_path / "w", step), ranks[0].output
    ranks[victim].send(signal.SIGKILL)
    statuses, output = finish_all(ranks)
    assert (statuses[victim], statuses[1 - victim]) == (-signal.SIGKILL, 1), output
    assert "lost contact with another rank" in output
    assert "Traceback" not in output

    ranks = start("w")
    assert ranks[0].wait_for_step(tmp_path / "w", step + 5), ranks[0].output
    ranks[1 - victim].send(signal.SIGTERM)
    statuses, output = finish_all(ranks)
    assert statuses == [75, 75], output
    assert output.count("stopped after step") == 1

    statuses, output = finish_all(start("w"))
    assert statuses == [0, 0], output
    never, again = (checkpoint.find(tmp_path / name, "auto", print) for name in ("never", "w"))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (never / file).read_bytes() == (again / file).read_bytes(), file
    assert exported(tmp_path / "w").keys() == exported(tmp_path / "never").keys()
    assert largest_gap(exported(tmp_path / "w"), exported(tmp_path / "never")) == 0


# ---- what surrounds it ----


@pytest.mark.slow
def test_no_compiler_no_noise_and_the_root_logger_untouched(tmp_path: Path) -> None:
    """A process of its own whose PATH has no compiler; DeepSpeed is imported only when the recipe asks for it."""
    model, data = tiny_folder(tmp_path / "model"), uneven_chats(tmp_path / "uneven.jsonl")
    tiny_recipe(model, data, train={"max_steps": 2}).dump(tmp_path / "r.yaml")
    tools = tmp_path / "bin"
    tools.mkdir()
    program = (
        "import logging, sys\n"
        "from minituner import Recipe, train\n"
        "train(Recipe.load('r.yaml'), 'plain', say=lambda line: None)\n"
        "assert 'deepspeed' not in sys.modules\n"
        "before = logging.getLogger().level, list(logging.getLogger().handlers)\n"
        "train(Recipe.load('r.yaml', ['distributed.zero=zero3']), 'w', say=lambda line: None)\n"
        "assert 'deepspeed' in sys.modules\n"
        "assert before == (logging.getLogger().level, list(logging.getLogger().handlers))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "DS_ACCELERATOR")}
    environment |= {"PATH": str(tools), "MINITUNER_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"TORCH_EXTENSIONS_DIR": str(tmp_path / "built"), "PYTHONPATH": os.getcwd()}
    assert shutil.which("g++", path=environment["PATH"]) is None
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "deepspeed" not in done.stderr.lower()
    assert "deprecated" not in done.stderr
    assert not (tmp_path / "built").exists(), "nothing was compiled"


@pytest.mark.slow
def test_the_command_lines_name_sets_the_recipe(tmp_path: Path) -> None:
    model, data = tiny_folder(tmp_path / "model"), uneven_chats(tmp_path / "uneven.jsonl")
    tiny_recipe(model, data, train={"max_steps": 1}).dump(tmp_path / "r.yaml")
    command = Command(["train", "r.yaml", "--work-dir", "w", "--deepspeed", "deepspeed_zero2"], tmp_path)
    assert command.finish() == 0, command.output
    assert Recipe.load(tmp_path / "w" / "recipe.yaml").distributed.zero == "zero2"
    command = Command(["train", "r.yaml", "--deepspeed", "zero9"], tmp_path)
    assert command.finish() == 2
    assert "known: zero1" in command.output


def test_the_finely_cut_file_cuts_more_than_the_preset() -> None:
    assert FINE.items() > PRESETS["zero3"].items()
