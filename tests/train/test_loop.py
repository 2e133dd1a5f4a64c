"""The loop: it learns, every supervised token weighs the same, no NaN gets into a weight, what it writes loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from minituner import Recipe
from minituner.errors import MinitunerError, UsageError
from minituner.model.adapters import trainable_parameters
from minituner.train import loop
from minituner.train.callbacks import Callback
from minituner.train.loop import TrainResult, train
from minituner.train.stopwatch import PARTS
from tests.tiny import tiny_recipe, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_home")


class WeightsByStep(Callback):
    """The trained weights before the first step and after each."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def _keep(self, run: loop.Run) -> None:
        self.seen.append({n: p.detach().clone() for n, p in trainable_parameters(run.model).items()})
        self.model = run.model

    def on_start(self, run: loop.Run) -> None:
        self._keep(run)

    def on_step(self, run: loop.Run, metrics: dict[str, Any]) -> None:
        self._keep(run)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def quiet(recipe: Recipe, work_dir: Path, **options: Any) -> TrainResult:
    return train(recipe, work_dir, say=options.pop("say", lambda line: None), **options)


def test_it_learns_and_writes_what_the_design_says(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model_folder, chats, train={"num_epochs": 4}, evaluate={"every_steps": 5})
    said: list[str] = []
    result = quiet(recipe, tmp_path / "w", say=said.append)
    losses = [m["loss"] for m in result.metrics]
    assert losses[-1] < 0.7 * losses[0]
    assert [m["step"] for m in result.metrics] == list(range(1, 17))
    assert result.steps == 16
    assert result.metrics[-1]["epoch"] == 4

    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics
    keys = "step epoch loss learning_rate grad_norm supervised_tokens tokens trained_tokens seconds eta_seconds"
    keys += " computed_tokens"
    rates = "supervised_tokens_per_second tokens_per_second model_flops_per_second gemm_share peak_memory_gb"
    assert set(lines[0]) == {*keys.split(), *rates.split(), *(f"seconds_{part}" for part in PARTS)}

    assert Recipe.load(tmp_path / "w" / "recipe.yaml") == recipe
    assert (tmp_path / "w" / "latest").read_text().strip() == "step-000016"
    assert result.checkpoint.is_dir()
    samples = sorted(p.name for p in (result.run_dir / "samples").iterdir())
    assert samples == [f"step-{step:06d}.txt" for step in (0, 5, 10, 15, 16)]
    assert (result.run_dir / "samples" / samples[0]).read_text(encoding="utf-8").startswith("> Hi\n")
    assert (result.run_dir / "log.txt").read_text(encoding="utf-8").splitlines() == "\n".join(said).split("\n")

    text = "\n".join(said)
    assert "tokens  100.0%  raw" in text, "the ledger is printed"
    assert text.index("raw") < text.index("step 1/16"), "before training"
    assert "isolation proved" in text
    progress = [line for line in said if line.startswith("step ")]
    assert progress[0].startswith("step 1/16  loss ")
    assert progress[-1].startswith("step 16/16  loss ")
    assert all(word in progress[0] for word in ("lr ", "trained tokens/s", "ETA"))


