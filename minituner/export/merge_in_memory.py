"""The merge for what cannot be merged file by file: the whole model in memory, and peft's `merge_and_unload`.

Experts of a mixture are separate tensors in the files and one tensor in memory, where the adapter changes them; an
adapter on an embedding is no linear layer. Here memory holds the model in float32, and the logits of a few prompts are
compared before and after, because no single layer can be. Lesson: notebook 09.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minituner.errors import MinitunerError, UsageError
from minituner.export.divergence import PROMPTS

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-3  # largest difference of float32 logits, whose own size is about ten


class NotFileByFile(UsageError):
    """This adapter and these files do not meet tensor by tensor. Exit code 2."""


def merge_in_memory(
    base: Path,
    adapter: Path,
    folder: Path,
    tokenizer: Any,
    dtype: torch.dtype | None,
    max_bytes: int,
    say: Callable[[str], None],
    trust_remote_code: bool = False,
) -> int:
    """Write the merged model's weights and settings into `folder`; returns the number of weight files.

    Raises:
        UsageError: the adapter does not fit. MinitunerError: merged and adapter differ.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from minituner.train.hf_folder import put_adapter_on

    own = getattr(AutoConfig.from_pretrained(str(base), trust_remote_code=trust_remote_code), "dtype", None)
    model, info = AutoModelForCausalLM.from_pretrained(
        str(base), dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):  # transformers draws them at random, with a warning
        raise MinitunerError(f"{base} lacks {len(missing)} weights of its model, {missing[0]} first")
    worn = put_adapter_on(model, adapter, say, other_base=True).eval()  # asked before, in merge.py
    ids = [torch.tensor([tokenizer.encode(text, add_special_tokens=False)]) for text in PROMPTS]
    with torch.no_grad():
        before = [worn(input_ids=row, use_cache=False).logits for row in ids]
        merged = worn.merge_and_unload(safe_merge=True).eval()
        after = [merged(input_ids=row, use_cache=False).logits for row in ids]
    difference = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    if not difference <= TOLERANCE:
        raise MinitunerError(
            f"the merged model differs from the adapter on the same base: logits by {difference:.3g}",
            why=f"at most {TOLERANCE:g} is rounding; more means weights that cannot be merged",
        )
    merged.to(dtype or own or torch.float32).save_pretrained(folder, max_shard_size=max_bytes)
    return len(list(folder.glob("*.safetensors")))
