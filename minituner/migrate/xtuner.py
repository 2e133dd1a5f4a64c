"""An XTuner 0.1/0.2 config becomes a recipe.

    model = dict(type=SupervisedFinetune, llm=dict(...), lora=dict(...))     -> model, method
    train_dataloader = dict(batch_size=1, dataset=dict(type=process_hf_dataset, ...))  -> data
    optim_wrapper, param_scheduler, train_cfg                                -> train
    custom_hooks, default_hooks, visualizer                                  -> evaluate, save, log

The structures at the end of a config decide, since XTuner reads those; the names at its top (`lr`, `batch_size`) are
what they were built from, and step in where a structure is missing. XTuner counts iterations, which are micro-batches;
a recipe counts optimizer steps. Lesson: notebook 08.
"""

from __future__ import annotations

import math
import re

from minituner.errors import UsageError
from minituner.migrate.folding import Config, Unread
from minituner.migrate.report import Imported, short
from minituner.migrate.structure import at, first, named, whole
from minituner.migrate.xtuner_data import carry_data
from minituner.migrate.xtuner_hooks import carry_hooks

OTHER_TASKS = {
    "LLaVAModel": "images (LLaVA)",
    "InternVL_V1_5": "images (InternVL)",
    "DPO": "preference tuning (DPO)",
    "ORPO": "preference tuning (ORPO)",
    "RewardModel": "reward models",
}
NOT_NEEDED = {
    "tokenizer": "the tokenizer comes with the model",
    "dataloader_num_workers": "packs lie ready on disk; no workers are needed",
    "log_level": "",
    "launcher": "the launcher is an option of the command",
    "load_from": "give the checkpoint to --resume",
    "resume": "`--resume auto` is an option of the command",
    "env_cfg": "",
    "log_processor": "metrics are counted in optimizer steps",
    "randomness": "",
    "optim_type": "",
    "strategy": "DeepSpeed is chosen by distributed.zero",
    "runner_type": "",
    "val_dataloader": "evaluate.holdout keeps records back",
    "val_cfg": "",
    "val_evaluator": "",
    "test_dataloader": "",
    "test_cfg": "",
    "test_evaluator": "",
}
LATER = {  # names that the structures are built from; they have been read with those
    "pretrained_model_name_or_path",
    "prompt_template",
    "max_length",
    "pack_to_max_length",
    "use_varlen_attn",
    "sequence_parallel_size",
    "batch_size",
    "accumulative_counts",
    "max_epochs",
    "max_iters",
    "lr",
    "betas",
    "weight_decay",
    "max_norm",
    "warmup_ratio",
    "save_steps",
    "save_total_limit",
    "evaluation_freq",
    "SYSTEM",
    "evaluation_inputs",
    "model",
    "train_dataset",
    "train_dataloader",
    "optim_wrapper",
    "param_scheduler",
    "train_cfg",
    "custom_hooks",
    "default_hooks",
    "visualizer",
    "sampler",
    "dataset_map_fn",
    "template_map_fn",
}


def looks_like(config: Config) -> bool:
    """True for a config that XTuner would train with."""
    keys = set(config.values)
    return bool(keys & {"train_dataloader", "optim_wrapper", "pretrained_model_name_or_path"})


def convert(config: Config) -> Imported:
    """Carry an XTuner config over.

    Raises:
        UsageError: it is for something minituner does not train.
    """
    out = Imported("XTuner", config.path)
    task = named(at(config.values, "model", "type"))
    if task in OTHER_TASKS:
        raise UsageError(
            f"{config.path} is for {OTHER_TASKS[task]}, which minituner does not train", fix="text models only"
        )
    out.values["name"] = re.sub(r"[^A-Za-z0-9._-]+", "_", config.path.stem).strip("._-") or "imported"
    accumulation = whole(first(config, ("optim_wrapper", "accumulative_counts"), "accumulative_counts"), 1)
    _model(config, out)
    _method(config, out)
    carry_data(config, out)
    _train(config, out, accumulation)
    carry_hooks(config, out, accumulation)
    _rest(config, out)
    return out


