"""The data's side of the walk: records, conversations, templates, labels, packs. Lessons: notebooks 01 to 04."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_HOME = {
    "Conversation": "conversation",
    "Message": "conversation",
    "to_turns": "conversation",
    "from_turns": "conversation",
    "to_conversation": "formats",
    "detect_format": "formats",
    "FORMATS": "formats",
    "read_records": "records",
    "Segment": "templates",
    "render": "templates",
    "encode": "encoding",
    "encode_many": "encoding",
    "encode_prompt": "encoding",
    "pack": "packing",
    "load_tokenized": "tokenized",
    "write_tokenized": "tokenized",
    "prepare": "prepare",
    "collate": "collate",
    "Ledger": "ledger",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, so that the command line starts fast."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps functions named like their modules (`prepare`, `collate`), whichever import comes first.

    Python's import machinery sets a submodule as an attribute of its package, over anything of that name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
