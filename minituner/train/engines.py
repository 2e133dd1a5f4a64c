"""Engines: how gradients become an update, on this machine or on many.

The loop talks to this small interface only. `TorchEngine` is plain PyTorch, data-parallel, the reading copy; the other
one (deepspeed_engine.py) cuts optimizer, gradients and parameters into pieces, and computes the same numbers:

    prepare(model)                     choose the parameters, make them the same on all ranks, build AdamW
    model                              what the loop calls
    backward(loss)                     add to this rank's gradients
    step(learning_rate) -> norm        sum over ranks, clip, update, clear
    all_sums(numbers) -> numbers       over all ranks
    weights() / state()                what a checkpoint keeps: whole tensors by name (all ranks call, rank 0 gets)
    load_state(weights, tensors)       put them back, after `prepare`
    exported()                         the state dict for save_pretrained, where the model itself has only pieces

Two ranks, one window of three micro-batches with 5, 3 and 2 supervised tokens (rank 1 has an empty one at the end):

    rank 0   backward(sum of 5 losses / 10)   backward(sum of 2 losses / 10)  --+
                                                                                 +-- all-reduce: SUM = the global mean
    rank 1   backward(sum of 3 losses / 10)   backward(0)                     --+

Lesson: notebook 07.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from minituner.model.adapters import trainable_parameters
from minituner.recipe import TrainSection
from minituner.train.optimizers import build_optimizer, load_optimizer_state, optimizer_state
from minituner.train.ranks import Ranks

BUCKET = 2**26  # numbers in one message (256 MB of float32): bounds the memory of the copy that is sent


class Engine(Protocol):
    """What the training loop needs from an engine; see the module's table."""

    ranks: Ranks
    rank: int
    world_size: int
    device: torch.device
    model: Any  # what the loop calls
    sharded: bool  # parameters lie in pieces: every rank has to take part in every forward pass, answers included

    def prepare(self, model: Any) -> None: ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self, learning_rate: float) -> float: ...

    def skip(self) -> None: ...

    def all_sum(self, number: float) -> float: ...

    def all_sums(self, numbers: Sequence[float]) -> list[float]: ...

    def weights(self) -> dict[str, torch.Tensor]: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load_state(self, weights: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None: ...

    def exported(self) -> dict[str, torch.Tensor] | None: ...

    def close(self) -> None: ...


class TorchEngine:
    """Plain PyTorch on one rank or several, every rank with the whole model."""

    sharded = False

    def __init__(self, train: TrainSection, device: str, ranks: Ranks | None = None) -> None:
        self.train, self.device, self.ranks = train, torch.device(device), ranks or Ranks()
        self.rank, self.world_size = self.ranks.world.rank, self.ranks.world.world_size
        self.parameters: dict[str, torch.nn.Parameter] = {}

    def prepare(self, model: Any) -> None:
        """Build AdamW over the trainable parameters, rank 0's on every rank."""
        self.model, self.parameters = model, trainable_parameters(model)
        share_parameters(self.parameters, self.ranks)
        self.optimizer = build_optimizer(self.parameters, self.train)

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradients; `loss` is already divided by all ranks' supervised tokens of the window."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Sum over ranks, clip the global norm, update, clear the gradients; returns the norm before clipping.

        A norm that is not finite updates nothing; the caller decides what follows.
        """
        self._sum_gradients()
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
        return self.ranks.all_sums([number])[0]

    def all_sums(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over all ranks, in one message."""
        return self.ranks.all_sums(numbers)

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained parameters by name."""
        return dict(self.parameters)

    def exported(self) -> None:
        """Nothing special: the model on rank 0 is whole."""

    def close(self) -> None:
        """Nothing to close."""

    def state(self) -> dict[str, torch.Tensor]:
        """What the optimizer keeps by parameter name, for AdamW `NAME/exp_avg`, `NAME/exp_avg_sq`, `NAME/step`."""
        return optimizer_state(self.optimizer, self.parameters)

    def load_state(self, weights: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved averages back; the weights are in the model already, and here the model is all there is."""
        load_optimizer_state(self.optimizer, self.parameters, tensors)

    def _sum_gradients(self) -> None:
        """Add up the gradients of all ranks, once per optimizer step, in one flat message (per 256 MB).

        A sum, and not DistributedDataParallel's mean: each loss is already divided by the supervised tokens of *all*
        ranks, so the gradients of the ranks are the terms of one global mean. A mean over ranks would be right only if
        every rank had the same number of supervised tokens, which packing never gives.

        A parameter without a gradient here may have one elsewhere; one without any on all ranks must keep none, or
        AdamW would decay it and count a step. So each message begins with one number per parameter: has it a gradient?
        """
        if not self.ranks.together:
            return
        for bucket in _buckets(self.parameters.values()):
            there = torch.tensor([float(p.grad is not None) for p in bucket], device=bucket[0].device)
            grads = [p.grad.flatten().float() if p.grad is not None else _zeros(p) for p in bucket]
            flat = torch.cat([there, *grads])
            self.ranks.sum_tensor(flat)
            holders, *sums = flat.split([len(bucket), *(p.numel() for p in bucket)])
            for parameter, some, total in zip(bucket, holders.tolist(), sums, strict=True):
                parameter.grad = total.view_as(parameter).to(parameter.dtype) if some else None


@torch.no_grad()
def share_parameters(parameters: Mapping[str, torch.nn.Parameter], ranks: Ranks) -> None:
    """Give every rank rank 0's trainable parameters, and see that they arrived.

    Raises:
        MinitunerError: the ranks have other parameters, or they did not arrive.
    """
    if not ranks.together:
        return
    ranks.assert_same("the trainable parameters", str([(n, p.shape) for n, p in parameters.items()]))
    for bucket in _buckets(parameters.values()):
        flat = torch.cat([p.flatten().float() for p in bucket])
        ranks.share_tensor(flat)
        for parameter, values in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.copy_(values.view_as(parameter))
    ranks.assert_same("the trainable weights", digest(parameters.values()))


def digest(tensors: Iterable[torch.Tensor], samples: int = 64) -> str:
    """A sha256 over evenly spaced values of each tensor, in float32: cheap, and different as soon as weights are."""
    seen = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().flatten()
        seen.update(values[:: max(1, len(values) // samples)].float().cpu().numpy().tobytes())
    return seen.hexdigest()


def _zeros(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters in runs of at most `BUCKET` numbers (a larger one goes alone), the same on every rank."""
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