def _model(config: Config, out: Imported) -> None:
    llm = at(config.values, "model", "llm")
    path = first(config, ("model", "llm", "pretrained_model_name_or_path"), "pretrained_model_name_or_path")
    if isinstance(path, str) and path:
        out.put("model.name_or_path", path, f"pretrained_model_name_or_path = {short(path)}")
    else:
        out.put(
            "model.name_or_path",
            "smollm2-135m-instruct",
            f"pretrained_model_name_or_path = {short(path)}",
            "changed",
            "it names no model that can be read; set model.name_or_path",
        )
    if at(llm, "trust_remote_code"):
        out.leave(
            "model.llm.trust_remote_code = True",
            "code of a model runs only when you say so: model.trust_remote_code=true",
            "changed",
        )
    if dtype := at(llm, "torch_dtype"):
        out.put(
            "model.dtype",
            "auto",
            f"model.llm.torch_dtype = {short(dtype)}",
            "changed",
            "auto takes bfloat16 where the GPU has it; float16 needs loss scaling, which is not used here",
        )
    if wanted := at(llm, "attn_implementation"):
        out.put(
            "model.attention",
            "auto",
            f"model.llm.attn_implementation = {short(wanted)}",
            "changed",
            "auto takes the fastest implementation that isolates documents",
        )
    if longer := at(config.values, "model", "max_position_embeddings"):
        out.leave(f"model.max_position_embeddings = {short(longer)}", "positions are not rescaled")
    if extra := at(config.values, "model", "peft_model"):
        out.leave(f"model.peft_model = {short(extra)}", "merge that adapter first: minituner convert merge")


