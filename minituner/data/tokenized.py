"""InternEvo's tokenised data: `.bin` files of token ids, memory-mapped, and written so that no label is lost.

Why: InternEvo and XTuner train from folders that were tokenised once, on another machine, and may be larger than
memory. A data file is JSON lines; beside it a table says where each line starts and how many tokens it holds:

    chat.bin        {"tokens": [-1, -4093, 19556, 2]}\\n      one line, one sample
                    {"tokens": [-1, 17, 0, 2], "zero_trained": [2]}\\n
    chat.bin.meta   np.save of int64 (n, 2):  [[0, 4], [34, 4]]      byte offset, number of tokens

The sign is the mask: a positive id is trained, a negative id is the same token (absolute value) with label -100. Zero
has no sign, so in the classic format token 0 can never be trained (in GPT-2's and Qwen's vocabularies that is "!").
`write_tokenized` therefore lists the trained zeros of a line under `zero_trained`. XTuner's reader takes only `tokens`
from a line, so files written here stay readable there (it masks those zeros, as it always does).

Opening a folder reads the tables and the last line of each file; samples are read on demand from memory-mapped files.
Packing them to `packed_length` is in `tokenized_packs.py`. Lesson: notebook 04.
"""

from __future__ import annotations

import json
import mmap
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minituner.errors import DataError, UsageError

IntArray = npt.NDArray[np.int64]

IGNORE_INDEX = -100
MAX_TOKEN_ID = 2**31 - 1
OPEN_MAPS = 64  # every map keeps a file descriptor, and the usual limit is 1024 a process
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip")
COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
UNPACK = "unpack it first (gunzip, unzstd ...): samples are read by byte offset, which compression hides"
REWRITE = "tokenise the data again, or copy the .bin and the .bin.meta again, both from the same place"
AGAIN = "minituner tokenize RECIPE --out FOLDER"


@dataclass(frozen=True, slots=True)
class _File:
    """One data file: where its kept samples start, and how many tokens each has."""

    path: Path
    offsets: IntArray  # (n,) bytes
    lengths: IntArray  # (n,) tokens


class TokenizedData:
    """The samples of all files as one lazy sequence; `[i]` gives `{"input_ids": (n,), "labels": (n,)}`, int64.

    `files` are the data files in order (those with no sample left are not in it), `lengths` the tokens of each sample,
    `starts` (F + 1,) the index of each file's first sample. `dropped_samples` and `dropped_tokens` count what
    `min_length` left out. May be pickled and sent to worker processes: each opens its own maps.
    """

    def __init__(self, files: Sequence[_File], dropped_samples: int = 0, dropped_tokens: int = 0) -> None:
        self._files = list(files)
        self._maps: dict[int, mmap.mmap] = {}
        self.files: list[Path] = [file.path for file in self._files]
        self.lengths: IntArray = np.concatenate([np.empty(0, np.int64), *(file.lengths for file in self._files)])
        self.starts: IntArray = np.cumsum([0, *(len(file.lengths) for file in self._files)], dtype=np.int64)
        self.dropped_samples, self.dropped_tokens = dropped_samples, dropped_tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, IntArray]:
        """Sample `index`; a negative one counts from the end. Raises: IndexError; DataError for a broken line."""
        number = operator.index(index)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        file_number = int(np.searchsorted(self.starts, number, side="right")) - 1
        file, row = self._files[file_number], number - int(self.starts[file_number])
        return _read_sample(self._map(file_number), int(file.offsets[row]), int(file.lengths[row]), file.path)

    def _map(self, file_number: int) -> mmap.mmap:
        """The memory map of a file; the one opened longest ago is let go when too many are open."""
        if file_number not in self._maps:
            while len(self._maps) >= OPEN_MAPS:
                del self._maps[next(iter(self._maps))]
            with open(self.files[file_number], "rb") as handle:
                self._maps[file_number] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file_number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a map cannot travel to another process


