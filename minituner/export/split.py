"""Split: the same weights in files of another size, or in another data type; everything else is copied.

    big/model.safetensors (20 GB)   ->   small/model-00001-of-00010.safetensors ... and their index

Tensor by tensor, so memory holds one. Pickles go in, safetensors come out. Lesson: notebook 09.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from minituner.errors import UsageError
from minituner.export.merge import torch_dtype
from minituner.export.new_folder import new_folder
from minituner.export.shards import DEFAULT, parse_size, write_shards
from minituner.export.weights import INDEXES, Weights, read_config

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


def split(
    folder: str | Path,
    out: str | Path,
    *,
    max_shard_size: str | int = DEFAULT,
    dtype: str | None = None,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the model of `folder` into `out` in files of at most `max_shard_size`; returns `out`.

    Raises:
        UsageError: no model there, or `out` exists. MinitunerError: a file is damaged, or the disk is full.
    """
    folder, out = Path(folder), Path(out)
    if (folder / "adapter_config.json").is_file():
        raise UsageError(f"{folder} is an adapter, which is one small file", fix="merge it first, then split")
    limit, target = parse_size(max_shard_size), torch_dtype(dtype)
    config, weights = read_config(folder), Weights.of(folder)
    kinds = {}
    for name, entry in weights.entries.items():
        kinds[name] = entry.shape, target if target and entry.dtype.is_floating_point else entry.dtype
    with new_folder(out, force, inputs=(folder,)) as aside:
        files = write_shards(aside, kinds, lambda name: weights.read(name).to(kinds[name][1]), limit)
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in WEIGHTS and file.name not in (*INDEXES, "config.json"):
                shutil.copy(file, aside / file.name)
        if target:
            config.pop("torch_dtype", None)
            config["dtype"] = str(target).removeprefix("torch.")
        (aside / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"{out}: {len(kinds)} tensors in {len(files)} file{'s' if len(files) != 1 else ''}")
    return out
