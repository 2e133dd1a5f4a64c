"""Loading: a folder becomes a model and a tokenizer, in a data type this machine is fast in.

On a CPU without matrix units for it, bfloat16 is several times *slower* than float32, and asking the CPU for its
features does not tell. So `auto` times one small matrix product in each type and takes the faster. Frozen or not, what
is trained (adapters, or all weights) stays in float32 unless the recipe names a type. Lesson: notebook 05.
"""

from __future__ import annotations

import pickle  # only its error's name: nothing is read with it
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from minituner.errors import MinitunerError
from minituner.model import attention
from minituner.model.quantized import differentiable_everywhere, leave_the_file, parameter_bytes, quantization_config
from minituner.recipe import MethodSection, ModelSection


def device_of_this_machine() -> str:
    """`cuda` if there is a usable GPU, else `cpu` (Apple's mps has no float32-exact attention path and is not used)."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=8)
def fast_dtype(device: str) -> tuple[torch.dtype, str]:
    """The faster of float32 and bfloat16 on this device, and a sentence with the measurement."""
    if device == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "this GPU computes bfloat16 natively"
        return torch.float32, "this GPU has no bfloat16; float16 would need loss scaling"
    speed = _gemm_speeds((torch.float32, torch.bfloat16))
    text = ", ".join(f"{str(dtype).removeprefix('torch.')} {value / 1e9:.0f}" for dtype, value in speed.items())
    best = torch.bfloat16 if speed[torch.bfloat16] > 1.5 * speed[torch.float32] else torch.float32
    return best, f"measured GFLOP/s on this CPU: {text}"


def _gemm_speeds(dtypes: tuple[torch.dtype, ...], size: int = 256, rounds: int = 6) -> dict[torch.dtype, float]:
    """Floating-point operations per second of a (size, size) matrix product in each type.

    The types take turns and the best round counts, so that another busy program slows them alike. Where one is four
    times as fast as another in the best of two rounds, the others are left out: bfloat16 takes long on a processor
    without instructions for it.
    """
    matrices = {dtype: torch.ones(size, size, dtype=dtype) for dtype in dtypes}
    best = dict.fromkeys(dtypes, float("inf"))
    for number in range(rounds):
        for dtype, matrix in matrices.items():
            matrix @ matrix  # wakes the threads
            start = time.perf_counter()
            matrix @ matrix
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        if number and max(best.values()) > 4 * min(best.values()):
            break
    return {dtype: 2 * size**3 / seconds for dtype, seconds in best.items()}


def resolve_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """The torch data type for a recipe's `model.dtype`, and why."""
    if name == "auto":
        return fast_dtype(device)
    return getattr(torch, name), "as the recipe says"


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises:
        MinitunerError: the folder has none, or it is broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0].strip()
        if first.endswith("one of:"):  # a list of ways follows, none of which is known here
            first = "none of its files says how text becomes ids"
        raise MinitunerError(
            f"cannot load a tokenizer from {folder}: {first}",
            fix="the folder needs tokenizer.json (or the tokenizer's own files) beside config.json",
        ) from None


def not_plain(error: Exception) -> str:
    """What torch's reader of plain tensors found in a pickle, without its advice to read the file all the same."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next(
        (line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0].split(". In PyTorch")[0]
    )


def load_model(
    folder: str | Path,
    model: ModelSection,
    method: MethodSection,
    *,
    one_document_rows: bool = False,
    device: str | None = None,
) -> tuple[Any, str, list[str]]:
    """The model on its device, the attention implementation, and sentences that say what was chosen and why.

    Raises:
        UsageError: settings that do not go together, or a method that needs a package that is not installed.
        MinitunerError: the folder cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    device = device or device_of_this_machine()
    dtype, why_dtype = resolve_dtype(model.dtype, device)
    attention.register()
    quantization = quantization_config(method.name, dtype)
    # Full fine-tuning updates the weights themselves: in bfloat16 small updates round away, so masters are float32.
    weights = torch.float32 if method.name == "full" and model.dtype == "auto" else dtype
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=model.trust_remote_code)
            implementation, why_attention = attention.choose(
                model.attention,
                attention.facts_here(device, str(weights).removeprefix("torch.")),
                attention.needs_of(config),
                one_document_rows=one_document_rows,
            )
            loaded = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=weights,
                attn_implementation=implementation,
                trust_remote_code=model.trust_remote_code,
                quantization_config=quantization,
            )
    except pickle.UnpicklingError as error:
        raise MinitunerError(
            f"the weights in {folder} cannot be read as plain tensors: {not_plain(error)}",
            why="a pickle (.bin) may hold code, and none is ever run here",
            fix="get the model as safetensors",
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise MinitunerError(
            f"cannot load a model from {folder}: {str(error).splitlines()[0]}",
            fix="check that the folder holds config.json and safetensors weights of a causal language model",
            next_command="minituner doctor",
        ) from None
    # Where pad is also the end token, torch would drop the gradient of its embedding; no pad id is an input here.
    loaded.get_input_embeddings().padding_idx = None
    loaded.config.use_cache = False
    if quantization is None:
        loaded.to(device)
    else:
        differentiable_everywhere(loaded)
        leave_the_file(loaded)
    notes = [
        f"dtype {str(weights).removeprefix('torch.')}: {why_dtype}",
        f"attention {implementation}: {why_attention}",
        f"device {device}",
    ]
    if quantization is not None:
        bits = "4 bits (NF4, double quantisation)" if method.name == "qlora" else "8 bits"
        notes.append(
            f"base in {bits}: {parameter_bytes(loaded) / 1e6:,.1f} MB; embedding, norms and head stay in "
            f"{str(dtype).removeprefix('torch.')}, which is also what is computed in"
        )
    return loaded, implementation, notes


@contextmanager
def quiet() -> Iterator[None]:
    """Within: no progress bar of transformers (loading from disk takes a second)."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
