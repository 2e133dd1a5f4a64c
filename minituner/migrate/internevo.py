"""An InternEvo config becomes a recipe, with its batch arithmetic written out.

    data = dict(seq_len=4096, micro_bsz=2, micro_num=4, pack_sample_into_one=False, total_steps=1000, ...)

    one row of InternEvo       seq_len x micro_bsz tokens in one packed row         = data.max_length
    rows before an update      micro_num                                            = train.gradient_accumulation_steps
    ranks with rows of their own  world / (tensor x pipeline x sequence parallel)    = data-parallel ranks

InternEvo lays `micro_bsz` sequences of `seq_len` end to end into one row of `micro_bsz * seq_len` tokens and keeps
documents apart by cu_seqlens; `pack_sample_into_one=True` lets them see each other. Lesson: notebook 08.
"""

from __future__ import annotations

import re
from typing import Any

from minituner.migrate.folding import Call, Config
from minituner.migrate.report import Fate, Imported, Row, short
from minituner.migrate.structure import at, whole

NOT_NEEDED = {
    "cudnn_benchmark": "",
    "cudnn_deterministic": "",
    "grad_scaler": "only float16 needs it",
    "monitor": "alerts of InternLM's cluster",
    "use_fp32_norm": "norms compute in float32 anyway",
    "valid_micro_num": "",
}
# Settings inside a section that nothing below speaks of: what becomes of them.
INSIDE: dict[str, tuple[Fate, str]] = {
    "data": ("not supported", "nothing here answers to this name"),
    "parallel": ("not supported", "nothing here answers to this name"),
    "adam": ("not supported", "the rest of AdamW is as torch has it (eps 1e-8)"),
    "lr_scheduler": ("not supported", "nothing here answers to this name"),
    "beta2_scheduler": ("not supported", "beta2 stays as adam.adam_beta2 says"),
    "hybrid_zero_optimizer": ("not needed", "how messages are sent is the engine's own choice"),
    "model": ("not needed", "shapes are in the model folder's config.json"),
    "ckpt": ("not needed", "checkpoints go into the run's folder, and --resume auto finds them"),
}
READ = {"data", "parallel", "adam", "lr_scheduler", "hybrid_zero_optimizer", "model", "ckpt", "beta2_scheduler"}
PIECES = {
    "SEQ_LEN",
    "JOB_NAME",
    "TRAIN_FOLDER",
    "VALID_FOLDER",
    "HIDDEN_SIZE",
    "NUM_ATTENTION_HEAD",
    "NUM_KV_ATTENTION_HEAD",
    "MLP_RATIO",
    "NUM_LAYER",
    "VOCAB_SIZE",
    "SAVE_CKPT_FOLDER",
    "LOAD_CKPT_FOLDER",
    "MODEL_ONLY_FOLDER",
    "CHECKPOINT_EVERY",
    "LEARNING_RATE",
    "MIN_LR",
    "WARMUP_RATIO",
    "TOTAL_STEP",
    "MULTIPLE_OF",
    "model_type",
}


def looks_like(config: Config) -> bool:
    """True for a config that InternEvo would train with."""
    return at(config.values, "data", "seq_len") is not None or "hybrid_zero_optimizer" in config.values


def convert(config: Config) -> Imported:
    """Carry an InternEvo config over."""
    out = Imported("InternEvo", config.path)
    name = config.values.get("JOB_NAME")
    name = name if isinstance(name, str) and name else config.path.stem
    out.values["name"] = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-") or "imported"
    _model(config, out)
    out.put("method.name", "full", "InternEvo trains every weight")
    _batch(config, out)
    _data(config, out)
    _optimizer(config, out)
    _saving(config, out)
    _rest(config, out)
    for statement in config.unread:
        out.leave(f"line {statement.line}: {statement.text[:60]}", "only assignments are read, and nothing is run")
    return out


def _rest(config: Config, out: Imported) -> None:
    """Every setting that nothing above has read, those inside the sections too."""
    said = {word for row in out.rows for word in re.findall(r"\w+", row.old)}
    for key, value in config.values.items():
        if key in NOT_NEEDED:
            out.leave(f"{key} = {short(value, 30)}", NOT_NEEDED[key], "not needed")
        elif key in READ:
            fate, why = INSIDE[key]
            inner = value.named if isinstance(value, Call) else value if isinstance(value, dict) else {}
            for name, setting in inner.items():
                if str(name) in said:
                    continue
                whole_size = key == "parallel" and 1 in (setting, at(setting, "size"))
                if setting is None or setting == "" or whole_size:
                    unset = "nothing is split by it" if whole_size else "it is not set"
                    out.leave(f"{key}.{name} = {short(setting, 30)}", unset, "not needed")
                else:
                    out.leave(f"{key}.{name} = {short(setting, 30)}", why, fate)
        elif key not in PIECES and key not in config.used:
            out.leave(f"{key} = {short(value, 30)}", "nothing here answers to this name")


