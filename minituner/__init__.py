"""minituner: a fine-tuning course you can run and a tool you can trust.

    from minituner import Recipe, train, chat
    result = train(Recipe.load("smollm2_135m_instruct_lora_personal_assistant_e3"), work_dir="work_dirs/mine")
    print(chat(result.hf, prompt="Who are you?"))

Names are imported when they are first used, so `import minituner` and `minituner --help` are quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["MinitunerError", "Recipe", "chat", "estimate", "train"]

# `train` and `chat` are packages that can be called like the function they are named after (see their __init__).
_HOME = {"Recipe": "minituner.recipe", "MinitunerError": "minituner.errors", "estimate": "minituner.plan.estimate"}


def __getattr__(name: str) -> Any:
    if name in ("train", "chat"):
        return import_module(f"minituner.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'minituner' has no attribute {name!r}")
