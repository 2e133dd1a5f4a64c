"""Adapters: which parameters are trained, by the method of the recipe.

    full        every weight
    lora        W stays frozen; W x + s * B (A x) is computed, and only A and B are trained; s = lora_alpha / lora_rank
      use_rslora                s = lora_alpha / sqrt(lora_rank), so that a higher rank does not learn more slowly
      use_dora                  the sum is split into a direction and a trained length per output
      init_lora_weights         true, gaussian: B = 0. orthogonal: B A = 0. pissa, olora: A and B take the base's
                                largest part over, and W keeps the rest (see residual.py)
    qlora       lora over a base held in 4 bits; int8_lora in 8 bits (see quantized.py)

At step 0 the model is the base model (a promise, tested): B A is zero, or exactly what W gave away. Everything frozen
keeps the data type it was loaded in; peft's `prepare_model_for_kbit_training` would also cast norms, embeddings and
head to float32, which for a 7B model is 1.5 GB more, although the norms compute in float32 anyway.
Sources: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA), Meng et al. 2024 (PiSSA),
Buyukakyuz 2024 (OLoRA), Dettmers et al. 2023 (QLoRA); the implementation is peft's. Lesson: notebook 05.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

from minituner.errors import UsageError, nearest
from minituner.model.quantized import import_bitsandbytes
from minituner.model.residual import moves_the_base, remember_start
from minituner.recipe import MethodSection

QUANTIZED = ("qlora", "int8_lora")
# For mixtures of experts: peft adapts the experts too, by adding B A to a copy of all their weights in every step.
ON_ATTENTION = r".*\.self_attn\.[a-z_]*_proj[a-z_]*"


def apply_method(model: Any, method: MethodSection, *, activation_checkpointing: bool = False) -> Any:
    """The model with its trainable parameters chosen; for LoRA methods a peft model around it.

    Raises:
        UsageError: target modules or modules to save that match nothing (the real names are listed), or settings
            that do not go together.
    """
    if method.name == "full":
        model.requires_grad_(True)
    else:
        check_settings(method)
        check_targets(model, method.target_modules)
        check_modules_to_save(model, method.modules_to_save)
        import_bitsandbytes()
        from peft import LoraConfig, get_peft_model

        model.requires_grad_(False)
        config = LoraConfig(
            r=method.lora_rank,
            lora_alpha=method.lora_alpha,
            lora_dropout=method.lora_dropout,
            target_modules=method.target_modules,
            modules_to_save=method.modules_to_save,
            ensure_weight_tying=saves_a_tied_weight(model, method.modules_to_save),
            use_rslora=method.use_rslora,
            use_dora=method.use_dora,
            init_lora_weights=method.init_lora_weights,
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 for an attribute under its old name
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            try:
                model = get_peft_model(model, config)
            except ValueError as error:
                if "ParamWrapper" not in str(error):
                    raise
                raise UsageError(  # peft takes all-linear to mean the experts too, which are stacked parameters
                    f"adapters on this model's experts cannot be had with these settings: {error}",
                    why="for dropout the input of each matrix would be needed, and experts are one stack of matrices",
                    fix="method.lora_dropout=0 and method.use_dora=false; or adapters on attention only, which takes"
                    f" far less memory: method.target_modules='{ON_ATTENTION}'",
                ) from None
        if moves_the_base(method):
            remember_start(model)
    if activation_checkpointing:
        if method.name != "full":
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def check_settings(method: MethodSection) -> None:
    """Refuse LoRA settings that peft cannot do together.

    Raises:
        UsageError: naming the setting to change.
    """
    init = method.init_lora_weights
    if method.name in QUANTIZED and isinstance(init, str) and init != "gaussian":
        raise UsageError(
            f"method.init_lora_weights={init} with method.name={method.name}",
            why="pissa and olora change the base, which would have to be quantised anew, and an orthogonal start is "
            "computed in the base's data type, which holds no fractions here",
            fix="method.init_lora_weights=true (or gaussian), or method.name=lora",
        )
    if init == "orthogonal" and method.lora_rank % 2:
        raise UsageError(
            f"method.init_lora_weights=orthogonal needs an even lora_rank, not {method.lora_rank}",
            why="A takes one half of an orthogonal basis, B the other",
            fix=f"method.lora_rank={method.lora_rank + 1}",
        )


def check_targets(model: Any, target_modules: str | list[str]) -> None:
    """Refuse target modules that match no linear layer of this model, or something that is none.

    Raises:
        UsageError: naming the entries and the layer names that exist.
    """
    if target_modules == "all-linear":
        return
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if _is_linear(module)]
    asked = [target_modules] if isinstance(target_modules, str) else target_modules
    if not asked:
        raise UsageError("method.target_modules: the list is empty", fix="method.target_modules=all-linear")
    try:
        # As peft matches: a text is one pattern for the whole name, an entry of a list is the end of a name.
        found = {
            entry: [
                name
                for name in modules
                if (re.fullmatch(entry, name) if isinstance(target_modules, str) else _ends_in(name, entry))
            ]
            for entry in asked
        }
    except re.error as error:
        raise UsageError(
            f"method.target_modules: {target_modules!r} is not a regular expression: {error}",
            fix="method.target_modules=all-linear, or a list of names",
        ) from None
    real = sorted({name.rsplit(".", 1)[-1] for name in linear})
    exist = f"its linear layers end in: {', '.join(real)}"
    for entry, names in found.items():
        other = next((name for name in names if not _is_linear(modules[name])), None)
        if other is not None:
            kind = type(modules[other]).__name__
            inside = sorted({n.rsplit(".", 1)[-1] for n in linear if n.startswith(other + ".")})
            raise UsageError(
                f"method.target_modules: {entry!r} matches {other}, which is no linear layer ({kind})",
                why=exist,
                fix=f"name the layers inside it: {', '.join(inside)}"
                if inside
                else "a module without matrices to adapt can be trained in full with method.modules_to_save",
            )
    missing = [entry for entry, names in found.items() if not names]
    if missing:
        hints = [hint for entry in missing if (hint := nearest(entry, real))]
        raise UsageError(
            f"method.target_modules: {', '.join(map(repr, missing))} match no linear layer of this model",
            why=exist,
            fix="; ".join(hints) or "method.target_modules=all-linear",
        )


def check_modules_to_save(model: Any, modules_to_save: list[str] | None) -> None:
    """Refuse modules to save that do not exist (peft would pass over them in silence) or that are quantised.

    Raises:
        UsageError: naming the entries and the module names that exist.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    real = sorted({name.rsplit(".", 1)[-1] for name in modules if not name.rsplit(".", 1)[-1].isdigit()})
    for entry in modules_to_save or []:
        found = [module for name, module in modules.items() if _ends_in(name, entry)]
        if not found:
            raise UsageError(
                f"method.modules_to_save: {entry!r} matches no module of this model",
                why=f"its modules end in: {', '.join(real)}",
                fix=nearest(entry, real),
            )
        if not all(parameter.is_floating_point() for module in found for parameter in module.parameters()):
            raise UsageError(
                f"method.modules_to_save: {entry!r} is quantised, so it cannot be trained in full",
                fix="leave it to the adapter, or method.name=lora",
            )


def saves_a_tied_weight(model: Any, modules_to_save: list[str] | None) -> bool:
    """True if embedding and head are one tensor and it is trained in full: then peft has to train one copy for both.

    Without it embedding and head would part in silence, and a merged model would lose one of the two.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not modules_to_save or head is None or head.weight is not embedding.weight:
        return False
    names = [name for name, module in model.named_modules() if module is embedding or module is head]
    return any(_ends_in(name, entry) for name in names for entry in modules_to_save)


def _ends_in(name: str, entry: str) -> bool:
    return name == entry or name.endswith("." + entry)


def _is_linear(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, its weight transposed

    return isinstance(module, (torch.nn.Linear, Conv1D))


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