def _model(config: Config, out: Imported) -> None:
    folder = at(config.values, "ckpt", "load_ckpt_info", "path") or config.values.get("MODEL_ONLY_FOLDER")
    kind = config.values.get("model_type")
    said = f"ckpt.load_ckpt_info.path = {short(folder)}" if folder else f"model_type = {short(kind)}"
    path = str(folder).split(":", 1)[-1] if isinstance(folder, str) else "internlm/internlm2-1_8b"
    out.put(
        "model.name_or_path",
        path,
        said,
        "changed",
        "a folder in the Hugging Face layout is needed: convert InternEvo's weights, or name a hub model",
    )
    if isinstance(dtype := at(config.values, "model", "dtype"), str):
        out.put(
            "model.dtype",
            "auto",
            f"model.dtype = {dtype}",
            "changed",
            "auto keeps the weights of full fine-tuning in float32, so that small updates are not rounded away",
        )
    recompute = at(config.values, "model", "checkpoint")
    if isinstance(recompute, bool | int | float):
        out.put(
            "train.activation_checkpointing",
            bool(recompute),
            f"model.checkpoint = {recompute}",
            "carried" if isinstance(recompute, bool) or recompute in (0, 1) else "changed",
            "" if isinstance(recompute, bool) or recompute in (0, 1) else "all layers are recomputed, or none",
        )


