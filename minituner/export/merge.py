"""Merge: an adapter becomes part of its base model, one folder that needs no peft.

    W' = W + (lora_alpha / lora_rank) * B @ A         in float32, written in the base's own data type

    base       --read--> one tensor --+                      memory: a few copies of the largest tensor,
    adapter    --read--> its A and B -+-> W' --write--> out  whatever the size of the model

Each merged layer is compared with the unmerged one on random inputs. Tied embeddings stay tied, unless the adapter
tells them apart. An adapter that was trained over 4 or 8 bits can be merged into the full-precision base (`full`, the
better weights) or into what the training saw (`dequantized`, the same answers); how far the result is from the trained
model is measured either way (which needs each of the two in memory once), and a merge that undoes the training is
refused (export/divergence.py).
Lesson: notebook 09.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minituner.errors import MinitunerError, UsageError
from minituner.export.merge_in_memory import NotFileByFile, merge_in_memory
from minituner.export.new_folder import check_free, new_folder
from minituner.export.shards import DEFAULT, Kind, parse_size, write_shards
from minituner.export.weights import Weights, read_config, refuse_remote_code
from minituner.recipe import SHORT_DTYPES

if TYPE_CHECKING:
    import torch

    from minituner.export.merge_layers import AdaptedLayers
    from minituner.export.quantized_base import QuantizedBase

Into = Literal["full", "dequantized"]
Say = Callable[[str], None]
QUANTIZED = ("qlora", "int8_lora")


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    into: Into = "full",
    dtype: str | None = None,
    max_shard_size: str | int = DEFAULT,
    force: bool = False,
    force_merge: bool = False,
    trust_remote_code: bool = False,
    say: Say = print,
) -> Path:
    """Merge the adapter folder into its base and write a full model to `out`; returns `out`.

    Args:
        base: the base model, if not the one that training used.
        into: `full` precision, or `dequantized`: the base as a quantised training saw it.
        dtype: fp16, bf16 or fp32; None keeps each tensor's own.
        force: replace `out`.
        force_merge: go on although the base has other weights, or the merge undoes the training.

    Raises:
        UsageError: no adapter there, it does not fit, `out` exists. MinitunerError: a file is damaged, the disk is
            full, or the merge undoes too much of the training.
    """
    from minituner.data.templates import NamedTemplate
    from minituner.export.beside import write_beside
    from minituner.export.merge_layers import AdaptedLayers, skeleton_of
    from minituner.export.quantized_base import QuantizedBase
    from minituner.export.serving import serving_problems
    from minituner.model.loading import load_tokenizer, quiet, resolve_dtype
    from minituner.model.sources import fetch
    from minituner.train.hf_folder import base_of, facts_of

    adapter, out = Path(adapter), Path(out)
    check_adapter(adapter)
    check_free(out, force)
    limit, target = parse_size(max_shard_size), torch_dtype(dtype)
    facts = facts_of(adapter)
    if (template := facts.get("template") or "native") != "native":
        NamedTemplate.find(template)  # an unknown one is said before the work
    method = str(facts.get("method") or "lora")
    if into == "dequantized" and method not in QUANTIZED:
        raise UsageError(
            f"{adapter} was not trained over a quantised base (its method: {method})",
            fix="leave --base dequantized out: its base is the full-precision one",
        )
    folder = fetch(str(base or base_of(adapter)), say=say)
    refuse_remote_code(folder, trust_remote_code)
    config = read_config(folder)
    if config.get("quantization_config"):
        raise UsageError(f"{folder} is stored quantised, and a sum cannot be", fix="give the full-precision model")
    weights = Weights.of(folder)
    skeleton = skeleton_of(folder, trust_remote_code)
    names = [name for name, _ in skeleton.named_parameters()]
    prefix = f"{skeleton.base_model_prefix}."
    in_file = {(n if n in names or prefix + n not in names else prefix + n): n for n in weights}
    _check_base(weights, in_file, names, facts, adapter, force_merge, say)
    held = str(resolve_dtype(str(facts.get("dtype") or "auto"), "cpu")[0]).removeprefix("torch.")
    rounding = QuantizedBase(skeleton_of(folder, trust_remote_code), method, _torch(held)) if into != "full" else None
    tokenizer = load_tokenizer(_tokenizer_folder(adapter, folder), trust_remote_code=trust_remote_code)
    parts: _Parts | None = None
    try:
        parts = _Parts(weights, in_file, AdaptedLayers(skeleton, adapter), rounding, target)
    except NotFileByFile as reason:
        if rounding:
            raise
        say(f"{reason.what}: the whole model is merged in memory instead")
    say(f"merging {adapter} into {folder}" + (", its weights rounded as in training" if rounding else ""))
    with new_folder(out, force, inputs=(adapter, folder)) as aside, quiet():
        if parts:
            files = len(write_shards(aside, parts.kinds, parts.make, limit))
            _write_config(aside, folder, config, target, parts.unties, say)
        else:
            files = merge_in_memory(folder, adapter, aside, tokenizer, target, limit, say, trust_remote_code)
        facts |= {"base": facts.get("base") or str(base or base_of(adapter)), "merged": {"base": into}}
        write_beside(aside, tokenizer, facts, full=True)
        if method in QUANTIZED:
            facts["merged"] |= check_divergence(
                folder, adapter, aside, {**facts, "dtype": held}, tokenizer, into, force_merge, say, trust_remote_code
            )
            write_beside(aside, tokenizer, facts, full=True)
    for problem in serving_problems(out):
        say(f"careful: {problem}")
    merged = f"{parts.merged} of {len(parts.kinds)} tensors merged" if parts else "merged in memory"
    say(f"{out} is a full model now: {merged}, {files} file{'s' if files != 1 else ''}")
    return out


class _Parts:
    """What the merged folder is made of: every tensor's shape and type, and how to make it."""

    def __init__(
        self,
        weights: Weights,
        in_file: dict[str, str],
        layers: AdaptedLayers,
        rounding: QuantizedBase | None,
        target: torch.dtype | None,
    ) -> None:
        self.weights, self.layers, self.rounding = weights, layers, rounding
        self.unties = layers.unties()
        self.names = {n: own for own, n in in_file.items()}  # name in the file -> name in the model
        if layers.tied:
            self.names.pop(in_file.get(layers.head, ""), None)
            if self.unties:
                head = layers.head
                self.names[head] = head
            elif layers.head in layers.replaced:
                layers.replaced.setdefault(layers.embedding, layers.replaced[layers.head])
        self.sources = {n: n for n in self.names}
        if layers.tied and self.unties:
            self.sources[layers.head] = in_file[layers.embedding]
        self.target = target
        self.kinds: dict[str, Kind] = {name: self._kind(name) for name in self.names}
        self.merged = 0
        kept_tied = {layers.head} if layers.tied and not self.unties else set()
        if lost := sorted({*layers.adapted, *layers.replaced} - set(self.names.values()) - kept_tied):
            raise NotFileByFile(f"the base's files have no {lost[0]}, which the adapter changes")

    def _kind(self, name: str) -> Kind:
        entry = self.weights[self.sources[name]]
        own = entry.dtype
        return entry.shape, (self.target or own) if own.is_floating_point else own

    def make(self, name: str) -> torch.Tensor:
        """The tensor as it is written."""
        own, (_, dtype) = self.names[name], self.kinds[name]
        value = self.weights.read(self.sources[name])
        if not value.is_floating_point():
            return value
        if self.rounding:
            value = self.rounding.rounded(own, value)
        if self.layers.changes(own):
            value = self.layers.merged(own, value)
            self.merged += 1
        return value.to(dtype)


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The torch type of `fp16`, `bf16`, `fp32` or a long name; None for None.

    Raises:
        UsageError: it is another word.
    """
    if name is None:
        return None
    long = SHORT_DTYPES.get(name, name)
    if long not in SHORT_DTYPES.values():
        raise UsageError(f"--dtype {name} is unknown", fix=f"one of {', '.join(SHORT_DTYPES)}")
    return _torch(long)


def _torch(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)


def check_adapter(adapter: Path) -> None:
    """Refuse a folder that is no adapter of safetensors.

    Raises:
        UsageError: it is none, it is incomplete, or its weights are a pickle.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise UsageError(
            f"{adapter} is not an adapter folder (it has no adapter_config.json)",
            fix="give the hf/ folder of a finished LoRA run",
        )
    if not (adapter / "adapter_model.safetensors").is_file():
        old = (adapter / "adapter_model.bin").is_file()
        raise UsageError(
            f"{adapter} has no adapter_model.safetensors",
            why="adapter_model.bin is a pickle, which can hold code" if old else "the folder is incomplete",
            fix="save it with a newer peft as safetensors" if old else "give the hf/ folder of a finished LoRA run",
        )


