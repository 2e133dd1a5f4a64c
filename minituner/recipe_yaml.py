"""How recipes are written: YAML read with a safe loader, changed by dotted keys, dumped so that people can read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from minituner.errors import UsageError


class _Dumper(yaml.SafeDumper):
    """Texts of several lines are written as blocks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(values: Mapping[str, Any]) -> str:
    """The values as YAML, in their own order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a recipe must not hide one of its own lines."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a recipe file. Raises UsageError if it is missing, not YAML, or holds no settings."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"no such recipe file: {path}",
            fix="check the path, or start from a shipped recipe",
            next_command="minituner list-cfg",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}") from None
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506  (a SafeLoader with one more check)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}", fix="correct the line named above") from None
    if not isinstance(values, dict):
        raise UsageError(
            f"{path} holds no settings (found {type(values).__name__})", next_command="minituner copy-cfg NAME ."
        )
    return values


def parse_overrides(overrides: Iterable[str] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    """`key.path=value` texts, or a mapping, as pairs; values are read as YAML. Raises UsageError for a broken one."""
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    parsed = []
    for item in overrides:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise UsageError(f"{item!r} is not an override", fix="write key.path=value, e.g. train.learning_rate=1e-4")
        try:
            parsed.append((key.strip(), yaml.safe_load(value)))
        except yaml.YAMLError as error:
            raise UsageError(f"override {item!r}: the value is not valid YAML: {error}") from None
    return parsed


def set_value(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `data.sources.0.path`-like keys in nested mappings and lists."""
    *parents, last = dotted.split(".")
    place: Any = values
    for part in parents:
        if isinstance(place, list):
            place = _list_item(place, part, dotted)
        else:
            if not isinstance(place.get(part), (dict, list)):
                place[part] = {}
            place = place[part]
    if isinstance(place, list):
        _list_item(place, last, dotted)
        place[int(last)] = value
    else:
        place[last] = value


def _list_item(items: list[Any], part: str, dotted: str) -> Any:
    if not part.isdigit() or int(part) >= len(items):
        raise UsageError(
            f"override {dotted!r}: {part!r} is not an item of that list",
            why=f"it has {len(items)} items, counted from 0",
        )
    return items[int(part)]
