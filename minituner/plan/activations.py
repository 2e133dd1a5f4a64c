"""Activations: a training step rehearsed with tensors that have a shape and no memory, so its peak can be read off.

    forward   x0 kept, x1 kept, ...                 alive grows: the backward pass will want these
    loss      logits appear, are used, are gone     alive jumps, and falls again
    backward  kept ones fall, gradients appear      for full fine-tuning the two meet somewhere in the middle

         alive |         ..^.           the peak, and what it consists of
               |    ..--    |--__
               | .--             --_____ gradients

Weights are never loaded: config.json gives the shapes. The model, its adapters and the loss are those of a real run;
torch's FakeTensor says for each operation which new memory its result would take, and Python says when the last
reference to it is gone. So activation checkpointing, rows of any length and any architecture are counted and not
guessed. What kernels take for themselves (workspaces) and what an allocator rounds up is not in it, and attention
kernels of GPUs keep one copy less (here each document's output is there alone and in its row). Lesson: notebook 08.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from minituner.data.collate import Batch
from minituner.errors import MinitunerError
from minituner.model import attention
from minituner.model.adapters import QUANTIZED, apply_method
from minituner.model.attention import packed_kwargs
from minituner.model.fused import KINDS, in_order, layers_of, replace_classes
from minituner.model.head import Head
from minituner.model.loss import loss_at
from minituner.plan.experts import GroupedProducts, idle_parameters
from minituner.plan.flops import ModelFlops, model_flops
from minituner.recipe import MethodSection, Recipe

PHASES = ("activations", "logits", "gradients", "temporary")


@dataclass(frozen=True)
class Rehearsal:
    """One micro-batch on paper: what is alive beside the weights, in bytes."""

    kept: int
    """Alive after the decoder's forward pass: what its backward pass will read."""
    peak: dict[str, int]
    """What is alive at the worst moment, by `PHASES`; gradients only where they were not there before."""


class Paper:
    """A model of shapes: nothing of it is in memory, everything about it can be counted."""

    def __init__(self, folder: str | Path, recipe: Recipe, dtype: torch.dtype) -> None:
        """Build the model of `folder` (its config.json is enough) with the recipe's adapters.

        `dtype` is what the weights are in; of quantised ones, what they are computed in.

        Raises:
            MinitunerError: no such model can be built from the config.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        attention.register()
        try:
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=recipe.model.trust_remote_code)
            self.implementation = attention.choose(
                "auto", needs=attention.needs_of(config), one_document_rows=False, device="cpu"
            )[0]
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config,
                    dtype=dtype,
                    attn_implementation=self.implementation,
                    trust_remote_code=recipe.model.trust_remote_code,
                )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise MinitunerError(
                f"cannot build a model from {folder}: {str(error).splitlines()[0]}",
                fix="the folder needs the config.json of a causal language model",
            ) from None
        self.dtype, self.method = dtype, recipe.method
        self.quantised = _quantise(model) if recipe.method.name in QUANTIZED else []
        self.base_parameters = sum(p.numel() for p in model.parameters())
        self.idle_parameters = idle_parameters(model)
        self.vocabulary = config.get_text_config().vocab_size
        # Every start of A and B takes the same memory; some are computed from weights, which are not here.
        method = MethodSection(**{**recipe.method.model_dump(), "init_lora_weights": True})
        checkpointing = recipe.train.activation_checkpointing
        with torch.device("meta"):
            model = apply_method(model, method, activation_checkpointing=checkpointing)
        self.flops: ModelFlops = model_flops(model, flows_to_embedding=checkpointing and recipe.method.name != "full")
        self.mode = FakeTensorMode()
        if not (recipe.distributed.zero or "").startswith("zero3"):
            for kind in in_order(recipe.train.fused):  # as in a run, without the proof, which needs numbers
                replace_classes(layers_of(model, kind), KINDS[kind][1])
        _to_fake(model, self.mode)
        model.config.use_cache = False
        self.model = model.train()
        self.head = self._find_head()

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def frozen_bytes(self) -> float:
        """Weights that stay as they are, in memory: quantised ones with their scales; buffers too."""
        quantised = {id(layer.weight) for layer in self.quantised}
        plain = [p for p in self.model.parameters() if not p.requires_grad and id(p) not in quantised]
        packed = sum(packed_bytes(layer.weight.shape, self.method.name) for layer in self.quantised)
        return packed + sum(p.numel() * p.element_size() for p in [*plain, *self.model.buffers()])

    def rehearse(
        self, seq_lens: Sequence[int], supervised: int, *, gradients_there: bool, whole_logits: bool = False
    ) -> Rehearsal:
        """Forward and backward of one micro-batch: a row of documents, `supervised` of its tokens with a target.

        Args:
            gradients_there: they were made by an earlier micro-batch of the window, and are only added to.
            whole_logits: through the model's own forward, as under ZeRO-3, instead of in pieces (model/head.py).
        """
        trained = self.trained
        for parameter in trained:
            with self.mode:
                parameter.grad = torch.empty_like(parameter) if gradients_there else None
        grads = [p.grad for p in trained if p.grad is not None]
        known = [*self.model.parameters(), *self.model.buffers(), *grads]
        batch, keep, targets = self._batch(seq_lens, supervised)
        head = None if whole_logits else self.head
        with self.mode, self._grouped(), _Alive(known) as alive, _notices_gradients(trained, alive):
            if head is not None:
                hidden = head.hidden(batch, self.implementation)
                kept = alive.total
                alive.phase = "logits"
                loss = head.loss_sum(hidden[keep], targets)
                del hidden
            else:
                loss = loss_at(self.model, batch, self.implementation, None, keep, targets)
                kept = alive.total
            alive.phase = "temporary"
            loss.backward()
        peak = {phase: alive.at_peak.get(phase, 0) for phase in PHASES}
        for parameter in trained:
            parameter.grad = None
        return Rehearsal(kept, peak)

    def _batch(self, seq_lens: Sequence[int], supervised: int) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        lengths = [int(n) for n in seq_lens]
        with self.mode:
            row = torch.zeros(1, sum(lengths), dtype=torch.long)
            cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
            keep = torch.zeros(max(1, supervised), dtype=torch.long)
            batch = Batch(row, row.clone(), row.clone(), cu, lengths, supervised, sum(lengths))
            return batch, keep, keep.clone()

    def _grouped(self) -> AbstractContextManager[Any]:
        return GroupedProducts() if self.idle_parameters else nullcontext()

    def _find_head(self) -> Head | None:
        """The model's two halves, if its logits take exactly the operations of the one and then the other.

        On real weights `find_head` compares numbers; here there are none, so it is the lists of operations.
        """
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        linear = base.get_output_embeddings()
        if linear is None or not hasattr(base, "get_decoder") or base.get_decoder() is base:
            return None
        plain = type(linear) is torch.nn.Linear
        frozen = plain and not any(p.requires_grad for p in linear.parameters())
        head = Head(base.get_decoder(), linear, frozen)
        batch, _, _ = self._batch([2], 1)
        with self.mode, self._grouped(), torch.no_grad():
            with _Operations() as halves:
                linear(head.hidden(batch, self.implementation))
            with _Operations() as whole:
                self.model(
                    input_ids=batch.input_ids,
                    position_ids=batch.position_ids,
                    use_cache=False,
                    **packed_kwargs(batch, self.implementation),
                )
        return head if halves.names == whole.names else None


def packed_bytes(shape: Iterable[int], method: str) -> float:
    """Bytes of a weight (out, in) of a quantised base: qlora's 4 bits with scales, or int8_lora's 8 (quantized.py)."""
    out, into = shape
    if method == "int8_lora":
        return out * into + 4 * out
    blocks = -(-out * into // 64)
    return out * into / 2 + blocks + 4 * -(-blocks // 256)


class _Unpacked(torch.autograd.Function):
    """x (T, in) times a weight (out, in) that is made whole for the product and forgotten, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight.clone(), bias)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return upstream @ ctx.weight.clone(), None, None


