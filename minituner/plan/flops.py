"""FLOPs: the floating-point operations of a training step, counted on paper, and how many a second this machine does.

A matrix product (T, in) @ (in, out) is 2 * T * in * out operations. For every layer training asks three questions:

    forward          x @ W          always                                      2 N
    input gradient   dy @ W.T       if anything before this layer is trained    2 N
    weight gradient  x.T @ dy       if this layer is trained                    2 N

    everything trained      6 N a token  + 3 A        N: weights of the layers, without embeddings and head
    LoRA                    4 N + 6 P_lora + 3 A      the frozen W needs no weight gradient; below the lowest adapter
                                                      nothing flows back at all
    head, frozen            4 d V a *supervised* token (trained: 6 d V); other positions never reach it
    attention               A = 4 d a layer and pair (query, key it may see), forward; n (n + 1) / 2 pairs a document
    recomputing             + 2 N + A with activation checkpointing

`model_flops(model)` asks the questions of the actual layers, so it is right for adapters on some layers only and for
mixtures of experts, and works on a model without memory (torch's meta device). Norms, activations, the optimizer and
DoRA's norms are left out: a few operations a number, not a matrix product. Attention's backward pass is counted whole
in the lowest adapted layer, as fused kernels compute it, even if only the values there are adapted. Sources: Kaplan et
al. 2020 (6 N); Chowdhery et al. 2022 (a model's FLOPs do not count recomputation). Lesson: notebook 07.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Layers that read the same input: nothing trained lies between them. Others of a block follow one another.
SIBLINGS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv"}
SIBLINGS |= {"q_a_proj": "qkv", "kv_a_proj_with_mqa": "qkv"}  # latent attention
SIBLINGS |= {"gate_proj": "gate_up", "up_proj": "gate_up", "w1": "gate_up", "w3": "gate_up"}


@dataclass(frozen=True)
class ModelFlops:
    """Operations of forward and backward pass, by what they grow with."""

    per_token: float
    """Layers, for each token."""
    per_supervised: float
    """The head, for each supervised token."""
    per_pair: float
    """Attention over all layers, for each (query, key) pair of a document."""
    forward_per_token: float
    forward_per_pair: float
    """What activation checkpointing computes a second time."""

    def of(self, tokens: float, supervised_tokens: float, pairs: float, *, recompute: bool = False) -> float:
        """Operations for so many tokens, targets and attention pairs (`causal_pairs`)."""
        again = self.forward_per_token * tokens + self.forward_per_pair * pairs if recompute else 0.0
        return self.per_token * tokens + self.per_supervised * supervised_tokens + self.per_pair * pairs + again


def causal_pairs(seq_lens: Iterable[int]) -> int:
    """(query, key) pairs of documents of these lengths: each token sees itself and what came before it."""
    return sum(n * (n + 1) // 2 for n in seq_lens)


@dataclass(frozen=True)
class _Product:
    """One matrix product of the model: `size` is in * out, times the share of tokens that it sees."""

    stage: int
    layer: int | None
    size: float
    trained: bool
    after_adapter: bool  # lora_B reads what lora_A made
    head: bool
    attention_input: bool


def model_flops(model: Any, *, flows_to_embedding: bool = False) -> ModelFlops:
    """Count the operations of one training step of this model, adapters included.

    Args:
        flows_to_embedding: gradients run down to the embedding although nothing there is trained; so they do under
            activation checkpointing with adapters.
    """
    from minituner.model.loss import accepts_logits_to_keep

    config = model.config.get_text_config()
    products = list(_products(model, config))
    first = min((p.stage for p in products if p.trained), default=len(products))
    if flows_to_embedding or any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        first = -1
    per_token = per_supervised = forward = 0.0
    for product in products:
        flows = product.stage > first or product.after_adapter
        cost = 2 * product.size * (1 + flows + product.trained)
        if product.head and accepts_logits_to_keep(model):
            per_supervised += cost
        else:
            per_token += cost
            forward += 0.0 if product.head else 2 * product.size
    width = _attention_width(config)
    pairs = 4 * width * config.num_hidden_layers
    # Attention has a backward pass where its queries, keys or values have one.
    entries = {p.layer: p.stage for p in products if p.attention_input and p.layer is not None}
    with_backward = sum(stage >= first for stage in entries.values()) if entries else config.num_hidden_layers
    return ModelFlops(per_token, per_supervised, pairs + 8 * width * with_backward, forward, pairs)


def _attention_width(config: Any) -> float:
    """Mean width of queries and values over all heads: a pair costs 2 d for its score and 2 d for its value.

    With latent attention (DeepSeek) queries are wider than values; elsewhere both have the head's dimension.
    """
    heads = getattr(config, "num_attention_heads", None) or 0  # a model without attention has no pairs
    if heads and getattr(config, "qk_nope_head_dim", None):
        return heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) / 2
    return heads and heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _products(model: Any, config: Any) -> Iterator[_Product]:
    """Every matrix product with weights, in the order in which the model computes them; the head is last."""
    head = model.get_output_embeddings()
    head_parts = {id(part) for part in head.modules()} if head is not None else set()
    stages: dict[tuple[str, str], int] = {}
    # Adapters on parameters that no linear layer holds (experts, their router): B A is added to them once a step,
    # whatever the number of tokens, and the gradient of all their weights is computed on the way to A and B.
    wrapped = {n.replace(".base_layer", "") for n, m in model.named_modules() if type(m).__name__ == "ParamWrapper"}
    for name, module in model.named_modules():
        if "original_module" in name:  # peft keeps it beside the copy that is trained; it is not computed
            continue
        sizes = _sizes(name, module, config)
        if not sizes:
            continue
        path = name.split(".")
        adapter = next((part for part in path if part.startswith("lora_")), "")
        path = [p for p in (path[: path.index(adapter)] if adapter else path) if p != "base_layer"]
        is_wrapped = ".".join(path) in wrapped
        if adapter and is_wrapped:
            continue
        at = next((i for i, part in enumerate(path) if part.isdigit()), None)
        own = [part for part in path if part not in ("modules_to_save", "default")][-1]
        is_head = id(module) in head_parts
        key = (
            ("", "head") if is_head else (".".join(path[: at + 1] if at is not None else path), SIBLINGS.get(own, own))
        )
        stage = stages.setdefault(key, len(stages)) if not is_head else 1 << 30
        trained = is_wrapped or any(p.requires_grad for p in module.parameters(recurse=False))
        for size in sizes:
            yield _Product(
                stage,
                int(path[at]) if at is not None else None,
                size,
                trained,
                adapter == "lora_B",
                is_head,
                # Stages of a block are counted from its first product, which attention reads in all decoders.
                stage == min((s for (block, _), s in stages.items() if block == key[0]), default=stage),
            )


def _sizes(name: str, module: Any, config: Any) -> list[float]:
    """in * out of the products that this module computes itself; packed 4-bit weights count with their real shape."""
    import torch

    from minituner.plan.experts import experts_for_a_token, stacks

    if isinstance(module, torch.nn.Linear):
        return [module.in_features * module.out_features]
    if type(module).__name__ == "Conv1D":  # GPT-2's linear layer
        return [module.weight.numel()]
    if stacked := [getattr(stack, "ds_shape", stack.shape) for stack in stacks(name, module)]:
        # A token visits a few of the experts. (ZeRO-3 leaves a rank with a piece, and the whole shape beside it.)
        return [experts_for_a_token(config) * shape.numel() / shape[0] for shape in stacked]
    if type(module).__name__.endswith("Router"):  # a linear layer that is none: it chooses the experts
        weights = [getattr(p, "ds_shape", p.shape) for p in module.parameters(recurse=False)]
        return [shape.numel() for shape in weights if len(shape) == 2]
    return []


def compute_dtype(model: Any) -> torch.dtype:
    """The data type in which the base model's products are computed (4-bit weights are unpacked to one)."""
    import torch

    for module in model.modules():
        if isinstance(dtype := getattr(module, "compute_dtype", None), torch.dtype):
            return dtype
    shapes = ((p, getattr(p, "ds_shape", p.shape)) for p in model.parameters())  # as above: ZeRO-3
    return next(p.dtype for p, shape in shapes if p.is_floating_point() and len(shape) == 2)


def gemm_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of a large square matrix product on this device, with all threads: the best of a tenth of a second.

    It is what the machine can do, so it belongs under every measured rate. Measured once a process.
    """
    import torch

    return _gemm_rate(dtype, torch.device(device).type, torch.get_num_threads())


@lru_cache(maxsize=16)
def _gemm_rate(dtype: torch.dtype, device: str, _threads: int) -> float:
    return measure_gemm_rate(dtype, device)


def measure_gemm_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """The same, measured anew at each call: a machine's rate changes with what else runs on it."""
    import torch

    size = 4096 if device == "cuda" else 512
    matrix, out = torch.ones(size, size, dtype=dtype, device=device), None

    def once() -> float:
        start = time.perf_counter()
        torch.mm(matrix, matrix, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    out = torch.empty_like(matrix)
    once()  # wakes threads and chooses kernels
    best, until = once(), time.perf_counter() + 0.1
    while time.perf_counter() < until:
        best = min(best, once())
    return 2 * size**3 / best
