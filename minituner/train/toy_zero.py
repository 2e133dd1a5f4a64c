"""Toy ZeRO: AdamW whose memory is shared out over the ranks, small enough to read in one sitting.

Every layer's parameters stand in one flat row, cut into W equal parts; rank r answers for part r, its shard.

    what rank 1 of 2 holds    weights        gradients      averages (m, v)
      stage 0                 [########]     [########]     [########] x 2     plain data parallel
      stage 1                 [########]     [########]     [    ####] x 2     + optimizer states cut
      stage 2                 [########]     [    ####]     [    ####] x 2     + gradients cut
      stage 3                 [    ####]     [    ####]     [    ####] x 2     + parameters cut

    stage 2   backward of a layer done -> reduce-scatter its gradient, keep the own part, drop the rest
    stage 3   before a layer's forward, and again before its backward -> all-gather its weights; drop them after

The update is the same at all stages, number for number. `Ring` sends the parts by hand and counts every byte. What a
real engine adds: overlap of sending and computing, offload, mixed precision. ZeRO: arXiv 1910.02054.
The formulas for what it holds and sends are in zero_bytes.py. Lesson: notebook 07.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from minituner.errors import UsageError
from minituner.train.ranks import Ranks


class Ring:
    """Collectives made of one move: give a part to the next rank, take one from the rank before.

    `sent` counts the bytes this rank has given away, by collective.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.rank, self.world_size = ranks, ranks.rank, ranks.world.world_size
        self.sent: Counter[str] = Counter()

    def reduce_scatter(self, row: torch.Tensor) -> torch.Tensor:
        """Part `rank` of the sum of all ranks' rows (W * n,), shape (n,); the rest of `row` is overwritten."""
        parts = row.chunk(self.world_size)
        for hop in range(1, self.world_size):
            taken = self._pass("reduce-scatter", parts[(self.rank - hop) % self.world_size])
            parts[(self.rank - hop - 1) % self.world_size].add_(taken)
        return parts[self.rank]

    def all_gather(self, row: torch.Tensor) -> None:
        """Fill `row` (W * n,), of which this rank has written part `rank`, with everybody's part."""
        parts = row.chunk(self.world_size)
        for hop in range(1, self.world_size):
            taken = self._pass("all-gather", parts[(self.rank - hop + 1) % self.world_size])
            parts[(self.rank - hop) % self.world_size].copy_(taken)

    def all_reduce(self, row: torch.Tensor) -> None:
        """Replace `row` (W * n,) by the sum of all ranks' rows: a reduce-scatter, then an all-gather."""
        self.reduce_scatter(row)
        self.all_gather(row)

    def _pass(self, collective: str, part: torch.Tensor) -> torch.Tensor:
        taken = torch.empty_like(part)
        with self.ranks.contact():
            request = dist.isend(part, (self.rank + 1) % self.world_size)
            dist.recv(taken, (self.rank - 1) % self.world_size)
            request.wait()
        self.sent[collective] += part.numel() * part.element_size()
        return taken


