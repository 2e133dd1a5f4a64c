"""ZeRO: which stage, by name or by a DeepSpeed JSON, and what such a file may say.

AdamW keeps two averages for each parameter, and data-parallel training keeps all of it on every rank. ZeRO cuts what is
the same everywhere into one piece a rank (W ranks, P trained parameters, float32; bytes on each rank):

                       weights   gradients   averages   own copy of the weights that are updated here
    null (no ZeRO)       4P         4P          8P         -
    zero1                4P         4P          8P/W       4P/W    optimizer states cut
    zero2                4P         4P/W        8P/W       4P/W    and gradients
    zero3                4P/W       4P/W        8P/W       4P/W    and parameters, gathered layer by layer for use
    zero2_offload, zero3_offload    averages, gradients and own copy (zero3: the parameters too) in the CPU's memory

The recipe is what decides a run, so a JSON fills in *how* ZeRO works; what it says of batch sizes, clipping, precision
or the optimizer must be "auto" or agree. There is no stage 0 here: that is TorchEngine, which also refuses gradients
that are not finite, as DeepSpeed's stage 0 does not. Source: Rajbhandari et al. 2020 (ZeRO). Lesson: notebook 07.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minituner.errors import UsageError, nearest

if TYPE_CHECKING:
    from minituner.recipe import Recipe

PREFIX = "deepspeed_"  # the ancestor's names for the same: --deepspeed deepspeed_zero2
CPU = {"device": "cpu"}
# DeepSpeed sets a buffer of this many numbers aside on every rank; its default of 500 million is 2 GB in float32.
BUCKET = {"reduce_bucket_size": 50_000_000}
PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1, **BUCKET},
    "zero2": {"stage": 2, **BUCKET},
    "zero2_offload": {"stage": 2, **BUCKET, "offload_optimizer": CPU},
    "zero3": {"stage": 3, **BUCKET},
    "zero3_offload": {"stage": 3, **BUCKET, "offload_optimizer": CPU, "offload_param": CPU},
}


def zero_name(text: str) -> str:
    """`zero2`, `deepspeed_zero2` or the path of a JSON file, as `distributed.zero` holds it.

    Raises:
        ValueError: neither a preset nor a file; the nearest names are in it.
    """
    name = text.removeprefix(PREFIX)
    if name in PRESETS:
        return name
    if Path(text).is_file():
        return text
    if "/" in text or text.endswith(".json"):
        raise ValueError("there is no such file")
    hint = nearest(name, list(PRESETS))
    raise ValueError(f"{hint + ' ' if hint else ''}known: {', '.join(PRESETS)}, or a path to a DeepSpeed JSON")


def deepspeed_config(recipe: Recipe, world_size: int, *, bfloat16: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` is given: the preset or file of the recipe, with the recipe's own settings.

    Args:
        bfloat16: the trained parameters are bfloat16 (DeepSpeed then keeps float32 copies of them and sums in float32).

    Raises:
        UsageError: the file cannot be read, or contradicts the recipe; every contradiction is named.
    """
    zero = recipe.distributed.zero or ""
    given = {"zero_optimization": dict(PRESETS[zero])} if zero in PRESETS else _read(Path(zero))
    return _merge(given, _from_recipe(recipe, world_size, bfloat16), zero)


def stage_of(recipe: Recipe) -> int:
    """The ZeRO stage that the recipe asks for: 1, 2 or 3; 0 for none."""
    zero = recipe.distributed.zero
    if zero is None:
        return 0
    return PRESETS[zero]["stage"] if zero in PRESETS else _read(Path(zero))["zero_optimization"]["stage"]


def check_zero(recipe: Recipe) -> None:
    """Refuse, before anything is loaded, what DeepSpeed cannot do with this recipe here.

    Raises:
        UsageError: DeepSpeed is not installed, the JSON contradicts the recipe, or the method does not go with it.
    """
    if recipe.distributed.zero is None:
        return
    _assert_installed()
    deepspeed_config(recipe, 0, bfloat16=recipe.model.dtype == "bfloat16")
    if stage_of(recipe) == 3 and recipe.method.name in ("qlora", "int8_lora"):
        raise UsageError(
            f"distributed.zero={recipe.distributed.zero} does not go with method.name={recipe.method.name}",
            why="stage 3 cuts the base's weights into pieces, and quantised weights lose their scales that way",
            fix="distributed.zero=zero2: a quantised base is small, and it cuts all that belongs to the adapters",
        )
    if stage_of(recipe) == 3 and recipe.method.use_dora and recipe.method.name != "full":
        raise UsageError(
            f"distributed.zero={recipe.distributed.zero} does not go with method.use_dora",
            why="DoRA reads the base's weights beside their layer, where stage 3 leaves a rank only its piece of them",
            fix="distributed.zero=zero2, or method.use_dora=false",
        )
    if recipe.model.dtype == "float16" and recipe.method.name == "full":
        raise UsageError(
            "distributed.zero with model.dtype=float16 would need loss scaling",
            fix="model.dtype=bfloat16, or float32 where the hardware has no bfloat16",
        )


