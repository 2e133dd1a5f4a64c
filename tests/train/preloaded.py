"""What the server of `processes.py` imports before it forks: everything slow, and nothing that starts a thread."""

import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import (  # noqa: F401  (a lazy package: naming them imports them)
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import minituner.cli
import minituner.train.loop  # noqa: F401