class _Quantised(torch.nn.Linear):
    """A linear layer whose weight only passes through memory; fused, the plan adds the largest one (memory.py)."""

    on_paper = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Unpacked.apply(x, self.weight, self.bias)


def _quantise(model: Any) -> list[torch.nn.Linear]:
    """The layers that transformers would quantise: all linear ones but the head."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and m is not head]
    for layer in layers:
        layer.__class__ = _Quantised
    return layers


def _to_fake(model: Any, mode: FakeTensorMode) -> None:
    """Parameters and buffers as fake tensors on the CPU; tied ones stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with mode:
                        new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                kind[name] = made[id(tensor)]


class _Alive(TorchDispatchMode):
    """Follows every new storage from the operation that makes it to its last reference."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = [tensor.untyped_storage() for tensor in known]  # kept, so that no address is used again
        self._phase_of = {storage._cdata: "" for storage in self._known}
        self.phase, self.alive, self.at_peak, self._most = PHASES[0], Counter[str](), Counter[str](), 0

    @property
    def total(self) -> int:
        """Bytes that are alive now."""
        return self.alive.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._phase_of:
            return
        self._phase_of[key] = self.phase
        self.alive[self.phase] += storage.nbytes()
        weakref.finalize(storage, self._gone, key, storage.nbytes())
        if self.total > self._most:
            self._most, self.at_peak = self.total, Counter(self.alive)

    def _gone(self, key: int, size: int) -> None:
        self.alive[self._phase_of.pop(key)] -= size

    def is_gradient(self, tensor: torch.Tensor) -> None:
        """Count this tensor's storage among the gradients from now on."""
        storage = tensor.untyped_storage()
        if self._phase_of.get(storage._cdata):
            self.alive[self._phase_of[storage._cdata]] -= storage.nbytes()
            self._phase_of[storage._cdata] = "gradients"
            self.alive["gradients"] += storage.nbytes()


@contextmanager
def _notices_gradients(parameters: Iterable[torch.nn.Parameter], alive: _Alive) -> Iterator[None]:
    handles = [p.register_post_accumulate_grad_hook(_told(alive)) for p in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _told(alive: _Alive) -> Callable[[torch.Tensor], None]:
    return lambda parameter: alive.is_gradient(parameter.grad)


class _Operations(TorchDispatchMode):
    """The names of the operations that compute something (views do not, nor does asking for a device)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.namespace != "prim" and "view" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