def load_tokenized(
    folder: str | os.PathLike[str],
    min_length: int = 0,
    data_order: str | os.PathLike[str] | Sequence[str] | None = None,
) -> TokenizedData:
    """Open every `.bin` file below a folder (or one `.bin` file) as one lazy sequence of samples.

    Args:
        min_length: in tokens; shorter samples are left out and counted.
        data_order: which files, in which order: a file made by `write_data_order`, or a list of paths relative to the
            folder. By default all of them, sorted.

    Raises:
        DataError: a file is missing, compressed, truncated, or does not fit its `.meta`.
        UsageError: min_length is negative.
    """
    if min_length < 0:
        raise UsageError(f"min_length: {min_length} is negative", fix="give a number of tokens, 0 keeps every sample")
    root = Path(folder)
    if root.is_file() and data_order is None:
        root, names = root.parent, [root.name]
    elif data_order is None:
        names = _walk(root)
    elif isinstance(data_order, (str, os.PathLike)):
        names = read_data_order(data_order)
    else:
        names = _checked_order(list(data_order), "data_order")
    files, dropped_samples, dropped_tokens = [], 0, 0
    for name in names:
        offsets, lengths = _read_meta(root / name)
        if min_length > 0:
            keep = lengths >= min_length
            dropped_samples += int(np.count_nonzero(~keep))
            dropped_tokens += int(lengths[~keep].sum())
            offsets, lengths = offsets[keep], lengths[keep]
        if len(offsets):
            files.append(_File(root / name, offsets, lengths))
    return TokenizedData(files, dropped_samples, dropped_tokens)


def write_tokenized(path: str | os.PathLike[str], samples: Iterable[Mapping[str, Any]]) -> Path:
    """Write samples of input_ids and labels, each (n,), as `.bin` and `.bin.meta`; returns the path of the `.bin`.

    `path` is a file ending in `.bin`, or a folder that gets `tokens.bin`. Both files are written aside, flushed to the
    disk and renamed, so an interrupted run leaves no half file behind.

    Raises:
        DataError: a sample cannot be written: unequal lengths, ids that are not token ids, or a label that is neither
            -100 nor the token itself (a sign cannot say anything else).
    """
    target = Path(path)
    if target.suffix != ".bin":
        target = target / "tokens.bin"
    target.parent.mkdir(parents=True, exist_ok=True)
    meta_target = _meta_path(target)
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    meta_aside = meta_target.with_name(f".{meta_target.name}.{os.getpid()}.partial")
    rows: list[tuple[int, int]] = []
    offset = 0
    try:
        with open(aside, "wb") as handle:
            for number, sample in enumerate(samples):
                line, length = _line(sample, number)
                handle.write(line)
                rows.append((offset, length))
                offset += len(line)
            handle.flush()
            os.fsync(handle.fileno())
        with open(meta_aside, "wb") as handle:
            np.save(handle, np.array(rows, dtype=np.int64).reshape(-1, 2), allow_pickle=False)
            handle.flush()
            os.fsync(handle.fileno())
        # The old table goes first: whatever interrupts us, a table never lies beside data it does not describe.
        meta_target.unlink(missing_ok=True)
        os.replace(aside, target)
        os.replace(meta_aside, meta_target)
    finally:
        aside.unlink(missing_ok=True)
        meta_aside.unlink(missing_ok=True)
    return target


def data_order(folder: str | os.PathLike[str]) -> list[str]:
    """The `.bin` files below a folder as relative paths: folders sorted, files of a folder before its subfolders.

    XTuner means the same, but sorts its folder list after it has walked it, so its order is the file system's.

    Raises:
        DataError: the folder is missing, has no `.bin` file, or has one only compressed.
    """
    return _walk(Path(folder))


