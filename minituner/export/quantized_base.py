"""The base as a quantised training saw it: each weight rounded to 4 or 8 bits and made whole again.

    W16  --quantise-->  W4  --dequantise-->  Wq      an adapter trained by qlora is a correction to Wq, not to W16

Which layers are quantised is asked of transformers' own quantiser, on a model without values; the rounding is
bitsandbytes' own, layer by layer. Source: Dettmers et al. 2023 (QLoRA). Lesson: notebook 09.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minituner.model.quantized import quantization_config

if TYPE_CHECKING:
    import torch


class QuantizedBase:
    """Rounds the weights that `method` holds in few bits.

    Args:
        skeleton: the model on the meta device; it is changed.
        method: qlora or int8_lora.
        dtype: the data type of the training, in which everything else was held.
    """

    def __init__(self, skeleton: Any, method: str, dtype: torch.dtype) -> None:
        from transformers.integrations import replace_with_bnb_linear
        from transformers.quantizers.auto import AutoHfQuantizer

        config = quantization_config(method, dtype)
        quantizer = AutoHfQuantizer.from_config(config)
        skip = quantizer.get_modules_to_not_convert(
            skeleton, config.llm_int8_skip_modules, skeleton._keep_in_fp32_modules
        )
        self.dtype = dtype
        self.layers = dict(
            replace_with_bnb_linear(skeleton, modules_to_not_convert=skip, quantization_config=config).named_modules()
        )

    def holds(self, name: str) -> bool:
        """True if the weight `name` is one of the quantised."""
        module, _, kind = name.rpartition(".")
        return kind == "weight" and hasattr(self.layers.get(module), "source_cls")

    def rounded(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` in float32 as the training saw it."""
        import bitsandbytes as bnb
        import torch
        from transformers.pytorch_utils import Conv1D

        from minituner.model.quantized import import_bitsandbytes

        import_bitsandbytes()
        weight = weight.to(self.dtype)
        if not self.holds(name):
            return weight.float()
        layer = self.layers[name.rpartition(".")[0]]
        turned = issubclass(layer.source_cls, Conv1D)
        weight = (weight.T if turned else weight).contiguous()
        packed = type(layer.weight)(weight, requires_grad=False, **layer.weight.__dict__).to(weight.device)
        if isinstance(packed, bnb.nn.Params4bit):
            whole = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
        else:  # as the 8-bit layer multiplies: integers times the scale of their row, in the compute type
            whole = packed.CB.to(self.dtype).mul_(packed.SCB.unsqueeze(1).mul(1.0 / 127.0))
        whole = whole.to(torch.float32).view(weight.shape)
        return whole.T.contiguous() if turned else whole
