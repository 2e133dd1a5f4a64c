"""The weights of a model folder, one tensor at a time, whatever files they lie in.

    model.safetensors.index.json        {"model.embed_tokens.weight": "model-00001-of-00002.safetensors", ...}
    Weights.of(folder).read(name)       that one tensor; nothing else is held in memory

Refused before anything is opened: an index that names files outside its folder, missing shards, and code that comes
with the model. Old pickles (`.bin`) are read with `weights_only`, which runs nothing. Lesson: notebook 09.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minituner.errors import MinitunerError, UsageError

if TYPE_CHECKING:
    import torch

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies, and what it is like."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size in its own data type."""
        import math

        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """Name -> Entry, in the order of the files; `read` gets one tensor."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.entries = entries
        self._pickle: tuple[Path, dict[str, Any]] | None = None

    @classmethod
    def of(cls, folder: Path) -> Weights:
        """Look at the files of a folder; no tensor is read.

        Raises:
            UsageError: no weights, a shard that is missing, an index that leads out of the folder. MinitunerError: a
                file is damaged, or a pickle holds more than tensors.
        """
        weights = cls({})
        for file, names in weight_files(folder).items():
            found = weights._look(file)
            if names is not None and (lost := sorted(names - set(found))):
                raise MinitunerError(f"{file} lacks {len(lost)} tensors that the index promises, {lost[0]} first")
            weights.entries |= found
        return weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor; its file is opened for this one only, so that no page of the others stays in memory."""
        from safetensors import safe_open

        file = self.entries[name].file
        if file.suffix != ".safetensors":
            return self._unpickled(file)[name]
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)

    def _look(self, file: Path) -> dict[str, Entry]:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import _getdtype

        try:
            if file.suffix != ".safetensors":
                return {n: Entry(file, tuple(t.shape), t.dtype) for n, t in self._unpickled(file).items()}
            with safe_open(file, "pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                return {n: Entry(file, tuple(s.get_shape()), _getdtype(s.get_dtype())) for n, s in slices.items()}
        except (OSError, SafetensorError) as error:
            raise MinitunerError(f"cannot read {file}: {error}", fix="copy or download the folder again") from None

    def _unpickled(self, file: Path) -> dict[str, torch.Tensor]:
        import pickle

        import torch

        from minituner.model.loading import not_plain

        if self._pickle is None or self._pickle[0] != file:
            try:
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
                raise MinitunerError(
                    f"{file} cannot be read as plain tensors: {not_plain(error)}",
                    why="a pickle may hold code, and none is ever run here",
                    fix="get the model as safetensors",
                ) from None
            self._pickle = file, {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
        return self._pickle[1]


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files of a folder, each with the names that the index expects in it (None without an index).

    Raises:
        UsageError: there are none, one is missing, or the index leads out of the folder.
    """
    for index in (folder / name for name in INDEXES):
        if not index.is_file():
            continue
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
            shards: dict[str, set[str]] = {}
            for name, shard in places:
                shards.setdefault(shard, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{index} cannot be read: {error}", fix="copy or download the folder again") from None
        for shard in shards:
            if Path(shard).name != shard or shard in ("", "..") or "\\" in shard:
                raise UsageError(
                    f"{index} names a file outside its folder: {shard!r}",
                    why="a model's files lie beside its index",
                    fix="do not use this folder unless you know who made it",
                )
            if not (folder / shard).is_file():
                raise UsageError(f"{folder} is incomplete: {shard} is missing", fix="copy or download it again")
        return {folder / shard: names for shard, names in sorted(shards.items())}
    for file in (folder / name for name in SINGLE):
        if file.is_file():
            return {file: None}
    raise UsageError(
        f"{folder} holds no model weights",
        why=f"neither {' nor '.join(SINGLE)}, nor an index of shards",
        fix="give a model's folder (config.json and safetensors)",
    )


def refuse_remote_code(folder: Path, trust_remote_code: bool = False) -> None:
    """Refuse a model that transformers does not know and that brings code of its own.

    Raises:
        UsageError: it does, and nobody said that the code may run. Or there is no config.json.
    """
    from transformers import CONFIG_MAPPING

    config = read_config(folder)
    if config.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        code = config.get("auto_map")
        raise UsageError(
            f"{folder} is a {config.get('model_type')!r} model, which transformers does not know",
            why="it would run Python code that lies in the folder" if code else "config.json names no known model_type",
            fix="read that code, then add --trust-remote-code" if code else "use a model that transformers knows",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        why = "it is no JSON object"
    except (OSError, ValueError) as error:
        why = str(error)
    raise UsageError(f"{folder} has no readable config.json", why=why, fix="give a model's folder")