def _batch(config: Config, out: Imported) -> None:
    """seq_len, micro_bsz, micro_num and the parallel sizes, line by line."""
    data, parallel = at(config.values, "data"), at(config.values, "parallel")
    length, rows = whole(at(data, "seq_len"), 2048), whole(at(data, "micro_bsz"), 1)
    extra = whole(at(data, "gradient_accumulation"), 0)
    micro = whole(at(data, "micro_num"), extra or 1)
    packed = length * rows
    out.put(
        "data.max_length",
        packed,
        f"data.seq_len = {length}, data.micro_bsz = {rows}",
        "changed" if rows > 1 else "carried",
        f"InternEvo lays {rows} sequences end to end into one row of {packed} tokens" if rows > 1 else "",
    )
    out.put("train.per_device_batch_size", 1, f"data.micro_bsz = {rows}", "carried", "one packed row in a micro-batch")
    out.put(
        "train.gradient_accumulation_steps",
        micro,
        f"data.{'micro_num' if at(data, 'micro_num') else 'gradient_accumulation'} = {micro}",
    )
    sizes = {key: _size(at(parallel, key)) for key in ("tensor", "pipeline", "weight", "sequence_2D")}
    mode = at(parallel, "tensor", "mode")
    model_parallel = sizes["tensor"] * sizes["pipeline"]
    # isp: the sequence is split and weights are gathered; sequence_parallel: it is split between the tensor's parts.
    shares = sizes["tensor"] > 1 and (mode == "isp" or at(parallel, "sequence_parallel") is True)
    if shares:
        out.put(
            "distributed.sequence_parallel_size",
            sizes["tensor"],
            f"parallel.tensor = {sizes['tensor']} ({'isp' if mode == 'isp' else 'sequence_parallel = True'})",
            "changed",
            "as many ranks share a row, by DeepSpeed Ulysses",
        )
    elif at(parallel, "sequence_parallel") is not None:
        out.leave(
            f"parallel.sequence_parallel = {at(parallel, 'sequence_parallel')}", "no rank shares a row", "carried"
        )
    if sizes["tensor"] > 1 and not shares:
        out.leave(f"parallel.tensor = {sizes['tensor']}", "no tensor parallel here; zero3 shards the weights instead")
    if sizes["pipeline"] > 1:
        out.leave(
            f"parallel.pipeline = {sizes['pipeline']}", "no pipeline parallel here; zero3 shards the weights instead"
        )
    _sharding(parallel, sizes, mode, out)
    theirs = max(1, 8 // model_parallel)  # ranks with rows of their own on one machine of 8 devices
    ours = max(1, 8 // (sizes["tensor"] if shares else 1))
    more = "" if ours == theirs else f"; divide gradient_accumulation_steps by {ours // theirs} for the same batch"
    out.arithmetic += [
        f"one row: seq_len x micro_bsz = {length} x {rows} = {packed:,} tokens -> data.max_length",
        f"one optimizer step, each data-parallel rank: micro_num = {micro} rows = {micro * packed:,} tokens",
        f"data-parallel ranks: world / (tensor x pipeline) = world / ({sizes['tensor']} x {sizes['pipeline']})",
        f"on 8 devices, InternEvo: {theirs} ranks with rows of their own, {theirs * micro * packed:,} tokens a step",
        f"on 8 devices, here: {ours} ranks with rows of their own, {ours * micro * packed:,} tokens a step{more}",
    ]


def _sharding(parallel: Any, sizes: dict[str, int], mode: Any, out: Imported) -> None:
    """ZeRO for what InternEvo shards: optimizer states by zero1, weights by its weight, tensor and pipeline sizes."""
    old = f"parallel.zero1 = {short(_size(at(parallel, 'zero1')))}, weight = {sizes['weight']}"
    split_weights = sizes["weight"] > 1 or sizes["pipeline"] > 1 or (sizes["tensor"] > 1 and mode != "isp")
    if split_weights:
        out.put("distributed.zero", "zero3", old, "changed", "weights are sharded over all ranks")
    elif at(parallel, "zero1", "size") == 1 or at(parallel, "zero1") == 1:
        out.leave(old, "the optimizer's states are whole on every rank, as here without distributed.zero", "carried")
    elif at(parallel, "zero1") is not None:
        out.put("distributed.zero", "zero1", old)


def _size(value: Any) -> int:
    """`tensor=2`, `tensor=dict(size=2, mode="mtp")`: the size; -1 (all ranks) counts as 1."""
    inner = at(value, "size") if not isinstance(value, int) else value
    return whole(inner, 1)


def _data(config: Config, out: Imported) -> None:
    data = at(config.values, "data")
    folder = at(data, "train_folder") or config.values.get("TRAIN_FOLDER")
    root = folder if isinstance(folder, str) and folder else "data/tokenized"
    weights = _weights(at(data, "dataset_weights"))
    sources: list[dict[str, Any]] = [
        {"path": f"{root.rstrip('/')}/{name}", "format": "tokenized", "weight": weight}
        for name, weight in weights.items()
    ]
    out.values.setdefault("data", {})["sources"] = sources or [{"path": root, "format": "tokenized"}]
    out.leave(
        f"data.train_folder = {short(folder)}",
        "data.sources: folders of .bin files (format tokenized); for text, name its format instead",
        "carried",
    )
    if weights:
        text = ", ".join(f"{name}: {weight:g}" for name, weight in weights.items())
        why = "a source for each folder; a weight here is how often a record is used in an epoch: 1.0 once, 0.5 a half"
        out.rows.append(Row("changed", "data.dataset_weights", f"data.sources.N.weight = {text}", why))
    elif (given := at(data, "dataset_weights")) is not None:
        out.leave(
            f"data.dataset_weights = {short(given)}",
            "which folder each belongs to is not said: make a source of each in data.sources, with its weight",
        )
    joined = at(data, "pack_sample_into_one")
    out.put("data.packing", "concat", "packed rows cut anywhere", "carried")
    out.put("data.isolate_documents", joined is not True, f"data.pack_sample_into_one = {joined}")
    if at(data, "min_length"):
        out.leave(
            f"data.min_length = {short(at(data, 'min_length'))}",
            "a recipe uses short samples too; minituner.data.load_tokenized(folder, min_length=...) leaves them out",
        )
    steps = at(data, "total_steps") or at(config.values, "lr_scheduler", "total_steps")
    if isinstance(steps, int) and steps > 0:
        out.put("train.max_steps", steps, f"data.total_steps = {steps}")
    if isinstance(rampup := at(data, "rampup_batch_size"), str) and rampup:
        out.leave(f"data.rampup_batch_size = {rampup}", "every step has the full batch")


def _weights(given: Any) -> dict[str, float]:
    """Folder -> weight, of those that take part; empty where no folder is named."""
    given = given.named if isinstance(given, Call) else given
    if not isinstance(given, dict):
        return {}
    known = {name: value for name, value in given.items() if isinstance(name, str) and isinstance(value, int | float)}
    return {name: float(value) for name, value in known.items() if value > 0} if known == given else {}


def _optimizer(config: Config, out: Imported) -> None:
    adam, schedule = at(config.values, "adam"), at(config.values, "lr_scheduler")
    if isinstance(rate := at(adam, "lr"), int | float):
        out.put("train.learning_rate", rate, f"adam.lr = {short(rate)}")
    betas = at(adam, "adam_beta1"), at(adam, "adam_beta2")
    if all(isinstance(beta, int | float) for beta in betas):
        out.put("train.adam_betas", list(betas), f"adam.adam_beta1, adam_beta2 = {betas[0]}, {betas[1]}")
    if isinstance(decay := at(adam, "weight_decay"), int | float):
        out.put("train.weight_decay", decay, f"adam.weight_decay = {decay}")
    if isinstance(norm := at(config.values, "hybrid_zero_optimizer", "clip_grad_norm"), int | float) and norm > 0:
        out.put("train.max_grad_norm", norm, f"clip_grad_norm = {norm}")
    if isinstance(ratio := at(schedule, "warmup_ratio"), int | float) and 0 <= ratio < 1:
        out.put("train.warmup_ratio", ratio, f"lr_scheduler.warmup_ratio = {ratio}")
    out.put("train.lr_schedule", "cosine", "lr_scheduler (cosine)")
    if at(schedule, "eta_min"):
        out.leave(
            f"lr_scheduler.eta_min = {short(at(schedule, 'eta_min'))}", "the learning rate falls to zero", "changed"
        )


def _saving(config: Config, out: Imported) -> None:
    every = at(config.values, "ckpt", "checkpoint_every") or config.values.get("CHECKPOINT_EVERY")
    if isinstance(every, int) and every >= 1:
        out.put("save.every_steps", every, f"ckpt.checkpoint_every = {every}")
