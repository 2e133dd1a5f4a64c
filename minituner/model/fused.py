"""Fused layers: what a LoRA step does besides its large matrix products, in fewer passes over memory.

    lora     base + adapter, forward and backward in one function        fused_lora.py
    swiglu   the feed-forward block keeps gate and up, and no product     fused_swiglu.py
    norm     RMSNorm's two directions in four passes each                 fused_norm.py
    rotary   rotary positions in two passes, q, k and v read x once       fused_rotary.py
    layer    all of these as one function, where a layer has them all     fused_layer.py

`train.fused` lists them; [] trains with peft's and transformers' own layers. A layer is replaced in place (its class,
not its parameters: names, checkpoints and adapters are the same files), and only after the proof on this very model
that the two sides compute the same, forward and backward:

    random x  ->  the layer as it was  ->  y, dx          equal to 1e-4 of their size, or the layer is left alone
              ->  fused                ->  y, dx

Every layer has its own proof, for layers of one class may differ (some rotate no positions, every fourth in SmolLM3).

Without gradients (answers, evaluation, proofs) every layer computes as its library wrote it, to the last bit.
What it gains, mostly memory, is in assets/benchmarks/README.md. Lesson: notebook 05.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from minituner.model.attention_choice import PER_DOCUMENT_SDPA
from minituner.model.fused_layer import fused_layer, is_layer
from minituner.model.fused_lora import fused_lora, is_plain
from minituner.model.fused_norm import fused_norm, is_rms_norm
from minituner.model.fused_rotary import fused_rotary, is_rotary
from minituner.model.fused_swiglu import fused_swiglu, is_swiglu

# name: which layers it is for, and the class that such a layer's class becomes; in this order, for a whole decoder
# layer is made of the other kinds
KINDS: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any]]] = {
    "lora": (is_plain, fused_lora),
    "swiglu": (is_swiglu, fused_swiglu),
    "norm": (is_rms_norm, fused_norm),
    "rotary": (is_rotary, fused_rotary),
    "layer": (is_layer, fused_layer),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative to the largest value
# Of a layer alone: with trained weights and random states, rounding alone makes 1e-5 in some layers' attention.
OF_A_LAYER = {**TOLERANCE, torch.float32: 1e-4}


def fuse(model: Any, wanted: Sequence[str]) -> str:
    """Fuse the kinds of layers named in `wanted`, each after its proof; returns a sentence that says what was done."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "fused: nothing, as parameters lie in pieces (ZeRO-3) that only the layers' own forward gathers"
    done, left = [], []
    for name in in_order(wanted):
        layers, fused = layers_of(model, name), KINDS[name][1]
        right = proved(layers, fused, one_of_a_class=name == "lora")
        if wrong := [layer for layer in layers if layer not in right]:
            left.append(f"{name} ({_named(wrong, right)} computes something else)")
        if right:
            replace_classes(right, fused)
            done.append(f"{len(right)} {name}")
    text = f"fused: {', '.join(done) or 'nothing'}"
    return text + (f"; left alone: {', '.join(left)}" if left else "")


def in_order(wanted: Sequence[str]) -> list[str]:
    """The kinds named in `wanted` as they are fused one after another."""
    return [kind for kind in KINDS if kind in wanted]


def layers_of(model: Any, name: str) -> list[Any]:
    """The layers of `model` that the kind `name` is for."""
    return [module for module in model.modules() if KINDS[name][0](module)]


