"""Optimizers: AdamW, its averages in 32 or in 8 bits, and its state as plain named tensors.

Two numbers are kept for every trained one, an average of its gradient and one of its square. Full fine-tuning of 1B
parameters keeps 8 GB of them:

    adamw        exp_avg, exp_avg_sq in float32     8 bytes a parameter; torch's fused kernel, on CPU and GPU
    adamw_8bit   state1, state2 in 8 bits           2 bytes, and one scale (absmax) for each block of 256

8 bits round the averages at each step, so it is another optimizer, close to the first but not equal. Tensors below
4096 numbers keep 32 bits (bitsandbytes' rule). Weight decay acts on matrices only: decaying a norm's scale pulls it to
zero for no reason. Sources: Loshchilov and Hutter 2019, Dettmers et al. 2022 (8-bit). Lesson: notebook 07.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from minituner.errors import UsageError
from minituner.recipe import TrainSection


def build_optimizer(parameters: Mapping[str, torch.nn.Parameter], train: TrainSection) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters; weight decay on matrices only.

    Raises:
        UsageError: it needs a package that is not installed.
    """
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}] if matrices else []
    groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.adam_betas, fused=True)
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"train.optimizer={train.optimizer} needs the package bitsandbytes",
            fix="install it, or use train.optimizer=adamw",
            next_command="pip install 'minituner[quantization]'",
        )
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, lr=train.learning_rate, betas=train.adam_betas)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Everything the optimizer keeps, as `NAME/KEY` -> tensor (a plain count as an int64 scalar)."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Put what `optimizer_state` gave back, each tensor where the optimizer expects it.

    Raises:
        UsageError: the state is another optimizer's.
    """
    plain = isinstance(optimizer, torch.optim.AdamW)
    first = "exp_avg" if plain else "state1"
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        by_name.setdefault(parameter_name, {})[key] = value
    for name, parameter in parameters.items():
        saved = by_name.get(name)
        if saved is None:
            continue  # no gradient so far, so no averages
        if first not in saved:
            raise UsageError(
                f"the checkpoint's optimizer is not this one ({type(optimizer).__name__})",
                why=f"it keeps {', '.join(sorted(saved))} of {name}",
                fix="set train.optimizer to what the run had",
            )
        state = {key: value.to(parameter.device, copy=True) for key, value in saved.items()}
        if not plain:  # bitsandbytes counts steps in a Python number
            state["step"] = int(saved["step"])
        optimizer.state[parameter] = state
