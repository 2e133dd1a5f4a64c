"""Engines: how gradients become an update, on this machine or on many.

The loop talks to this small interface only. `TorchEngine` is one process of plain PyTorch, the reading copy:

    prepare(model)                     choose the parameters, build AdamW
    backward(loss)                     add to the gradients
    step(learning_rate) -> norm        clip, update, clear
    all_sum(number) -> number          over all ranks
    state() / load_state(tensors)      what a checkpoint has to keep, as named tensors
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from minituner.model.adapters import trainable_parameters
from minituner.recipe import TrainSection


class Engine(Protocol):
    """What the training loop needs from an engine; see the module's table."""

    rank: int
    world_size: int
    device: torch.device

    def prepare(self, model: Any) -> Any: ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self, learning_rate: float) -> float: ...

    def skip(self) -> None: ...

    def all_sum(self, number: float) -> float: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None: ...


class TorchEngine:
    """One process, plain PyTorch."""

    rank, world_size = 0, 1

    def __init__(self, train: TrainSection, device: str) -> None:
        self.train, self.device = train, torch.device(device)
        self.parameters: dict[str, torch.nn.Parameter] = {}

    def prepare(self, model: Any) -> Any:
        """Build AdamW over the trainable parameters; weight decay on matrices only."""
        self.parameters = trainable_parameters(model)
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        vectors = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": self.train.weight_decay}]
        groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.train.learning_rate, betas=self.train.adam_betas, fused=self.device.type == "cuda"
        )
        return model

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradients; `loss` is already divided by the window's supervised tokens."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Clip the global norm, update, clear the gradients; returns the norm before clipping.

        A norm that is not finite updates nothing; the caller decides what follows.
        """
        limit = self.train.max_grad_norm if self.train.max_grad_norm is not None else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.skip()
        return norm

    def skip(self) -> None:
        """Forget the gradients without an update."""
        self.optimizer.zero_grad(set_to_none=True)

    def all_sum(self, number: float) -> float:
        """The sum over all ranks (one rank: the number itself)."""
        return number

    def state(self) -> dict[str, torch.Tensor]:
        """AdamW's averages by parameter name: `NAME/exp_avg`, `NAME/exp_avg_sq`, `NAME/step`."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved averages back."""
        for name, parameter in self.parameters.items():
            keys = {k: f"{name}/{k}" for k in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{k}" in tensors}
            if keys:
                # AdamW counts steps on the CPU, except its fused kernel, which reads the count on the GPU.
                step_device = parameter.device if self.optimizer.defaults["fused"] else torch.device("cpu")
                place = {k: (step_device if k == "step" else parameter.device) for k in keys}
                self.optimizer.state[parameter] = {k: tensors[v].to(place[k], copy=True) for k, v in keys.items()}
