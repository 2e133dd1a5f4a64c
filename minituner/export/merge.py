"""Merge: an adapter becomes part of its base model, one folder that needs no peft.

    W_merged = W + (lora_alpha / lora_rank) * B @ A        computed in float32, saved in the base's own data type

Merged and adapter must say the same on that base: the logits of a few prompts are compared before anything is called
done. Tied embeddings stay tied. Lesson: notebook 09.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from minituner.errors import MinitunerError, UsageError
from minituner.model.sources import fetch
from minituner.train.hf_folder import FACTS, base_of, put_adapter_on

PROBES = ("Who are you?", "The capital of France is", "请介绍你自己。")
TOLERANCE = 1e-3  # largest difference of float32 logits, whose own size is about ten


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Merge the adapter folder into its base and write a full model to `out`; returns `out`.

    Raises:
        UsageError: no adapter there, or `out` exists. MinitunerError: merged and adapter differ.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from minituner.model.loading import load_tokenizer, quiet

    adapter, out = Path(adapter), Path(out)
    if not (adapter / "adapter_config.json").is_file():
        raise UsageError(
            f"{adapter} is not an adapter folder (it has no adapter_config.json)",
            fix="give the hf/ folder of a finished LoRA run",
        )
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", fix="give a folder that does not exist yet")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise UsageError(f"{out} exists and is not empty", fix="choose another folder, or --overwrite")
    folder = fetch(str(base or base_of(adapter)), say=say)
    say(f"merging {adapter} into {folder}")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    # Asked of the folder: the model's own config says float32 by now, as it was loaded.
    own_dtype = getattr(AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code), "dtype", None)
    tied = model.config.tie_word_embeddings
    tokenizer = load_tokenizer(adapter, trust_remote_code=trust_remote_code)
    peft_model = put_adapter_on(model, adapter, say).eval()
    ids = [torch.tensor([tokenizer.encode(text, add_special_tokens=False)]) for text in PROBES]
    with torch.no_grad():
        before = [peft_model(input_ids=i, use_cache=False).logits for i in ids]
        merged = peft_model.merge_and_unload(safe_merge=True).eval()
        difference = max(
            float((merged(input_ids=i, use_cache=False).logits - b).abs().max())
            for i, b in zip(ids, before, strict=True)
        )
    if not difference <= TOLERANCE:
        raise MinitunerError(
            f"the merged model differs from the adapter on the same base: logits by {difference:.3g}",
            why=f"at most {TOLERANCE:g} is rounding; more means another base, or weights that cannot be merged",
            fix="give the base the adapter was trained on with --base",
        )
    say(f"merged == adapter on this base: largest difference of a logit {difference:.2g}")
    if isinstance(own_dtype, torch.dtype):
        merged.to(own_dtype)
    merged.config.tie_word_embeddings = tied
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with quiet():
        merged.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if (adapter / FACTS).is_file():
        shutil.copy(adapter / FACTS, aside / FACTS)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(aside, out)
    say(f"{out} is a full model now")
    return out
