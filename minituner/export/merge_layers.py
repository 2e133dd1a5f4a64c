"""An adapter over a model without values: which weights it changes, and each of them merged by peft's own layer.

    skeleton        the model on torch's meta device: names and shapes, no memory
    q_proj          W is put in, A and B are put in, peft merges, W' is taken out, all three are forgotten

So LoRA, rsLoRA, DoRA, rank patterns and modules trained in full are exactly peft's, and memory holds one layer. Each
merged layer is compared with the unmerged one on random inputs before it leaves. Lesson: notebook 09.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minituner.errors import MinitunerError, UsageError
from minituner.export.merge_in_memory import NotFileByFile

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
TOLERANCE = 1e-4  # of the largest output, in float32


def skeleton_of(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model of a folder on the meta device: every name and shape, no values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


class AdaptedLayers:
    """The adapter of a folder, ready to be merged weight by weight.

    Raises:
        UsageError: it does not fit this model: its layers, shapes or tensors. NotFileByFile: it changes what is no
            linear layer.
    """

    def __init__(self, skeleton: Any, adapter: Path) -> None:
        from minituner.model.quantized import import_bitsandbytes

        import_bitsandbytes()
        from peft import PeftConfig, get_peft_model
        from peft.utils.save_and_load import get_peft_model_state_dict
        from safetensors import SafetensorError, safe_open

        self.file = adapter / "adapter_model.safetensors"
        embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
        names = {id(module): name for name, module in skeleton.named_modules()}
        self.tied = head is not None and head.weight is embedding.weight
        self.embedding = f"{names[id(embedding)]}.weight"
        self.head = f"{names[id(head)]}.weight" if head is not None else ""
        try:
            config = PeftConfig.from_pretrained(str(adapter))
            with safe_open(self.file, "pt") as opened:
                saved = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
                warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
                warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")
                warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*")
                model = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
        except (OSError, SafetensorError) as error:
            raise MinitunerError(
                f"cannot read the adapter {adapter}: {error}", fix="give a finished hf/ folder"
            ) from None
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise does_not_fit(adapter, " ".join(str(error).split())[:300]) from None
        wanted = {
            key: tuple(value.shape)
            for key, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
            if not key.endswith(".base_layer.weight")
        }
        # A copy of embedding and head, which peft saves where one of them is adapted: not trained, so not looked at.
        spare = {PREFIX + name for name in (self.embedding, self.head)}
        spare |= {f"{name.removesuffix('.weight')}.base_layer.weight" for name in spare}
        wrong = sorted(
            {key for key in saved if key not in wanted and key not in spare}
            | {key for key, shape in wanted.items() if saved.get(key) != shape}
        )
        if wrong:
            raise does_not_fit(adapter, f"{len(wrong)} tensors have no match between the two, {wrong[0]} first")
        layers = {name.removeprefix(PREFIX): module for name, module in model.named_modules()}
        self.adapted = {f"{name}.weight": m for name, m in layers.items() if getattr(m, "lora_A", None)}
        odd = [
            name for name, m in layers.items() if getattr(m, "lora_embedding_A", None) or hasattr(m, "parameter_name")
        ]
        if odd:
            raise NotFileByFile(f"the adapter changes {odd[0]}, which is no linear layer")
        self.replaced = {key.removeprefix(PREFIX): key for key in wanted if "lora_" not in key}

    def changes(self, name: str) -> bool:
        """True if merging changes the weight `name`."""
        return name in self.adapted or name in self.replaced

    def unties(self) -> bool:
        """True if embedding and head were one tensor and are two after the merge."""
        if not self.tied:
            return False
        changed = self.changes(self.embedding), self.changes(self.head)
        both_saved = self.embedding in self.replaced and self.head in self.replaced
        if both_saved:
            import torch

            return not torch.equal(self._saved(self.replaced[self.embedding]), self._saved(self.replaced[self.head]))
        # peft trains a tied embedding as one copy for both, and saves it under one name, if it was told to.
        return self.head in self.adapted or self.embedding in self.adapted or (any(changed) and not self._kept_tied())

    def _kept_tied(self) -> bool:
        import json

        settings = json.loads((self.file.parent / "adapter_config.json").read_text(encoding="utf-8"))
        return bool(settings.get("ensure_weight_tying"))

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The new value of the weight `name`, in float32; `weight` is the base's.

        Raises:
            MinitunerError: merged and unmerged layer differ by more than rounding.
        """
        if name in self.replaced:
            return self._saved(self.replaced[name]).float()
        import torch

        layer = self.adapted[name]
        base = layer.get_base_layer()
        keep = {key: (parent, attribute) for key, (parent, attribute) in self._places(name, layer).items()}
        try:
            self._put(base, "weight", weight.float())
            if base.bias is not None:  # it stays as it is, and takes no part in what is compared
                self._put(base, "bias", torch.zeros(base.bias.shape))
            for key, (parent, attribute) in keep.items():
                self._put(parent, attribute, self._saved(key).float())
            layer.eval()
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(4, layer.in_features, generator=generator)
            with torch.no_grad():
                apart = layer(x)
                layer.merge(safe_merge=True)
                together = layer(x)
                result = base.weight.detach()
            gap, size = float((together - apart).abs().max()), float(apart.abs().max())
            if not gap <= TOLERANCE * max(size, 1e-6):
                raise MinitunerError(
                    f"{name} merged differs from the adapter on the same weight by {gap:.3g} (its outputs: {size:.3g})",
                    why=f"more than {TOLERANCE:g} of that is no rounding",
                    fix="see that the adapter's files are whole",
                )
            return result
        finally:
            layer.merged_adapters.clear()
            layer._caches.clear()
            for parent, attribute in [(base, "weight"), *keep.values()]:
                self._put(parent, attribute, torch.empty(getattr(parent, attribute).shape, device="meta"))

    def _places(self, name: str, layer: Any) -> dict[str, tuple[Any, str]]:
        """Key in the adapter's file -> where its tensor belongs in the layer."""
        stem = PREFIX + name.removesuffix(".weight")
        places = {f"{stem}.{m}.weight": (getattr(layer, m)["default"], "weight") for m in ("lora_A", "lora_B")}
        if layer.lora_bias.get("default"):
            raise UsageError(f"{self.file.parent} trains biases (lora_bias), which are not merged here")
        if "default" in layer.lora_magnitude_vector:
            places[f"{stem}.lora_magnitude_vector"] = (layer.lora_magnitude_vector["default"], "weight")
        return places

    def _saved(self, key: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self.file, "pt") as opened:
            return opened.get_tensor(key)

    @staticmethod
    def _put(parent: Any, attribute: str, value: torch.Tensor) -> None:
        import torch

        setattr(parent, attribute, torch.nn.Parameter(value, requires_grad=False))


def does_not_fit(adapter: Path, why: str) -> UsageError:
    """The error for an adapter of another model."""
    from minituner.train.hf_folder import base_of

    return UsageError(
        f"the adapter {adapter} does not fit this model",
        why=why,
        fix=f"use the base it was trained on: {base_of(adapter)}",
    )


def other_weights(
    adapter: Path, facts: Mapping[str, Any], this: str | None, force: bool, say: Callable[[str], None]
) -> None:
    """Refuse a base whose fingerprint `this` is another than that of the training, or say so under `force`.

    Raises:
        UsageError: it is another one.
    """
    what = f"{adapter} was trained on a base with other weights than this one"
    trained_on = facts.get("base_fingerprint")
    if not force:
        raise UsageError(
            what,
            why=f"fingerprint {trained_on} then, {this} now: the answers would be nonsense",
            fix=f"use the base it was trained on ({facts.get('base')}), or --force-merge if you know better",
        )
    say(f"careful: {what} (fingerprint {trained_on} then, {this} now)")