def _read(path: Path) -> dict[str, Any]:
    """The JSON object of a DeepSpeed file that names a stage from 1 to 3."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"distributed.zero: cannot read {path} as JSON: {error}") from None
    zero = given.get("zero_optimization") if isinstance(given, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise UsageError(
            f"distributed.zero: {path} must be a JSON object with zero_optimization.stage 1, 2 or 3; found {stage!r}",
            fix="distributed.zero=null is plain data-parallel training (what DeepSpeed calls stage 0)",
        )
    return given


def _from_recipe(recipe: Recipe, world_size: int, bfloat16: bool) -> dict[str, Any]:
    """The settings that the recipe decides, in DeepSpeed's words."""
    train = recipe.train
    micro, each = train.per_device_batch_size, train.gradient_accumulation_steps
    adamw = {"lr": train.learning_rate, "betas": list(train.adam_betas), "weight_decay": train.weight_decay}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": each,
        "train_batch_size": micro * each * world_size or "auto",  # 0: the ranks are not counted yet
        "gradient_clipping": train.max_grad_norm or 0.0,
        "bf16": {"enabled": bfloat16},
        "fp16": {"enabled": False},
        # Each step() of ours ends a window, whatever its length: the last one of an epoch may be shorter.
        "managed_gradient_accumulation": False,
        # AdamW is ours (train/engines.py), with offload too: DeepSpeed's own for CPUs has to be compiled first.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {**adamw, "eps": 1e-8}},
    }


def _merge(given: dict[str, Any], ours: dict[str, Any], origin: str) -> dict[str, Any]:
    """The file's settings with the recipe's; "auto" is replaced by the recipe's value, or by DeepSpeed's default."""
    wrong = _contradictions(given, ours, "")
    if _without_auto(given.get("scheduler", {})).get("params"):
        wrong.append("scheduler: the recipe has train.lr_schedule and train.warmup_ratio")
    if wrong:
        raise UsageError(
            f"distributed.zero: {origin} contradicts the recipe\n" + "\n".join(f"  {line}" for line in wrong),
            fix='write "auto" there, or leave the setting out: the recipe decides it',
        )
    config = {**_without_auto(given), **ours}
    for section in ("bf16", "fp16"):
        config[section] = {**_without_auto(given.get(section, {})), **ours[section]}
    if ours["bf16"]["enabled"]:
        config["data_types"] = {"grad_accum_dtype": "fp32", **config.get("data_types", {})}
    for ours_alone in ("optimizer", "scheduler"):  # objects of ours do both
        config.pop(ours_alone, None)
    if config["train_batch_size"] == "auto":
        del config["train_batch_size"]
    return config


def _contradictions(given: dict[str, Any], ours: dict[str, Any], path: str) -> list[str]:
    wrong = []
    for key, value in ours.items():
        theirs = given.get(key, "auto")
        if "auto" in (theirs, value):
            continue
        if isinstance(value, dict) and isinstance(theirs, dict):
            wrong += _contradictions(theirs, value, f"{path}{key}.")
        elif theirs != value:
            wrong.append(f"{path}{key}: {json.dumps(theirs)} there, {json.dumps(value)} by the recipe")
    return wrong


def _without_auto(given: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in given.items()
        if value != "auto"
    }


def _assert_installed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            "distributed.zero and distributed.sequence_parallel_size need DeepSpeed, which is not installed",
            next_command="pip install 'minituner[deepspeed]'",
        )


def name_accelerator(device: str) -> None:
    """Tell DeepSpeed that it computes on CPUs, before anything (accelerate, when a model is saved) imports it.

    Otherwise it looks for an accelerator by itself: it warns when there is none, and on a Mac it takes one that
    minituner does not use.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def import_deepspeed() -> Any:
    """The deepspeed package, set up for this machine: quiet, and without a compiler.

    Raises:
        UsageError: it is not installed.
    """
    import torch

    _assert_installed()
    name_accelerator("cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops

    # Its warnings on stdout ("OVERFLOW! Skipping step") are said by the loop already, with the step and the packs.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls torch.distributed by names that torch 2.13 warns of, at every step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+_tensor` is deprecated", category=FutureWarning)
    if not torch.cuda.is_available():
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        # On a CPU its communication layer would compile a C++ reduction over shared memory when it starts (and fail
        # where there is no compiler). The dictionary of usable ops may be edited (deepspeed/ops/__init__.py says so),
        # and is here before DeepSpeed asks compilers for it. Without that op it sums through torch.distributed, whose
        # order of summation is always the same: a run resumed bit for bit needs that.
        deepspeed.ops.__compatible_ops__ = dict.fromkeys([*ALL_OPS, "deepspeed_not_implemented"], False)
    return deepspeed


def join_deepspeed() -> None:
    """Let DeepSpeed talk through the process groups that torch.distributed already has (twice is harmless)."""
    deepspeed = import_deepspeed()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
