"""A peer program in its own environment, taking one training step at a time: the other side of compare_training.py.

    python peer.py transformers | trl | llamafactory | xtuner

It speaks as `minituner/plan/bench_train_worker.py` does: a line of JSON says what to train on, then each line `step` is
one optimizer step and one line of JSON. Nothing of minituner is imported, as a peer's environment has none of it. Each
peer trains its own way with its own loop, packing and attention; the step is stopped between two steps of that loop.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IGNORE = -100
ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8")
PACKAGES = ("torch", "transformers", "peft", "trl", "llamafactory", "xtuner", "mmengine")


class Steps:
    """Waits for the word `step`, then measures until the step is over; counts what the model was given."""

    def __init__(self) -> None:
        self.began, self.tokens, self.supervised, self.documents = 0.0, 0, 0, 0

    def answer(self, value: dict[str, Any]) -> None:
        """One line for the parent."""
        print(json.dumps(value), file=ANSWERS, flush=True)

    def wait(self) -> None:
        """Until the parent says `step`; at the end of its input the program is over."""
        if not sys.stdin.readline():
            os._exit(0)
        self.began, self.tokens, self.supervised, self.documents = time.perf_counter(), 0, 0, 0

    def count(self, input_ids: Any, labels: Any, attention_mask: Any = None) -> None:
        """Real tokens of a batch, and those with a target."""
        real = attention_mask != 0 if attention_mask is not None else input_ids == input_ids
        self.tokens += int(real.sum())
        self.supervised += int((labels != IGNORE).sum())

    def done(self) -> None:
        """The step is over."""
        self.answer(
            {
                "seconds": time.perf_counter() - self.began,
                "tokens": self.tokens,
                "supervised_tokens": self.supervised,
                "peak_memory_gb": peak_memory_gb(),
            }
        )


def peak_memory_gb() -> float:
    """The most memory resident in this process so far, in GB (10^9 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    return 0.0


def versions() -> dict[str, str]:
    """What is installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def step_callback(steps: Steps) -> Any:
    """A callback of transformers' Trainer that stops between steps."""
    from transformers import TrainerCallback

    class StepByStep(TrainerCallback):
        """Says that all is ready, waits before each step, answers after it."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            steps.answer({"versions": versions()})

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.done()

    return StepByStep()


def count_in(trainer_class: Any, steps: Steps) -> None:
    """Let this Trainer class count the tokens of each batch before it trains on it."""
    original = trainer_class.training_step

    def training_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        steps.count(inputs["input_ids"], inputs["labels"], inputs.get("attention_mask"))
        return original(self, model, inputs, *args, **kwargs)

    trainer_class.training_step = training_step


def lora(spec: dict[str, Any]) -> Any:
    """The same adapter for all: rank 16 on all linear layers."""
    from peft import LoraConfig

    rank = spec["lora_rank"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def arguments(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """Settings of transformers' Trainer, and of TRL's, that all share."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": spec["learning_rate"],
        "max_steps": 10_000,  # the parent decides when it is over
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }


def run_transformers(spec: dict[str, Any], steps: Steps, folder: str) -> None:
    """transformers.Trainer + peft on rows of concatenated documents (they see each other, as in its examples)."""
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    rows = [
        {key: [token for document in pack for token in document[key]] for key in ("input_ids", "labels")}
        for pack in spec["packs"]
    ]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32), lora(spec))
    count_in(Trainer, steps)
    Trainer(
        model,
        TrainingArguments(**arguments(spec, folder)),
        train_dataset=Dataset.from_list(rows),
        data_collator=default_data_collator,
        callbacks=[step_callback(steps)],
    ).train()


def run_trl(spec: dict[str, Any], steps: Steps, folder: str) -> None:
    """TRL's SFTTrainer, packing by best fit (bfd), documents kept apart by their positions."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [document for pack in spec["packs"] for document in pack]
    # SFTConfig recomputes activations by default; turned off, as nobody else here does.
    config = SFTConfig(
        **arguments(spec, folder),
        packing=True,
        packing_strategy="bfd",
        max_length=spec["max_length"],
        gradient_checkpointing=False,
    )
    count_in(SFTTrainer, steps)
    SFTTrainer(
        AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        peft_config=lora(spec),
        callbacks=[step_callback(steps)],
    ).train()


def run_llamafactory(spec: dict[str, Any], steps: Steps, folder: str) -> None:
    """LLaMA-Factory's `train` with neat_packing on the same records, in its own template."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
    from llamafactory.train.tuner import run_exp

    place = Path(folder)
    records = [json.loads(line) for line in Path(spec["records"]).read_text(encoding="utf-8").splitlines()]
    (place / "records.json").write_text(json.dumps(records), encoding="utf-8")
    (place / "dataset_info.json").write_text(json.dumps({"bench": {"file_name": "records.json"}}), encoding="utf-8")
    values = arguments(spec, str(place / "out"))
    del values["use_cpu"]
    count_in(CustomSeq2SeqTrainer, steps)
    run_exp(
        {
            **values,
            "use_cpu": True,
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": spec["model"],
            "finetuning_type": "lora",
            "lora_rank": spec["lora_rank"],
            "lora_alpha": 2 * spec["lora_rank"],
            "lora_target": "all",
            "dataset": "bench",
            "dataset_dir": str(place),
            "template": "default",
            "cutoff_len": spec["max_length"],
            "packing": True,
            "neat_packing": True,
            "disable_gradient_checkpointing": True,
            "infer_dtype": "float32",
            "overwrite_cache": True,
        },
        callbacks=[step_callback(steps)],
    )


PEERS = {"transformers": run_transformers, "trl": run_trl, "llamafactory": run_llamafactory}


def main() -> None:
    """Run the peer that the command line names on what standard input says."""
    sys.stdout = sys.stderr  # libraries print; answers have a stream of their own
    spec = json.loads(sys.stdin.readline())
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        PEERS[sys.argv[1]](spec, Steps(), folder)


if __name__ == "__main__":
    main()
