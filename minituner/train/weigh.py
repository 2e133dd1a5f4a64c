"""Weighing: what a rank of a real run holds between its last backward and its step, tensor by tensor.

    on_ranks(2, weigh, recipe, "zero2")   -> for each rank {"weights": bytes, "gradients": ..., "optimizer": ..., ...}

Nothing is estimated: the engine's own tensors are looked up, and the memory under them is counted once, however many
views there are of it. What belongs to none of them (communication buffers) is found by asking Python for every tensor
that is alive. Lesson: notebook 07.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from minituner.model.loss import loss_sum
from minituner.recipe import Recipe
from minituner.train.engines import Engine, TorchEngine
from minituner.train.ranks import Ranks
from minituner.train.run import Run, set_up

PARTS = ("weights", "gradients", "optimizer", "other")


def weigh(ranks: Ranks, recipe: Mapping[str, Any], zero: str | None = None) -> dict[str, int]:
    """Bytes that this rank holds in the second step of a run, with `distributed.zero` set to `zero`.

    The second, because AdamW makes its averages in the first. `recipe` is a mapping, as in YAML. One process weighs one
    run: an engine takes the connections with it when it is closed.
    """
    chosen = Recipe.from_values({**recipe, "distributed": {**recipe.get("distributed", {}), "zero": zero}})
    with tempfile.TemporaryDirectory() as place:
        run = set_up(chosen, Path(place), Path(place), lambda line: None, ranks)
        try:
            _backward(run)
            run.engine.step(chosen.train.learning_rate)
            run.step += 1
            _backward(run)
            return held_bytes(run.engine, run.model)
        finally:
            run.engine.close()


def _backward(run: Run) -> None:
    engine, window = run.engine, run.feed.window(run.step, lambda batch: batch.to(run.engine.device))
    total = engine.all_sum(sum(batch.supervised_tokens for batch in window))
    for batch in window:
        engine.backward(loss_sum(engine.model, batch, run.attention) / max(total, 1))


def held_bytes(engine: Engine, model: Any) -> dict[str, int]:
    """Bytes that this rank holds now: weights, gradients, optimizer, other."""
    seen: set[int] = set()
    tensors = _of_torch(engine, model) if isinstance(engine, TorchEngine) else _of_deepspeed(engine, model)
    sizes = {part: _new_bytes(tensors[part], seen) for part in PARTS[:-1]}
    alive = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return {**sizes, "other": _new_bytes(alive, seen)}


def _new_bytes(tensors: Iterable[torch.Tensor | None], seen: set[int]) -> int:
    """Bytes of the storages under these tensors that are not in `seen`, and puts them there."""
    from torch._subclasses.fake_tensor import FakeTensor  # what `minituner estimate` plans with has no memory either

    total = 0
    for tensor in tensors:
        if tensor is None or tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
            continue
        if tensor.is_mkldnn:  # the zeros of matmul.py; where such a tensor lies is oneDNN's own affair
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _of_torch(engine: Any, model: Any) -> dict[str, Iterable[torch.Tensor | None]]:
    parameters = list(model.parameters())
    return {
        "weights": parameters,
        "gradients": [p.grad for p in parameters],
        "optimizer": _states(engine.optimizer),
    }


def _of_deepspeed(engine: Any, model: Any) -> dict[str, Iterable[torch.Tensor | None]]:
    zero, parameters = engine.engine.optimizer, list(model.parameters())
    flats = zero.fp32_partitioned_groups_flat if engine.stage == 3 else zero.single_partition_of_fp32_groups
    rows = zero.fp16_partitioned_groups_flat if engine.stage == 3 else zero.bit16_groups_flat
    kept = [*zero.averaged_gradients.values(), *getattr(zero, "all_grad_tensors", {}).values()]
    own = (getattr(p, name, None) for p in [*parameters, *flats] for name in ("grad", "grad_accum"))
    return {
        "weights": chain(parameters, (getattr(p, "ds_tensor", None) for p in parameters), rows),
        "gradients": chain(own, _flatten(kept), [getattr(zero, "grad_partitions_flat_buffer", None)]),
        "optimizer": chain(flats, _states(zero.optimizer)),
    }


def _states(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))


def _flatten(nested: Any) -> Iterator[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, (list, tuple)):
        for inner in nested:
            yield from _flatten(inner)
    elif isinstance(nested, dict):
        yield from _flatten(list(nested.values()))
