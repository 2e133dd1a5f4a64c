"""PiSSA and OLoRA: the adapter starts with a part of the base, and the base keeps the rest.

    start      W  =  W_rest + s * B0 A0          A0, B0 from an SVD (pissa) or a QR (olora) of W
    trained    W' =  W_rest + s * B  A
    saved      W' =  W + s * (B A - B0 A0)  =  W + s * [B | -B0] [A ; A0]         a plain LoRA of rank 2 r

An adapter that holds only A and B is right on W_rest, which exists nowhere but in the memory of the training process.
Readers that compute the start again (peft) are right as long as their SVD falls the same way; those that don't (vLLM,
a merge by hand) answer nonsense in silence. So the start is remembered, and what is saved is the plain LoRA of the last
line: right on the original base in every program. peft knows the same conversion (Meng et al. 2024, appendix); done
here, it also keeps DoRA's lengths and modules trained in full. Lesson: notebook 05.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minituner.errors import UsageError
from minituner.recipe import MethodSection

MOVING = ("pissa", "olora")
KEY = "start/"


def moves_the_base(method: MethodSection) -> bool:
    """True for the initialisations that take a part of the base's weights into the adapter."""
    return method.name != "full" and method.init_lora_weights in MOVING


def remember_start(model: Any) -> None:
    """Keep A0 and B0 beside A and B, as buffers that no state dict holds; called before the first step.

    Raises:
        UsageError: a rank above what a layer's matrix can have.
    """
    for name, layer in _lora_layers(model):
        rank, most = layer.r["default"], min(layer.in_features, layer.out_features)
        if rank > most:
            raise UsageError(
                f"method.lora_rank={rank} is more than {name.removeprefix('base_model.model.')} can give away",
                why=f"its matrix has the sizes {layer.out_features} and {layer.in_features}, so at most rank {most}",
                fix=f"method.lora_rank={most}, or method.init_lora_weights=true",
            )
        for matrix in ("lora_A", "lora_B"):
            weight = getattr(layer, matrix)["default"].weight
            layer.register_buffer(f"start_{matrix}", weight.detach().clone(), persistent=False)


def start_of(model: Any) -> dict[str, Any]:
    """`start/LAYER.lora_A` and `.lora_B`, what a checkpoint has to keep; empty where the base is as it was loaded."""
    return {
        f"{KEY}{name}.{matrix}": getattr(layer, f"start_{matrix}")
        for name, layer in _lora_layers(model)
        for matrix in ("lora_A", "lora_B")
        if hasattr(layer, f"start_{matrix}")
    }


def restore_start(model: Any, saved: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Let the base begin where the checkpoint's did: W_rest = W - s * B0 A0 with the saved A0 and B0.

    On the same machine the start is computed again bit for bit and nothing is to do. An SVD on another kind of machine
    differs by rounding, or in the sign of a vector; then the difference is given back to the base, in float32.
    """
    import torch

    moved = 0
    with torch.no_grad():
        for name, layer in _lora_layers(model):
            keys = {matrix: f"{KEY}{name}.{matrix}" for matrix in ("lora_A", "lora_B")}
            if not all(key in saved for key in keys.values()):
                continue
            then = {matrix: saved[key].to(layer.start_lora_A.device) for matrix, key in keys.items()}
            now = {matrix: getattr(layer, f"start_{matrix}") for matrix in keys}
            if all(torch.equal(then[matrix], now[matrix]) for matrix in keys):
                continue
            weight = layer.get_base_layer().weight
            gap = now["lora_B"].float() @ now["lora_A"].float() - then["lora_B"].float() @ then["lora_A"].float()
            gap = gap.T if layer.fan_in_fan_out else gap
            weight.copy_((weight.float() + layer.scaling["default"] * gap).to(weight.dtype))
            for matrix in keys:
                now[matrix].copy_(then[matrix])
            moved += 1
    if moved:
        say(f"the start of {moved} adapted layers falls otherwise on this machine; the checkpoint's was taken")


def save_as_plain_lora(model: Any, folder: Path) -> None:
    """Turn the adapter in `folder`, saved by peft, into the LoRA of rank 2 r that is right on the original base.

    Nothing happens for a model whose base is as it was loaded.
    """
    start = start_of(model)
    if not start:
        return
    import torch
    from safetensors.torch import load_file, save_file

    file, settings_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    for name, layer in _lora_layers(model):
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        tensors[a] = torch.cat([tensors[a], layer.start_lora_A.cpu().to(tensors[a].dtype)], dim=0)
        tensors[b] = torch.cat([tensors[b], -layer.start_lora_B.cpu().to(tensors[b].dtype)], dim=1)
    save_file(tensors, file, metadata={"format": "pt"})
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    # The scale stays what it was: alpha / r, or alpha / sqrt(r) for rsLoRA, with twice the rank.
    settings["lora_alpha"] *= math.sqrt(2) if settings.get("use_rslora") else 2
    settings["r"] *= 2
    settings["init_lora_weights"] = True
    settings_file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _lora_layers(model: Any) -> list[tuple[str, Any]]:
    """The adapted layers with their names in the peft model; none for a model without adapters."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer") and "default" in module.lora_A
    ]
