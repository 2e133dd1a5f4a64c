"""Adapters: which parameters are trained, by the method of the recipe.

    full      every weight
    lora      W stays frozen; W x + (lora_alpha / lora_rank) * B (A x) is computed, and only A and B are trained
    qlora     the same over a 4-bit base (NF4, double quantisation); int8_lora over an 8-bit one

B starts at zero, so at step 0 the model is the base model exactly (a promise, tested). Source: Hu et al. 2021 (LoRA),
Dettmers et al. 2023 (QLoRA); the implementation is peft's. Lesson: notebook 05.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

from minituner.errors import UsageError, nearest
from minituner.recipe import MethodSection


def apply_method(model: Any, method: MethodSection, *, activation_checkpointing: bool = False) -> Any:
    """The model with its trainable parameters chosen; for LoRA methods a peft model around it.

    Raises:
        UsageError: target modules that match nothing; the real names are listed.
    """
    if method.name == "full":
        model.requires_grad_(True)
    else:
        check_targets(model, method.target_modules)
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        if method.name in ("qlora", "int8_lora"):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        config = LoraConfig(
            r=method.lora_rank,
            lora_alpha=method.lora_alpha,
            lora_dropout=method.lora_dropout,
            target_modules=method.target_modules,
            modules_to_save=method.modules_to_save,
            use_rslora=method.use_rslora,
            use_dora=method.use_dora,
            init_lora_weights=method.init_lora_weights,
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 for an attribute under its old name
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            model = get_peft_model(model, config)
    if activation_checkpointing:
        if method.name != "full":
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def check_targets(model: Any, target_modules: str | list[str]) -> None:
    """Refuse target modules that match no linear layer of this model.

    Raises:
        UsageError: naming the entries that match nothing and the layer names that exist.
    """
    import torch

    if target_modules == "all-linear":
        return
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if isinstance(target_modules, str):
        missing = [] if any(re.fullmatch(target_modules, name) for name in names) else [target_modules]
    else:
        missing = [t for t in target_modules if not any(n == t or n.endswith("." + t) for n in names)]
    if missing:
        real = sorted({name.rsplit(".", 1)[-1] for name in names})
        hints = [hint for entry in missing if (hint := nearest(entry, real))]
        raise UsageError(
            f"method.target_modules: {', '.join(map(repr, missing))} match no linear layer of this model",
            why=f"its linear layers end in: {', '.join(real)}",
            fix="; ".join(hints) or "method.target_modules=all-linear",
        )


def trainable_parameters(model: Any) -> dict[str, Any]:
    """Name -> parameter for everything that is trained, in the model's own order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: Any) -> tuple[int, int]:
    """How many numbers are trained, and how many there are (4-bit weights counted as numbers)."""
    trained = sum(p.numel() for p in trainable_parameters(model).values())
    total = sum(
        p.quant_state.shape.numel() if getattr(p, "quant_state", None) is not None else p.numel()
        for p in model.parameters()
    )
    return trained, total
