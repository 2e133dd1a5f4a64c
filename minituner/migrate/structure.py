"""Finding values in the structures of an old config: through dict(...) calls, dicts and lists. Lesson: notebook 08."""

from __future__ import annotations

from typing import Any

from minituner.migrate.folding import Call, Config, Ref


def at(node: Any, *path: str | int) -> Any:
    """What lies under the keys, through dict(...) calls, dicts and lists; None where there is nothing."""
    for key in path:
        if isinstance(node, Call):
            node = node.named
        if isinstance(node, dict):
            node = node.get(key)
        elif isinstance(node, list | tuple) and isinstance(key, int) and -len(node) <= key < len(node):
            node = node[key]
        else:
            return None
    return node


def named(value: Any) -> str:
    """The last part of a reference, or a text; empty for the rest."""
    if isinstance(value, Ref):
        return value.name
    if isinstance(value, Call):  # optim_type = bnb.optim.AdamW8bit, written dict(type=...)
        return named(value.get("type")) or value.function.rsplit(".", 1)[-1]
    return value.rsplit(".", 1)[-1] if isinstance(value, str) else ""


def first(config: Config, path: tuple[str | int, ...], name: str | None = None) -> Any:
    """The value in a structure; where there is none, the name at the top."""
    found = at(config.values, *path)
    return config.values.get(name) if found is None and name else found


def whole(value: Any, default: int) -> int:
    """A positive whole number, or the default."""
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 1 else default
