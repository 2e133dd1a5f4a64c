"""Finding data: a name becomes the files to read, in an order that is the same on every machine.

    "data/train.jsonl"   -> that file
    "data/"              -> its data files, sorted, those of the split if their names tell splits apart
    "owner/name"         -> a hub data set, through `datasets`
    "ms:owner/name"      -> a ModelScope data set, if `modelscope` is installed

Nothing is opened here but hub data sets; `records.py` reads. Lesson: notebook 01.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minituner.errors import DataError, SourceError, nearest
from minituner.home import find_data_script

TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
# What `datasets` and the hub lay beside the data.
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Where records come from: files to read in order, or rows that a library already gives."""

    name: str
    files: list[Path] = field(default_factory=list)
    rows: Iterable[Any] | None = None


def locate(location: str, split: str = "train") -> Source:
    """Find what `location` names.

    Raises:
        DataError: there is no such file, folder or split, or the file's type is unknown.
        SourceError: a hub data set could not be fetched.
    """
    if location.startswith("ms:"):
        return Source(location, rows=_from_modelscope(location.removeprefix("ms:"), split))
    path = Path(location)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return Source(location, rows=_from_disk(path, split))
        return Source(location, rows=_from_bin(path)) if _is_tokenized(path) else Source(location, _folder(path, split))
    if path.is_file() and path.suffix == ".bin":
        return Source(location, rows=_from_bin(path))
    if path.is_file():
        if not is_data_file(path):
            why = f"known are {', '.join(TEXT_SUFFIXES)} (also with .gz), .parquet and .bin"
            raise DataError(f"{location}: unknown kind of data file", why=why, fix="rename or convert the file")
        return Source(location, [path])
    # `data/tpyo` is a slip in a path when there is a folder `data`; `owner/name` without one is a hub data set.
    if HUB_ID.fullmatch(location) and not is_data_file(path) and not Path(path.parts[0]).is_dir():
        return Source(location, rows=_from_hub(location, split))
    raise _missing(path)


def is_data_file(path: Path) -> bool:
    """Whether the name ends like a file that can be read."""
    return path.name.lower().endswith(SUFFIXES)


def _missing(path: Path) -> DataError:
    if script := find_data_script(f"make_{path.stem}.py"):
        return DataError(
            f"{path}: no such file",
            why="it is made by a script, which has not been run here",
            fix="run it, or give the path of your own file with data.sources.0.path=FILE",
            next_command=f"python {os.path.relpath(script)} --help",
        )
    if not path.parent.is_dir():
        return DataError(f"{path}: no such file", why=f"the folder {path.parent} does not exist", fix="check the path")
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir() or is_data_file(entry))
    listed = f"data files there: {', '.join(names[:8])}" if names else "there is no data file in that folder"
    return DataError(
        f"{path}: no such file or folder",
        why=listed,
        fix=nearest(path.name, names) or "check the path",
        next_command=f"ls {path.parent}",
    )


def _split_of(name: str) -> str | None:
    """The split that a relative path names (`data/train-00000-of-00002.parquet` -> train), or None."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _folder(folder: Path, split: str) -> list[Path]:
    """The folder's data files, sorted by path; files without a split in their name belong to `train`."""
    names = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and is_data_file(file) and file.name not in NOT_DATA
    )
    names = [name for name in names if not any(part.startswith((".", "_")) for part in name.split("/"))]
    if not names:
        why = f"no file ends in {', '.join(TEXT_SUFFIXES)} or .parquet"
        raise DataError(f"{folder}: no data files", why=why, fix="check the path", next_command=f"ls {folder}")
    splits = {name: _split_of(name) or "train" for name in names}
    wanted = SPLITS.get(split, split)
    if not (chosen := [name for name in names if splits[name] == wanted]):
        found = ", ".join(sorted(set(splits.values())))
        raise DataError(
            f"{folder}: no files of the split {split!r}", why=f"splits found: {found}", fix="name one of them"
        )
    return [folder / name for name in chosen]


def _is_tokenized(folder: Path) -> bool:
    """Whether it holds InternEvo's files: `.bin` beside `.bin.meta`."""
    return next(folder.rglob("*.bin.meta"), None) is not None


def _from_bin(path: Path) -> Iterable[Any]:
    """The samples of InternEvo's tokenised files, as rows of input_ids and labels."""
    from minituner.data.tokenized import load_tokenized

    data = load_tokenized(path)
    return (data[index] for index in range(len(data)))


def _from_disk(path: Path, split: str) -> Iterable[Any]:
    """A folder written by `datasets.save_to_disk`."""
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be loaded as a saved data set", why=str(error)) from error
    if not isinstance(data, DatasetDict):
        return data
    if split not in data:
        raise DataError(f"{path}: no split {split!r}", why=f"splits found: {', '.join(data)}", fix="name one of them")
    return data[split]


def _from_hub(name: str, split: str) -> Iterable[Any]:
    import datasets

    try:
        return datasets.load_dataset(name, split=split, streaming=False)
    except Exception as error:  # the library raises its own, network and file errors alike; all mean: not fetched
        raise SourceError(
            f"{name}: the data set (split {split!r}) could not be loaded from the hub",
            why=f"{type(error).__name__}: {error}",
            fix=f"check the name, the split and the network; if {name} is a file or folder, check the path",
        ) from error


def _from_modelscope(name: str, split: str) -> Iterable[Any]:
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError as error:
        raise SourceError(
            f"ms:{name}: ModelScope data needs the package modelscope",
            why=str(error),
            next_command="pip install modelscope",
        ) from error
    try:
        return MsDataset.load(name, split=split)
    except Exception as error:  # as above: whatever the library raises, the data set was not fetched
        raise SourceError(
            f"ms:{name}: the data set (split {split!r}) could not be loaded from ModelScope",
            why=f"{type(error).__name__}: {error}",
            fix="check the name, the split and the network",
        ) from error
