"""What the server of `processes.py` imports before it forks: everything slow. A command then starts in no time.

The only threads among it are pyarrow's, which is made to be forked.
"""

import gc

import datasets  # noqa: F401
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
from minituner.collection import collect_seldom

# Half a million objects of imported modules: a child that collects garbage need not look at them, nor copy their pages.
gc.collect()
gc.freeze()
collect_seldom()  # as the console script does