def _check_base(
    weights: Weights,
    in_file: dict[str, str],
    names: list[str],
    facts: dict[str, Any],
    adapter: Path,
    force: bool,
    say: Say,
) -> None:
    """Refuse a base with other shapes or weights than the training had."""
    from minituner.export.merge_layers import does_not_fit, other_weights
    from minituner.model.fingerprint import comparable, fingerprint_of

    known, trained_on = set(in_file), facts.get("base_fingerprint")
    if not set(names) <= known or not trained_on or ":" in trained_on:  # fused when loaded; or a quantised base
        return
    held = _torch(facts["dtype"]) if facts.get("dtype") else None

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in sorted(names):
            tensor = weights.read(in_file[name])
            yield name, tensor.to(held) if held and not comparable_type(tensor) else tensor

    this = fingerprint_of(tensors())
    if not comparable(trained_on, this) or trained_on == this:
        return
    if trained_on.split("-")[0] != this.split("-")[0]:
        raise does_not_fit(adapter, "this model's weights have other names or shapes than the base of the training")
    other_weights(adapter, facts, this, force, say)


def comparable_type(tensor: torch.Tensor) -> bool:
    """True for the data types whose fingerprints can be compared."""
    return tensor.dtype in (_torch("float32"), _torch("bfloat16"))


