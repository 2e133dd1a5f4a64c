"""The peers with a training loop of their own: XTuner (mmengine's Runner) and torchtune (its LoRA recipe).

Each is called as its own documentation calls it: XTuner with a config of its registry's types, torchtune with its
single-device recipe and a config. They get documents with ids and labels, so that all train on the very same tokens,
and pack them themselves. Lesson: notebook 07.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from peer_steps import Steps
from peer_trainers import flat, put_aside

PAD = 0  # SmolLM2's <|endoftext|>, which no document has


def run_xtuner(spec: dict[str, Any], steps: Steps, folder: str) -> None:
    """XTuner's `train` with pack_to_max_length, without use_varlen_attn, which needs flash-attn and so a GPU."""
    import torch
    import transformers  # before torchvision is put aside: it asks which version that has

    torch.cpu.is_bf16_supported = lambda: False  # it asks every device for that; this torch's CPU has no such answer
    put_aside("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    from datasets import load_dataset
    from mmengine.config import Config
    from mmengine.dataset import DefaultSampler
    from mmengine.hooks import Hook
    from mmengine.optim import OptimWrapper
    from mmengine.runner import Runner
    from peft import LoraConfig
    from xtuner.dataset import process_hf_dataset
    from xtuner.dataset.collate_fns import default_collate_fn
    from xtuner.engine.runner import TrainLoop
    from xtuner.model import SupervisedFinetune

    class StepByStep(Hook):
        """Says that all is ready, waits before each step, answers after it."""

        def before_train(self, runner: Any) -> None:
            steps.ready(runner.model.llm, runner.optim_wrapper.optimizer)

        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            steps.wait()
            batch = data_batch["data"]
            steps.count(batch["input_ids"], batch["labels"], batch["attention_mask"])

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            steps.loss = outputs["loss"].item()
            steps.done()

    place, rank = Path(folder), spec["lora_rank"]
    lines = (json.dumps(document) for document in flat(spec))
    (place / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    records = {"type": process_hf_dataset, "do_dataset_tokenization": False, "max_length": spec["max_length"]}
    records["dataset"] = {"type": load_dataset, "path": "json", "data_files": str(place / "documents.jsonl")}
    records["map_num_proc"] = 1  # by default 32 processes pack, each what it has: 32 short packs
    config = Config(
        {
            "model": {
                "type": SupervisedFinetune,
                "use_varlen_attn": False,
                "use_activation_checkpointing": False,  # its default recomputes activations, which nobody else does
                "llm": {
                    "type": transformers.AutoModelForCausalLM.from_pretrained,
                    "pretrained_model_name_or_path": readable_by_old_transformers(spec["model"], place / "model"),
                    "torch_dtype": torch.float32,
                },
                "lora": {
                    "type": LoraConfig,
                    "r": rank,
                    "lora_alpha": 2 * rank,
                    "lora_dropout": 0.0,
                    "task_type": "CAUSAL_LM",
                },
            },
            "train_dataloader": {
                "batch_size": 1,
                "num_workers": 0,
                "dataset": records,
                "sampler": {"type": DefaultSampler, "shuffle": True},
                "collate_fn": {"type": default_collate_fn, "use_varlen_attn": False},
            },
            "optim_wrapper": {
                "type": OptimWrapper,
                "optimizer": {"type": torch.optim.AdamW, "lr": spec["learning_rate"], "weight_decay": 0.0},
                "clip_grad": {"max_norm": 1, "error_if_nonfinite": False},
            },
            "train_cfg": {"type": TrainLoop, "max_epochs": 10_000},
            "default_hooks": {"checkpoint": None},  # nobody saves here
            "work_dir": str(place / "work"),
            "launcher": "none",
        },
        format_python_code=False,  # for the log; classes instead of names would not be Python
    )
    runner = Runner.from_cfg(config)
    runner.register_hook(StepByStep(), priority="LOWEST")
    runner.train()


def run_torchtune(spec: dict[str, Any], steps: Steps, folder: str) -> None:
    """torchtune's lora_finetune_single_device, PackedDataset, one mask for the whole row, a block for each document."""
    from omegaconf import OmegaConf
    from torchtune.training.metric_logging import DiskLogger

    class Answers(DiskLogger):
        """The recipe's log, once a step, is also the answer."""

        def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
            super().log_dict(payload, step)
            steps.loss = float(payload["loss"])
            steps.done()

    class Recipe(recipe_of_torchtune("lora_finetune_single_device").LoRAFinetuneRecipeSingleDevice):
        """The recipe, stopped between steps."""

        def setup(self, cfg: Any) -> None:
            super().setup(cfg)
            self._metric_logger = Answers(folder)
            steps.ready(self._model, self._optimizer)

        def save_checkpoint(self, epoch: int) -> None:
            """Nothing: nobody saves here, and this would do so at the end of every epoch."""

        def _loss_step(self, batch: dict[str, Any]) -> Any:
            steps.wait()
            steps.count(batch["tokens"], batch["labels"], pad=PAD)
            return super()._loss_step(batch)

    (Path(folder) / "documents.json").write_text(json.dumps(flat(spec)), encoding="utf-8")
    config = OmegaConf.create(torchtune_config(spec, folder))
    recipe = Recipe(config)
    recipe.setup(config)
    recipe.train()


def torchtune_config(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """The recipe's settings: its Llama 3.2 with the sizes of the model, and rotary positions without its rescaling."""
    sizes = json.loads((Path(spec["model"]) / "config.json").read_text(encoding="utf-8"))
    return {
        "model": {
            "_component_": "torchtune.models.llama3_2._component_builders.lora_llama3_2",
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "lora_rank": spec["lora_rank"],
            "lora_alpha": 2 * spec["lora_rank"],
            "vocab_size": sizes["vocab_size"],
            "num_layers": sizes["num_hidden_layers"],
            "num_heads": sizes["num_attention_heads"],
            "num_kv_heads": sizes["num_key_value_heads"],
            "embed_dim": sizes["hidden_size"],
            "intermediate_dim": sizes["intermediate_size"],
            "max_seq_len": sizes["max_position_embeddings"],
            "norm_eps": sizes["rms_norm_eps"],
            "rope_base": int(sizes["rope_parameters"]["rope_theta"]),
            "scale_factor": 1,
        },
        "tokenizer": {"_component_": "types.SimpleNamespace", "pad_id": PAD},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": spec["model"],
            "checkpoint_files": ["model.safetensors"],
            "output_dir": folder,
            "model_type": "LLAMA3_2",
        },
        "dataset": {
            "_component_": "peer_loops.packed_documents",
            "path": str(Path(folder) / "documents.json"),
            "max_seq_len": spec["max_length"],
            "packed": True,
        },
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "lr": spec["learning_rate"]},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 0,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": folder},
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "clip_grad_norm": 1.0,
        "shuffle": True,
        "epochs": 10_000,
        "max_steps_per_epoch": None,
        "resume_from_checkpoint": False,
        "compile": False,
        "seed": 42,
        "device": "cpu",
        "dtype": "fp32",
        "output_dir": folder,
    }


def packed_documents(tokenizer: Any, path: str, max_seq_len: int, packed: bool) -> Any:
    """torchtune's PackedDataset over the documents of a JSON file; its config names this function."""
    from torchtune.datasets import PackedDataset

    documents = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = [{"tokens": document["input_ids"], "labels": document["labels"]} for document in documents]
    return PackedDataset(rows, max_seq_len=max_seq_len, padding_idx=tokenizer.pad_id) if packed else rows


def recipe_of_torchtune(name: str) -> ModuleType:
    """A recipe's module; they lie beside the package and are not made to be imported by name."""
    import torchtune

    path = Path(torchtune.__file__).parents[1] / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def readable_by_old_transformers(model: str, folder: Path) -> str:
    """The model's folder with `rope_theta` where transformers 4 looks for it; without it, it silently takes 10,000."""
    folder.mkdir()
    for file in Path(model).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)
