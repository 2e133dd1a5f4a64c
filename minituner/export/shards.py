"""Writing safetensors tensor by tensor: a model of any size passes through the memory of one tensor.

    8 bytes        length of the header
    header         {"a.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}
    12 + ...       the tensors' bytes, one after the other

Shapes and types are known before the first value is, so the header is written first and the tensors follow as they are
made. The libraries' own writers take all tensors of a file at once. Format: safetensors.
Lesson: notebook 09.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from minituner.errors import MinitunerError, UsageError

if TYPE_CHECKING:
    import torch

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Kind = tuple[tuple[int, ...], "torch.dtype"]
DEFAULT = "2GB"


def parse_size(text: str | int) -> int:
    """Bytes of a size such as `2GB` (10^9), `500MB` or `2GiB` (2^30).

    Raises:
        UsageError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    if not found or found.group(2).upper() not in UNITS or not (size := _bytes(found)):
        raise UsageError(f"--max-shard-size {text} is no size", fix="write it as 2GB, 500MB or 1GiB")
    return size


def _bytes(found: re.Match[str]) -> int:
    return int(float(found.group(1)) * UNITS[found.group(2).upper()])


def bytes_of(kind: Kind) -> int:
    """Bytes of a tensor of this shape and data type."""
    return math.prod(kind[0]) * kind[1].itemsize


def plan_shards(kinds: Mapping[str, Kind], max_bytes: int) -> list[list[str]]:
    """Names in order, a new shard where the next tensor would exceed `max_bytes`; a larger tensor stands alone."""
    shards: list[list[str]] = []
    size = 0
    for name, kind in kinds.items():
        if not shards or size + bytes_of(kind) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_of(kind)
    return shards


def write_shards(
    folder: Path, kinds: Mapping[str, Kind], make: Callable[[str], torch.Tensor], max_bytes: int
) -> list[Path]:
    """Write `make(name)` for every name into `folder`, with an index if there are several files; returns the files.

    Raises:
        OSError: the disk. MinitunerError: `make` gave another shape or type than `kinds` said.
    """
    plan = plan_shards(kinds, max_bytes)
    files, places = [], {}
    for number, names in enumerate(plan, 1):
        title = "model.safetensors" if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
        write_file(folder / title, {name: kinds[name] for name in names}, make)
        files.append(folder / title)
        places |= dict.fromkeys(names, title)
    if len(plan) > 1:
        total = sum(map(bytes_of, kinds.values()))
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    return files


def write_file(file: Path, kinds: Mapping[str, Kind], make: Callable[[str], torch.Tensor]) -> None:
    """One safetensors file of `make(name)` for every name, each forgotten as soon as it is written."""
    import torch
    from safetensors.torch import _TYPES

    short = {dtype: text for text, dtype in _TYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, kind in kinds.items():
        header[name] = {"dtype": short[kind[1]], "shape": list(kind[0]), "data_offsets": [at, at + bytes_of(kind)]}
        at += bytes_of(kind)
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in kinds.items():
            tensor = make(name).detach().cpu().contiguous()
            if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
                raise MinitunerError(
                    f"{name} is {tuple(tensor.shape)} {tensor.dtype} and was to be {shape} {dtype}",
                    why="the files of a folder do not fit each other",
                )
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            del tensor
        stream.flush()
        os.fsync(stream.fileno())