def _tokenizer_folder(adapter: Path, base: Path) -> Path:
    for folder in (adapter, base):
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
            return folder
    raise MinitunerError(
        f"neither {adapter} nor {base} has a tokenizer",
        fix="copy tokenizer.json and tokenizer_config.json of the base into the adapter's folder",
    )


def _write_config(
    aside: Path, base: Path, config: dict[str, Any], target: torch.dtype | None, unties: bool, say: Say
) -> None:
    if target is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(target).removeprefix("torch.")
    if unties:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
        say("embedding and output head were one tensor; the adapter tells them apart, so they are two from here on")
    (aside / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (base / "generation_config.json").is_file():
        shutil.copy(base / "generation_config.json", aside / "generation_config.json")


def check_divergence(
    folder: Path,
    adapter: Path,
    aside: Path,
    facts: dict[str, Any],
    tokenizer: Any,
    into: Into,
    force: bool,
    say: Say,
    trust_remote_code: bool,
) -> dict[str, float]:
    """Measure a merge of a quantised training, say it, and refuse one that undoes the training."""
    from minituner.export.divergence import THRESHOLD, measure

    found = measure(folder, adapter, aside, facts, tokenizer, say, trust_remote_code, force)
    text = (
        f"KL(merged || adapter on its own base) {found.kl:.3g}, the adapter's own effect {found.effect:.3g} nats a"
        f" token over {found.tokens} tokens: ratio {found.ratio:.3g}"
    )
    say(text)
    if found.too_large and not force:
        other = "--base dequantized (the base as the training saw it), or " if into == "full" else ""
        raise MinitunerError(
            f"merging into this base undoes too much of the training: ratio {found.ratio:.3g}, at most {THRESHOLD:g}",
            why=text,
            fix=f"{other}--force-merge if you want it all the same",
        )
    return {"kl": found.kl, "effect": found.effect}