def replace_classes(layers: Sequence[Any], fused: Callable[[Any], Any]) -> None:
    """Let `layers` compute fused, in place: one new class for each of theirs; parameters keep their names."""
    classes = {kind: fused(kind) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = classes[type(layer)]


def proved(layers: Sequence[Any], fused: Callable[[Any], Any], *, one_of_a_class: bool) -> list[Any]:
    """Those of `layers` that compute the same fused; `one_of_a_class`: one layer stands for all others of its class."""
    if not one_of_a_class:
        return [layer for layer in layers if same(layer, fused)]
    right = {kind for kind, layer in {type(layer): layer for layer in layers}.items() if same(layer, fused)}
    return [layer for layer in layers if type(layer) in right]


def _named(wrong: Sequence[Any], right: Sequence[Any]) -> str:
    """The classes of the wrong layers, with their number where others of their class are right."""
    named = []
    for kind in dict.fromkeys(map(type, wrong)):
        bad, good = (sum(type(layer) is kind for layer in layers) for layers in (wrong, right))
        named.append(f"{bad} of {bad + good} {kind.__name__}" if good else kind.__name__)
    return ", ".join(named)


def same(layer: Any, fused: Callable[[Any], Any]) -> bool:
    """True if `layer` gives the same output and input gradient as it is and fused; it is left as it was.

    Also for x a thousand times as large, where it has no attention: some blocks clamp what grows beyond a limit.
    """
    return all(_same_at(layer, fused, scale) for scale in (1.0, 1e3))


def _same_at(layer: Any, fused: Callable[[Any], Any], scale: float) -> bool:
    first = next(p for p in layer.parameters() if p.is_floating_point())
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, _width(layer, first), generator=draw).to(first.device, first.dtype)
    was = type(layer)
    with _whole_documents(layer, x, draw) as more:
        if scale > 1 and (more or x.dtype == torch.float16):  # scores that only rounding orders; more than fits
            return True
        try:
            before = _both_ways(layer, x * scale, more)
        except (TypeError, AttributeError):
            return False  # it wants to be called otherwise than Llama's
        try:
            replace_classes([layer], fused)
            after = _both_ways(layer, x * scale, more)
        finally:
            layer.__class__ = was
    allowed = OF_A_LAYER.get(x.dtype, 0.0)
    if before[0] is not after[0]:
        return False
    return all(
        float((a - b).abs().max()) <= allowed * float(a.abs().max()) for a, b in zip(before[1:], after[1:], strict=True)
    )


def _width(layer: Any, first: torch.Tensor) -> int:
    """How many numbers a token has where it enters the layer."""
    layer = getattr(layer, "self_attn", layer)
    entry = getattr(layer, "q_proj", None) or getattr(layer, "gate_proj", None) or layer
    return getattr(entry, "in_features", None) or len(first)


@contextmanager
def _whole_documents(layer: Any, x: torch.Tensor, draw: torch.Generator) -> Iterator[dict[str, Any]]:
    """What attention is told besides x (1, 16, width): three documents, and an angle for each pair and token.

    Within, it attends to them on this rank alone, whatever the run has chosen. Other layers are told nothing.
    """
    layer = getattr(layer, "self_attn", layer)
    if not is_rotary(layer):
        yield {}
        return
    angles = torch.randn(*x.shape[:2], layer.head_dim // 2, generator=draw).repeat(1, 1, 2).to(x.device)
    positions = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
    chosen, layer.config._attn_implementation = layer.config._attn_implementation, PER_DOCUMENT_SDPA
    try:
        yield {"position_embeddings": positions, "attention_mask": None, "seq_lens": [9, 1, 6]}
    finally:
        layer.config._attn_implementation = chosen


def _both_ways(layer: Any, x: torch.Tensor, more: dict[str, Any]) -> tuple[type, torch.Tensor, torch.Tensor]:
    """What kind of thing comes out, the output in it, and the gradient of the input; parameters get none.

    The upstream gradient differs everywhere.
    """
    x = x.clone().requires_grad_()
    with torch.enable_grad(), torch.random.fork_rng():  # dropout draws the same both times, and nothing from the run
        torch.manual_seed(0)
        out = layer(x, **more)
        y = out[0] if isinstance(out, tuple) else out  # attention returns its weights too, or None
        upstream = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
        (dx,) = torch.autograd.grad(y, x, upstream)
    return type(out), y.detach().float(), dx.float()