def write_data_order(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write `data_order(folder)`, one path a line, to the file `out` (or to `data_order.txt` in the folder `out`)."""
    target = Path(out)
    if target.is_dir():
        target = target / "data_order.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{name}\n" for name in data_order(folder))
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    aside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(aside, target)
    return target


def read_data_order(path: str | os.PathLike[str]) -> list[str]:
    """The relative paths that a data-order file lists, in its order; empty lines do not count.

    Raises:
        DataError: no such file, not UTF-8, an absolute path, a path that leaves the folder, or a path listed twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fix = "minituner data-order FOLDER writes one: a relative path a line"
        raise DataError(f"{path}: cannot be read as a data order", why=str(error), fix=fix) from None
    return _checked_order([line.strip() for line in lines if line.strip()], str(path))


def _checked_order(names: list[str], where: str) -> list[str]:
    seen: set[str] = set()
    for number, name in enumerate(names, start=1):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{where}: entry {number}: {name!r} leaves the data folder", fix="give relative paths")
        if name in seen:
            why = "its samples would silently count twice"
            raise DataError(f"{where}: entry {number}: {name!r} is listed twice", why=why, fix="list each file once")
        seen.add(name)
    return names


def _walk(root: Path) -> list[str]:
    """Relative paths of the `.bin` files below `root`, in sorted order, links followed."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder", fix="give the folder that holds the .bin files", next_command=AGAIN)
    names: list[str] = []
    compressed: list[str] = []
    reached: set[str] = set()

    def refuse(error: OSError) -> None:  # os.walk would pass over an unreadable folder without a word
        raise DataError(f"{error.filename}: cannot be read", why=str(error), fix="give yourself the right to read it")

    for place, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        folders.sort()  # in place, before os.walk descends
        if (real := os.path.realpath(place)) in reached:
            why = "a symbolic link leads to a folder that is read already; its samples would count twice"
            raise DataError(f"{place}: this folder is reached twice", why=why, fix="remove the link")
        reached.add(real)
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            name = (Path(place) / file).relative_to(root).as_posix()
            if suffix == ".bin":
                names.append(name)
            elif suffix in COMPRESSED_SUFFIXES and stem.endswith(".bin") and stem not in files:
                compressed.append(name)
    if compressed:
        raise DataError(f"{root / compressed[0]}: compressed data cannot be memory-mapped", fix=UNPACK)
    if not names:
        raise DataError(f"{root}: no .bin file in this folder or below", next_command=AGAIN)
    return names


def _meta_path(path: Path) -> Path:
    return path.with_name(path.name + ".meta")


def _read_meta(path: Path) -> tuple[IntArray, IntArray]:
    """Offsets (n,) and lengths (n,) of a data file, checked against the file's size, its first and its last bytes."""
    meta_path = _meta_path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such data file", fix="correct the path, or the data order that names it")
    with open(path, "rb") as handle:
        if handle.read(8).startswith(COMPRESSED_STARTS):
            raise DataError(f"{path}: compressed data cannot be memory-mapped", fix=UNPACK)
    if not meta_path.is_file():
        why = "without it nobody knows where the samples start; perhaps the tokenising was interrupted"
        raise DataError(f"{meta_path}: missing", why=why, fix=REWRITE, next_command=AGAIN)
    try:
        with open(meta_path, "rb") as handle:
            meta = np.lib.format.read_array(handle, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError, OverflowError) as error:
        why = f"it is not an np.save array of integers ({type(error).__name__}: {error})"
        raise DataError(f"{meta_path}: cannot be read", why=why, fix=REWRITE, next_command=AGAIN) from None
    size = path.stat().st_size
    if meta.size == 0 and size == 0:  # np.save([]) gives float64 (0,), and that is what XTuner's tool writes
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if meta.dtype.kind not in "iu" or meta.ndim != 2 or meta.shape[1] < 2:
        why = f"it holds {meta.dtype} of shape {meta.shape}, not int64 (n, 2): byte offset, number of tokens"
        raise DataError(f"{meta_path}: not a table of samples", why=why, fix=REWRITE, next_command=AGAIN)
    # InternEvo's own readers take the first and the last column, whatever lies between.
    offsets, lengths = meta[:, 0].astype(np.int64), meta[:, -1].astype(np.int64)
    why = ""
    if len(offsets) and (offsets.min() < 0 or offsets.max() >= size):
        wrong = int(np.flatnonzero((offsets < 0) | (offsets >= size))[0])
        why = f"sample {wrong} starts at byte {offsets[wrong]}, but the file has {size}: one of the two is truncated"
    elif len(lengths) and (lengths.min() < 0 or lengths.max() > size):
        wrong = int(np.flatnonzero((lengths < 0) | (lengths > size))[0])
        why = f"sample {wrong} is said to have {lengths[wrong]} tokens, but the file has {size} bytes"
    elif (end := _last_line_end(path, int(offsets.max()) if len(offsets) else 0)) != size or not len(offsets):
        why = f"the table ends with the line that ends at byte {end if len(offsets) else 0}, the file at byte {size}"
    if why:
        raise DataError(f"{path}: does not fit {meta_path.name}", why=why, fix=REWRITE, next_command=AGAIN)
    return offsets, lengths


def _last_line_end(path: Path, offset: int) -> int:
    """The byte after the line that starts at `offset`; a file cut inside that line is refused."""
    with open(path, "rb") as handle:
        handle.seek(offset)
        line = handle.readline()
    if not line.rstrip().endswith(b"}"):
        raise DataError(f"{path}: truncated", why=f"the last line, at byte {offset}, has no end", fix=REWRITE)
    return offset + len(line)


def _read_sample(data: mmap.mmap, offset: int, length: int, path: Path) -> dict[str, IntArray]:
    """The sample whose line starts at byte `offset`."""
    end = data.find(b"\n", offset)
    why = ""
    try:
        record = json.loads(data[offset : end if end >= 0 else len(data)])
        tokens = record["tokens"]
        zeros = record.get("zero_trained", [])
        if not isinstance(tokens, list) or not isinstance(zeros, list) or not set(map(type, tokens + zeros)) <= {int}:
            why = "tokens and zero_trained must be lists of integers"
        elif len(tokens) != length:
            why = f"it has {len(tokens)} tokens, the .meta says {length}"
        elif tokens and max(map(abs, tokens)) > MAX_TOKEN_ID:
            why = f"no token id is larger than {MAX_TOKEN_ID}"
        elif any(not 0 <= position < length or tokens[position] != 0 for position in zeros):
            why = "zero_trained names a position that does not hold token 0"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = f"no JSON object with tokens starts there ({type(error).__name__}: {error})"
    if why:
        raise DataError(f"{path}: byte {offset}: not a sample", why=why, fix=REWRITE, next_command=AGAIN)
    signed = np.array(tokens, dtype=np.int64)
    labels = np.where(signed > 0, signed, IGNORE_INDEX)
    labels[zeros] = 0
    return {"input_ids": np.abs(signed), "labels": labels}


def _line(sample: Mapping[str, Any], number: int) -> tuple[bytes, int]:
    """One sample as its JSON line, and its number of tokens."""
    if missing := [name for name in ("input_ids", "labels") if name not in sample]:
        raise DataError(f"sample {number}: {missing[0]}: missing", fix="a sample needs input_ids and labels")
    input_ids, labels = (np.asarray(sample[name]) for name in ("input_ids", "labels"))
    if input_ids.ndim != 1 or input_ids.shape != labels.shape:
        raise DataError(
            f"sample {number}: input_ids {input_ids.shape} and labels {labels.shape} are not two lists of one length"
        )
    if len(input_ids) and not (input_ids.dtype.kind in "iu" and labels.dtype.kind in "iu"):
        raise DataError(f"sample {number}: input_ids or labels: not integers ({input_ids.dtype}, {labels.dtype})")
    input_ids, labels = input_ids.astype(np.int64), labels.astype(np.int64)
    trained = labels != IGNORE_INDEX
    if len(wrong := np.flatnonzero((input_ids < 0) | (input_ids > MAX_TOKEN_ID) | (trained & (labels != input_ids)))):
        place, why = int(wrong[0]), "an id is 0 or more, and a label is -100 or the token itself"
        what = f"sample {number}: position {place}: token {input_ids[place]} with label {labels[place]}"
        raise DataError(what, why=why, fix="give labels that are not shifted")
    record: dict[str, list[int]] = {"tokens": np.where(trained, input_ids, -input_ids).tolist()}
    if len(zeros := np.flatnonzero(trained & (input_ids == 0))):
        record["zero_trained"] = zeros.tolist()
    return json.dumps(record).encode() + b"\n", len(input_ids)
