"""The peers that train with transformers' Trainer or a child of it: transformers + peft, TRL, LLaMA-Factory, axolotl.

Each is called as its own documentation calls it, with its own packing and attention. What they share is hooked into
their common parent: before each step it waits, after it answers (`peer_steps.py`).

Documents are given with ids and labels, so that all train on the very same tokens. LLaMA-Factory packs only what it has
tokenised itself: it gets the records, in its own smollm2 template, and trains one token more a document, the line
break after the stop token. Lesson: notebook 07.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

from peer_steps import Steps


def follow(steps: Steps) -> None:
    """Let transformers' Trainer, and so all its children, stop between steps and count the tokens of each batch."""
    from transformers import Trainer, TrainerCallback

    class StepByStep(TrainerCallback):
        """Says that all is ready, waits before each step, answers after it."""

        def on_train_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
            steps.ready(model, optimizer)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.done()

    one_step, train = Trainer.training_step, Trainer.train

    def counted_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        pad = getattr(self.processing_class, "pad_token_id", None)
        steps.count(inputs["input_ids"], inputs["labels"], inputs.get("attention_mask"), pad)
        loss = one_step(self, model, inputs, *args, **kwargs)
        steps.loss = loss.item()
        return loss

    def followed_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(StepByStep())
        return train(self, *args, **kwargs)

    Trainer.training_step, Trainer.train = counted_step, followed_train


def put_aside(*names: str) -> None:
    """Empty modules in place of packages that have no build for this torch and that training on text never uses."""

    def empty_class(name: str) -> type:
        if name.startswith("__"):  # whoever looks around in modules finds nothing here
            raise AttributeError(name)
        return type(name, (), {})

    for name in names:
        module = types.ModuleType(name)
        module.__version__ = "0"
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__getattr__ = empty_class
        sys.modules[name] = module


def lora(spec: dict[str, Any]) -> Any:
    """The same adapter for all: rank 16 on all linear layers."""
    from peft import LoraConfig

    rank = spec["lora_rank"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def arguments(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """Settings of transformers' Trainer that all share; the optimizer is its own default, AdamW."""
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
    follow(steps)
    Trainer(
        model,
        TrainingArguments(**arguments(spec, folder)),
        train_dataset=Dataset.from_list(rows),
        data_collator=default_data_collator,
    ).train()


def run_trl(spec: dict[str, Any], steps: Steps, folder: str) -> None:
    """TRL's SFTTrainer, packing by best fit (bfd), documents kept apart by their positions."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    follow(steps)
    SFTTrainer(
        AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
        args=SFTConfig(
            **arguments(spec, folder),
            packing=True,
            packing_strategy="bfd",
            max_length=spec["max_length"],
            gradient_checkpointing=False,  # its default recomputes activations, which nobody else here does
        ),
        train_dataset=Dataset.from_list([document for pack in spec["packs"] for document in pack]),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        peft_config=lora(spec),
    ).train()


def run_llamafactory(spec: dict[str, Any], steps: Steps, folder: str) -> None:
    """LLaMA-Factory's `train` with neat_packing: one mask for the whole row, a block for each document."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"  # torchvision and torchaudio are demanded, and put aside
    put_aside("torchaudio")
    from llamafactory.train.tuner import run_exp

    place = Path(folder)
    (place / "records.json").write_text(json.dumps(spec["records"]), encoding="utf-8")
    (place / "dataset_info.json").write_text(json.dumps({"bench": {"file_name": "records.json"}}), encoding="utf-8")
    follow(steps)
    run_exp(
        {
            **arguments(spec, str(place / "out")),
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": spec["model"],
            "finetuning_type": "lora",
            "lora_rank": spec["lora_rank"],
            "lora_alpha": 2 * spec["lora_rank"],
            "lora_target": "all",
            "dataset": "bench",
            "dataset_dir": str(place),
            "template": "smollm2",
            "cutoff_len": spec["max_length"],
            "packing": True,
            "neat_packing": True,
            "disable_gradient_checkpointing": True,
            "overwrite_cache": True,
        }
    )


def run_axolotl(spec: dict[str, Any], steps: Steps, folder: str) -> None:
    """axolotl's `train` with sample_packing on documents that are tokenised already."""
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "ACCELERATE_USE_CPU": "true"}
    import yaml
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    place = Path(folder)
    documents = [{**document, "attention_mask": [1] * len(document["input_ids"])} for document in flat(spec)]
    lines = (json.dumps(document) for document in documents)
    (place / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    values = {
        "base_model": spec["model"],
        "datasets": [{"path": str(place / "documents.jsonl"), "ds_type": "json", "type": ""}],
        "dataset_prepared_path": str(place / "prepared"),
        "output_dir": str(place / "out"),
        "adapter": "lora",
        "lora_r": spec["lora_rank"],
        "lora_alpha": 2 * spec["lora_rank"],
        "lora_target_linear": True,
        "lora_mlp_kernel": False,  # these three are Triton kernels for a GPU, taken for granted if not forbidden
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "sequence_len": spec["max_length"],
        "sample_packing": True,
        "attn_implementation": "sdpa",
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": spec["learning_rate"],
        "lr_scheduler": "linear",
        "optimizer": "adamw_torch",
        "max_steps": 10_000,
        "save_strategy": "no",
        "val_set_size": 0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "float32": True,
    }
    (place / "axolotl.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    follow(steps)
    do_train(load_cfg(str(place / "axolotl.yaml")), TrainerCliArgs())


def flat(spec: dict[str, Any]) -> list[dict[str, list[int]]]:
    """All documents, pack after pack."""
    return [document for pack in spec["packs"] for document in pack]