@pytest.mark.parametrize("packing", ["none", "concat", "best_fit"])
def test_every_packing_trains_each_supervised_token_once_an_epoch(
    packing: str, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(model_folder, chats, data={"packing": packing}, train={"num_epochs": 2})
    result = quiet(recipe, tmp_path / "w")
    per_epoch = len(result.metrics) // 2
    for epoch in (result.metrics[:per_epoch], result.metrics[per_epoch:]):
        assert sum(m["supervised_tokens"] for m in epoch) == result.ledger["trained"]
    assert sum(m["loss"] for m in result.metrics[-3:]) < sum(m["loss"] for m in result.metrics[:3])


def test_one_denominator_for_the_window_the_last_and_short_one_too(
    model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    runs = []
    for batch, accumulation in ((1, 5), (5, 1)):
        sizes = {"per_device_batch_size": batch, "gradient_accumulation_steps": accumulation, "num_epochs": 1}
        recipe = tiny_recipe(model_folder, chats, data={"packing": "none"}, train=sizes)
        watch = WeightsByStep()
        runs.append((quiet(recipe, tmp_path / f"w{batch}", callbacks=[watch]), watch))
    (one, watch_one), (other, watch_other) = runs
    assert one.steps == other.steps == 3, "12 records in windows of 5: the last window has 2"
    for a, b in zip(one.metrics, other.metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["supervised_tokens"] == b["supervised_tokens"]
    for a, b in zip(watch_one.seen, watch_other.seen, strict=True):
        assert all(torch.allclose(a[n], b[n], atol=2e-5) for n in a)


def test_the_loss_of_a_window_is_the_mean_over_its_supervised_tokens(
    model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    """Computed once more with nothing but transformers, one document at a time."""
    from transformers import AutoModelForCausalLM

    recipe = tiny_recipe(model_folder, chats, train={"max_steps": 1, "gradient_accumulation_steps": 100})
    result = quiet(recipe, tmp_path / "w")
    from minituner.data.prepare import prepare

    data = prepare(recipe.data, tiny_tokenizer(), say=lambda line: None).dataset
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    total = count = 0
    for row in data:
        labels = torch.from_numpy(row["labels"])[None].long()
        logits = model(input_ids=torch.from_numpy(row["input_ids"])[None].long()).logits.detach()
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
        count += int((labels[0, 1:] != -100).sum())
    assert result.metrics[0]["supervised_tokens"] == count
    assert result.metrics[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_window_without_supervised_tokens_changes_nothing_and_says_so(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    turns = [{"role": "user", "content": "问题" * 60}, {"role": "assistant", "content": "好。"}]
    data.write_text(json.dumps({"messages": turns}, ensure_ascii=False) * 1 + "\n", encoding="utf-8")
    recipe = tiny_recipe(
        model_folder,
        data,
        data={"packing": "concat", "max_length": 64, "shuffle": True},
        train={"gradient_accumulation_steps": 1, "num_epochs": 2, "weight_decay": 0.1},
    )
    said: list[str] = []
    watch = WeightsByStep()
    result = quiet(recipe, tmp_path / "w", callbacks=[watch], say=said.append)
    empty = [m["step"] for m in result.metrics if m["supervised_tokens"] == 0]
    learned = [m["step"] for m in result.metrics if m["supervised_tokens"]]
    assert empty
    assert learned
    for step in empty:
        assert same(watch.seen[step - 1], watch.seen[step]), "bit for bit, weight decay and AdamW's momentum included"
        assert any(f"step {step}: no supervised token in this window" in line for line in said)
        assert result.metrics[step - 1]["loss"] == 0
    for step in learned:
        assert not same(watch.seen[step - 1], watch.seen[step])


def poisoned(monkeypatch: pytest.MonkeyPatch, at_call: int, value: float = math.nan) -> None:
    """From here on the loss of micro-batch `at_call` (counted from 1) is not finite, gradients too."""
    real, calls = loop.loss_sum, 0

    def loss_sum(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(*arguments) * (value if calls == at_call else 1.0)

    monkeypatch.setattr(loop, "loss_sum", loss_sum)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_at_the_place(
    value: float, model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, at_call=6, value=value)  # windows of 2: the second micro-batch of step 3
    recipe = tiny_recipe(model_folder, chats, save={"every_steps": 2})
    watch = WeightsByStep()
    with pytest.raises(MinitunerError, match=r"step 3: loss (nan|inf)") as caught:
        quiet(recipe, tmp_path / "w", callbacks=[watch])
    assert caught.value.exit_code == 1
    assert "packs [[" in caught.value.what, "the place is named"
    now = {n: p.detach() for n, p in trainable_parameters(watch.model).items()}
    assert same(now, watch.seen[2]), "the weights are those of step 2"
    assert sorted(p.name for p in (tmp_path / "w" / "checkpoints").iterdir()) == ["step-000002"]
    assert not (tmp_path / "w" / "hf").exists()


def test_a_loss_that_is_not_finite_can_be_skipped_and_is_counted(
    model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, at_call=5)
    recipe = tiny_recipe(model_folder, chats, train={"on_nonfinite": "skip"})
    said: list[str] = []
    watch = WeightsByStep()
    result = quiet(recipe, tmp_path / "w", callbacks=[watch], say=said.append)
    assert same(watch.seen[2], watch.seen[3]), "step 3 changed nothing"
    assert not same(watch.seen[3], watch.seen[4])
    assert all(torch.isfinite(t).all() for t in watch.seen[-1].values())
    assert any("step 3: loss nan" in line and "skipped (1 so far)" in line for line in said)
    assert json.loads((result.checkpoint / "state.json").read_text())["skipped_steps"] == 1
    third = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[2])
    assert third["loss"] == "nan", "valid JSON, whatever the number"


METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian, two layers": {"init_lora_weights": "gaussian", "target_modules": ["q_proj", "down_proj"]},
    "a layer in full beside it": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS.keys())
def test_the_saved_adapter_loads_with_peft_alone_and_equals_memory(
    settings: dict[str, Any], chats: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.tiny import tiny_folder

    base = tiny_folder(tmp_path / "base", tie=False)
    result = quiet(tiny_recipe(base, chats, method=settings, train={"max_steps": 3}), tmp_path / "w")
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.hf).eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.tensor([result.tokenizer.encode("Who are you? 你好")])
    result.model.eval()
    result.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        ours, theirs, before = (m(input_ids=ids).logits for m in (result.model, reloaded, plain))
    assert float((ours - before).abs().max()) > 1e-2, "it learned something"
    assert torch.allclose(ours, theirs, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(result.hf)
    assert tokenizer.chat_template == result.tokenizer.chat_template
    assert json.loads((result.hf / "minituner.json").read_text())["base"] == str(base)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_model_trained_in_full_loads_with_transformers_alone(tie: bool, chats: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.tiny import tiny_folder

    base = tiny_folder(tmp_path / "base", tie=tie)
    recipe = tiny_recipe(base, chats, method={"name": "full"}, train={"max_steps": 3, "learning_rate": 1e-3})
    result = quiet(recipe, tmp_path / "w")
    reloaded = AutoModelForCausalLM.from_pretrained(result.hf).eval()
    ids = torch.tensor([result.tokenizer.encode("Who are you? 你好")])
    result.model.eval()
    result.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(result.model(input_ids=ids).logits, reloaded(input_ids=ids).logits)
    same_storage = reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert same_storage == tie
    config = json.loads((result.hf / "config.json").read_text())
    assert config["use_cache"] is True, "off in training; who loads it wants it"


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_end_token_is_trained_even_where_it_is_the_pad_token_too(tie: bool, tmp_path: Path) -> None:
    """The stop token stands between two turns, so its embedding has a gradient as an input, too."""
    from tests.tiny import tiny_folder, write_chats

    base = tiny_folder(tmp_path / "base", tie=tie)
    recipe = tiny_recipe(base, write_chats(tmp_path / "c.jsonl"), method={"name": "full"}, train={"max_steps": 1})
    watch = WeightsByStep()
    result = quiet(recipe, tmp_path / "w", callbacks=[watch])
    stop = result.tokenizer.eos_token_id
    assert stop == result.tokenizer.pad_token_id
    name = "model.embed_tokens.weight"
    assert (watch.seen[0][name][stop] != watch.seen[1][name][stop]).all()


def test_metrics_can_be_written_less_often(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    result = quiet(tiny_recipe(model_folder, chats, log={"every_steps": 3}), tmp_path / "w")
    written = [json.loads(line)["step"] for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert written == [3, 6, 8], "every third and the last"


def test_activation_checkpointing_changes_no_number(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    losses = []
    for on in (False, True):
        recipe = tiny_recipe(model_folder, chats, train={"activation_checkpointing": on, "max_steps": 4})
        losses.append([m["loss"] for m in quiet(recipe, tmp_path / f"w{on}").metrics])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_same_seed_gives_the_same_run_and_another_another(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    losses = {}
    for number, seed in enumerate((1, 1, 2)):
        recipe = tiny_recipe(model_folder, chats, train={"seed": seed, "max_steps": 3}, method={"lora_dropout": 0.2})
        losses[number] = [m["loss"] for m in quiet(recipe, tmp_path / str(number)).metrics]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_what_one_rank_cannot_do_is_refused_at_once(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sequence_parallel_size"):
        quiet(tiny_recipe(model_folder, chats, distributed={"sequence_parallel_size": 2}), tmp_path / "w")
    assert not (tmp_path / "w" / "checkpoints").exists()


def test_target_modules_that_match_nothing_list_the_real_ones(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="q_projj") as caught:
        quiet(tiny_recipe(model_folder, chats, method={"target_modules": ["q_projj"]}), tmp_path / "w")
    assert "q_proj" in caught.value.fix
    assert "down_proj" in caught.value.why