class Layer:
    """One layer's parameters as a flat row of W equal parts (zeros at the end fill the last), and this rank's shard."""

    def __init__(self, name: str, module: torch.nn.Module, ring: Ring, stage: int) -> None:
        self.name, self.ring, self.stage = name, ring, stage
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.sizes = [p.numel() for p in self.parameters]
        part = math.ceil(sum(self.sizes) / ring.world_size)
        self.row = torch.zeros(part * ring.world_size)
        self.row[: sum(self.sizes)] = torch.cat([p.detach().flatten() for p in self.parameters])
        self.views = [v.view_as(p) for v, p in zip(self._cut(self.row), self.parameters, strict=True)]
        self._show(self.views)
        whole = slice(0, len(self.row))
        self.mine = whole if stage == 0 else slice(part * ring.rank, part * (ring.rank + 1))
        self.shard = self.row[self.mine]
        self.gradient: torch.Tensor | None = None  # stages 2 and 3: the sum over all ranks, of the own part only
        self.ready = 0
        self.averages = torch.zeros(2, len(self.shard))  # AdamW's m and v
        if stage == 3:
            self.shard = self.shard.clone()
            self.release()

    def gather(self) -> None:
        """Stage 3: get the other ranks' parts of the weights."""
        self.row.untyped_storage().resize_(self.row.numel() * self.row.element_size())
        self.row[self.mine] = self.shard
        self.ring.all_gather(self.row)
        self._show(self.views)

    def release(self) -> None:
        """Stage 3: give the memory of the whole row back.

        Only its storage goes: autograd has kept views of it for the backward pass, and finds them filled again after
        the next `gather`. The parameters show nothing meanwhile; reading freed storage would crash the process.
        """
        self._show([torch.empty(0)] * len(self.views))
        self.row.untyped_storage().resize_(0)

    def reduce(self) -> None:
        """Sum the gradients of all ranks and keep the own part; the parameters' own gradients are dropped."""
        row = torch.zeros(len(self.row))
        for view, parameter in zip(self._cut(row), self.parameters, strict=True):
            view.copy_(parameter.grad.flatten())
            parameter.grad = None
        if self.stage == 0:
            self.ring.all_reduce(row)
            self.gradient = row
        else:
            part = self.ring.reduce_scatter(row)
            self.gradient = part.clone() if self.gradient is None else self.gradient + part
        self.ready = 0

    def held(self) -> dict[str, int]:
        """Bytes that this layer takes here, now."""
        weights = self.row.untyped_storage().nbytes() + (_bytes(self.shard) if self.stage == 3 else 0)
        gradients = [p.grad for p in self.parameters] + [self.gradient]
        return {
            "weights": weights,
            "gradients": sum(_bytes(g) for g in gradients if g is not None),
            "optimizer": _bytes(self.averages),
        }

    def _cut(self, row: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return row[: sum(self.sizes)].split(self.sizes)

    def _show(self, tensors: list[torch.Tensor]) -> None:
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor


class ToyZero:
    """AdamW over a model's layers at ZeRO stage 0, 1, 2 or 3: `loss.backward()`, then `step()`."""

    def __init__(self, model: torch.nn.Module, ranks: Ranks, stage: int, lr: float, **adamw: Any) -> None:
        self.stage, self.ring, self.lr, self.adamw, self.steps = stage, Ring(ranks), lr, adamw, 0
        self.layers = [Layer(name, module, self.ring, stage) for name, module in _layers(model)]
        self.peak: dict[str, int] = {}
        for layer, (_, module) in zip(self.layers, _layers(model), strict=True):
            if stage == 3:
                module.register_forward_pre_hook(partial(self._before_forward, layer))
                module.register_forward_hook(partial(self._after_forward, layer))
            for parameter in layer.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._got_gradient, layer))

    @torch.no_grad()
    def _before_forward(self, layer: Layer, *_: Any) -> None:
        layer.gather()
        self._note()

    @torch.no_grad()
    def _after_forward(self, layer: Layer, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        layer.release()
        if output.requires_grad:  # the gradient of a layer's output is known just before the layer's own backward
            output.register_hook(partial(self._before_backward, layer))

    @torch.no_grad()
    def _before_backward(self, layer: Layer, _: torch.Tensor) -> None:
        layer.gather()
        self._note()

    @torch.no_grad()
    def _got_gradient(self, layer: Layer, _: torch.Tensor) -> None:
        layer.ready += 1
        self._note()
        if self.stage >= 2 and layer.ready == len(layer.parameters):  # the layer's last: its backward is over
            layer.reduce()
            if self.stage == 3:
                layer.release()

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight once and drop the gradients.

        Raises:
            UsageError: a layer got no gradient since the last step.
        """
        self.steps += 1
        for layer in self.layers:
            if self.stage < 2 and all(p.grad is not None for p in layer.parameters):
                layer.reduce()
            if layer.gradient is None or layer.ready:
                raise UsageError(f"{layer.name}: backward() did not reach all of its parameters", fix="use them all")
            adamw(layer.shard, layer.gradient, *layer.averages, self.steps, self.lr, **self.adamw)
            layer.gradient = None
            if self.stage in (1, 2):  # each rank has updated its part of the weights; everyone needs all of them
                self.ring.all_gather(layer.row)

    def held(self) -> dict[str, int]:
        """Bytes that this rank holds now: weights, gradients, optimizer."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            total.update(layer.held())
        return dict(total)

    def _note(self) -> None:
        now = self.held()
        self.peak = now if sum(now.values()) > sum(self.peak.values()) else self.peak

    def full_weights(self) -> dict[str, torch.Tensor]:
        """Every layer's flat row of weights, whole; all ranks call it."""
        rows = {}
        for layer in self.layers:
            if self.stage == 3:
                layer.gather()
            rows[layer.name] = layer.row[: sum(layer.sizes)].clone()
            if self.stage == 3:
                layer.release()
        return rows


def adamw(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """One AdamW update in place; every argument (n,), number by number, so any part of a row can go alone.

    The operations are those of torch.optim.AdamW, in the same order: bit for bit the same result.
    """
    weights.mul_(1 - lr * weight_decay)
    m.lerp_(gradient, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    size = (v.sqrt() / (1 - betas[1] ** step) ** 0.5).add_(eps)
    weights.addcdiv_(m, size, value=-lr / (1 - betas[0] ** step))


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The pieces that are gathered and reduced as one: entries of a list or a Sequential, else modules with weights.

    Raises:
        UsageError: two pieces share a parameter (tied embeddings).
    """
    owners: dict[int, str] = {}
    for name, module in _pieces("", model):
        for parameter in module.parameters():
            if owners.setdefault(id(parameter), name) != name:
                raise UsageError(
                    f"{name} and {owners[id(parameter)]} share a parameter: the toy keeps each in one layer",
                    fix="tie_word_embeddings=False; the real engine can do it",
                )
        if any(p.requires_grad for p in module.parameters()):
            yield name, module


def _pieces(name: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    if next(module.parameters(recurse=False), None) is not None:
        yield name, module
        return
    for child_name, child in module.named_children():
        whole = isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential))
        path = f"{name}.{child_name}".lstrip(".")
        yield from [(path, child)] if whole else _pieces(path, child)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