def _method(config: Config, out: Imported) -> None:
    lora, quantization = at(config.values, "model", "lora"), at(config.values, "model", "llm", "quantization_config")
    four, eight = at(quantization, "load_in_4bit"), at(quantization, "load_in_8bit")
    name = ("qlora" if four else "int8_lora" if eight else "lora") if lora else "full"
    old = (
        f"model.llm.quantization_config: {'4 bits' if four else '8 bits'}" if quantization else "no quantization_config"
    )
    out.put("method.name", name, f"{old}, {'model.lora' if lora else 'no model.lora'}")
    if four and at(quantization, "bnb_4bit_quant_type") not in (None, "nf4"):
        out.leave(
            f"bnb_4bit_quant_type = {short(at(quantization, 'bnb_4bit_quant_type'))}", "qlora is NF4 here", "changed"
        )
    if not lora:
        return
    for key, ours in (("r", "lora_rank"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout")):
        value = at(lora, key)
        if isinstance(value, int | float):
            out.put(f"method.{ours}", value, f"model.lora.{key} = {short(value)}")
    targets = at(lora, "target_modules")
    if targets is None:
        out.put("method.target_modules", "all-linear", "model.lora.target_modules = None")
    else:
        targets = list(targets) if isinstance(targets, tuple) else targets
        out.put("method.target_modules", targets, f"model.lora.target_modules = {short(targets)}")
    if saved := at(lora, "modules_to_save"):
        modules = list(saved) if isinstance(saved, tuple | list) else [saved] if isinstance(saved, str) else saved
        out.put("method.modules_to_save", modules, f"model.lora.modules_to_save = {short(saved)}")
    for key, ours in (("use_rslora", "use_rslora"), ("use_dora", "use_dora")):
        if at(lora, key):
            out.put(f"method.{ours}", True, f"model.lora.{key} = True")
    if at(lora, "bias") not in (None, "none"):
        out.leave(f"model.lora.bias = {short(at(lora, 'bias'))}", "biases stay frozen")


def _train(config: Config, out: Imported, accumulation: int) -> None:
    batch = whole(first(config, ("train_dataloader", "batch_size"), "batch_size"), 1)
    parallel = whole(config.values.get("sequence_parallel_size"), 1)
    out.put("train.per_device_batch_size", batch, f"batch_size = {batch}")
    out.put("train.gradient_accumulation_steps", accumulation, f"accumulative_counts = {accumulation}")
    if parallel > 1:
        out.put("distributed.sequence_parallel_size", parallel, f"sequence_parallel_size = {parallel}")
    length = out.values.get("data", {}).get("max_length", 2048)
    out.arithmetic.append(
        f"{batch} packs x {accumulation} micro-batches = {batch * accumulation} packs in an optimizer step, each device"
    )
    out.arithmetic.append(
        f"at most {batch * accumulation * length:,} tokens in an optimizer step, each device ({length:,} a pack)"
    )
    if parallel > 1:
        out.arithmetic.append(f"{parallel} devices share one pack, so {parallel} of them count as one device above")
    epochs, iterations = (
        first(config, ("train_cfg", "max_epochs"), "max_epochs"),
        at(config.values, "train_cfg", "max_iters"),
    )
    if isinstance(epochs, int | float) and epochs > 0:
        out.put("train.num_epochs", epochs, f"max_epochs = {epochs}")
    elif isinstance(iterations, int | float) and iterations >= 1:
        steps = max(1, math.ceil(iterations / accumulation))
        out.put(
            "train.max_steps",
            steps,
            f"max_iters = {short(iterations)}",
            "changed",
            f"iterations are micro-batches: {iterations} / {accumulation} = {steps} optimizer steps",
        )
    optimizer = at(config.values, "optim_wrapper", "optimizer")
    kind = named(at(optimizer, "type")) or named(config.values.get("optim_type"))
    _optimizer(kind, out)
    for key, ours in (("lr", "learning_rate"), ("weight_decay", "weight_decay"), ("betas", "adam_betas")):
        value = at(optimizer, key)
        value = config.values.get(key) if value is None else value
        if isinstance(value, int | float | tuple | list):
            out.put(
                f"train.{ours}", list(value) if isinstance(value, tuple | list) else value, f"{key} = {short(value)}"
            )
    norm = first(config, ("optim_wrapper", "clip_grad", "max_norm"), "max_norm")
    if isinstance(norm, int | float) and norm > 0:
        out.put("train.max_grad_norm", norm, f"max_norm = {norm}")
    if at(config.values, "optim_wrapper", "loss_scale") is not None:
        out.leave("optim_wrapper.loss_scale", "only float16 needs it", "not needed")
    if at(config.values, "model", "use_activation_checkpointing") is not None:
        value = bool(at(config.values, "model", "use_activation_checkpointing"))
    else:
        value = at(config.values, "model") is not None  # XTuner's default is on
    out.put("train.activation_checkpointing", value, f"use_activation_checkpointing = {value}")
    _schedule(config, out)
    seed = at(config.values, "randomness", "seed")
    if isinstance(seed, int):
        out.put("train.seed", seed, f"randomness.seed = {seed}")


def _optimizer(kind: str, out: Imported) -> None:
    from minituner.recipe import TrainSection

    if kind in ("AdamW", ""):
        return
    eight = "optimizer" in TrainSection.model_fields and kind in ("AdamW8bit", "PagedAdamW8bit")
    if eight:
        out.put(
            "train.optimizer",
            "adamw_8bit",
            f"optimizer = {kind}",
            "carried" if kind == "AdamW8bit" else "changed",
            "" if kind == "AdamW8bit" else "its states are not paged to the host",
        )
    else:
        out.leave(f"optimizer = {kind}", "AdamW is used", "changed")


def _schedule(config: Config, out: Imported) -> None:
    schedulers = at(config.values, "param_scheduler")
    schedulers = list(schedulers) if isinstance(schedulers, list | tuple) else [schedulers] if schedulers else []
    ratio = config.values.get("warmup_ratio")
    kinds = [named(at(one, "type")) for one in schedulers]
    shape = next(
        (
            ours
            for kind in kinds
            for name, ours in (("Cosine", "cosine"), ("Poly", "linear"), ("Constant", "constant"))
            if name in kind
        ),
        None,
    )
    if shape:
        out.put("train.lr_schedule", shape, f"param_scheduler: {', '.join(kinds)}")
        floor = next((at(one, "eta_min") for one in schedulers if at(one, "eta_min")), None)
        if floor:
            out.leave(f"eta_min = {short(floor)}", "the learning rate falls to zero", "changed")
    if isinstance(ratio, int | float) and 0 <= ratio < 1:
        out.put(
            "train.warmup_ratio",
            ratio,
            f"warmup_ratio = {ratio}",
            "carried",
            "every step of the warm-up trains; XTuner kept the rate near zero when the warm-up was one iteration",
        )


def _rest(config: Config, out: Imported) -> None:
    """Every top-level name that nothing above has read."""
    used = {word for row in out.rows for word in re.findall(r"\w+", row.old)}
    for name, value in config.values.items():
        if name in LATER or name in used:
            continue
        if name in NOT_NEEDED:
            out.leave(f"{name} = {short(value, 30)}", NOT_NEEDED[name], "not needed")
        elif isinstance(value, Unread):
            out.leave(f"{name} = {value.text[:40]}", f"line {value.line} would have to be run to know it")
        elif name not in config.used:
            out.leave(f"{name} = {short(value, 30)}", "nothing here answers to this name")
    for statement in config.unread:
        out.leave(f"line {statement.line}: {statement.text[:60]}", "only assignments are read, and nothing is run")
