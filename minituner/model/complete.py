"""A model folder is complete or it is not there: made aside, marked last, renamed in one step.

A half-written folder is worse than none: it loads, or fails far from its cause. So a folder that minituner makes counts
only with `minituner_source.json`, which is written last and knows the size of every file:

    models/.name.lock               one process makes it, the others wait; freed when its holder dies
           .name.partial-4711/      being made; left by a kill, removed by whoever holds the lock next
           name/                    renamed from it; checked by sizes (milliseconds) each time it is asked for

Lesson: notebook 00 (the first fetch).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minituner.errors import SourceError

Say = Callable[[str], object]
MARKER = "minituner_source.json"


def make_once(
    folder: Path, make: Callable[[Path, Say], Mapping[str, Any]], *, facts: Mapping[str, Any], needed: int, say: Say
) -> Path:
    """Return `folder`, filled by `make(empty_folder, say)` unless it is complete with these `facts`.

    `facts` are written into its marker; a folder made with others (an older conversion) is made again.

    Raises: SourceError if fewer than `needed` bytes are free or the disk cannot be written; whatever `make` raises.
    """
    if fault(folder, facts) is None:
        return folder
    with locked(folder, say):
        if (reason := fault(folder, facts)) is None:  # another process was faster
            return folder
        partial = f".{folder.name}.partial-"
        for leftover in folder.parent.glob(f"{partial}*"):
            shutil.rmtree(leftover)
        if folder.exists():
            say(f"{folder.name} cannot be used ({reason}): making it again")
        if (free := shutil.disk_usage(folder.parent).free) < needed:
            raise SourceError(
                f"not enough disk space for {folder.name}: {megabytes(needed)} needed, {megabytes(free)} free",
                why=f"in {folder.parent}",
                fix="free some space, or set MINITUNER_HOME to a folder on a larger disk",
            )
        work, old = folder.with_name(f"{partial}{os.getpid()}"), folder.with_name(f"{partial}old")
        try:
            work.mkdir()
            make(work, say)
            write_marker(work, facts, hashes=True)
            if folder.exists():
                folder.rename(old)
            work.rename(folder)
        except OSError as error:
            raise SourceError(
                f"could not write {folder.name} to {folder.parent}",
                why=str(error),
                fix="see that the disk is writable and has room, or set MINITUNER_HOME to another folder",
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)  # after success there is nothing left under this name
            shutil.rmtree(old, ignore_errors=True)
    say(f"ready       {folder}")
    return folder


def fault(folder: Path, facts: Mapping[str, Any] | None = None) -> str | None:
    """Why a folder that minituner made cannot be used, or None if it is complete. Reads sizes, not contents."""
    if not (folder / MARKER).is_file():
        return f"it has no {MARKER}, so it was never finished"
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = {name: known["bytes"] for name, known in found["files"].items()}
        if other := [key for key, value in (facts or {}).items() if found.get(key) != value]:
            return f"it was made with another {other[0]}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MARKER} is damaged: {one_line(str(error))}"
    wrong = [name for name, size in sizes.items() if file_size(folder / name) != size]
    return f"{', '.join(wrong)} missing or of another size" if wrong else None


def file_size(path: Path) -> int | None:
    """The size of a file in bytes, or None if there is no such file."""
    return path.stat().st_size if path.is_file() else None


@contextmanager
def locked(folder: Path, say: Say) -> Iterator[None]:
    """Hold the lock of `folder` among processes, saying so if that means waiting; freed when its holder dies.

    Raises: SourceError if the lock file cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting     another process is making {folder.name}")
            lock.acquire()
    except OSError as error:
        raise SourceError(
            f"cannot write to {folder.parent}",
            why=str(error),
            fix="set MINITUNER_HOME to a folder that you can write to",
        ) from error
    try:
        yield
    finally:
        lock.release()


def write_marker(folder: Path, facts: Mapping[str, Any], *, hashes: bool) -> None:
    """Write `minituner_source.json`, last of all: the facts and every file's size (and sha256), safely on disk."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        files[path.name] = {"bytes": path.stat().st_size}
        with path.open("rb+") as file:
            if hashes:
                files[path.name]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    aside = folder / f".{MARKER}"
    with aside.open("w", encoding="utf-8") as file:
        json.dump({**facts, "files": files}, file, indent=2, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(folder / MARKER)


def missing_shards(folder: Path) -> list[str]:
    """The weight files that a sharded model's index names and the folder lacks.

    Raises: SourceError if the index cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{index} cannot be read", why=one_line(str(error)), fix="copy or download the folder again"
        ) from error
    return sorted(shard for shard in shards if not (folder / shard).is_file())


def megabytes(count: int) -> str:
    """A size for people, in decimal megabytes or gigabytes: `98 MB`, `1.2 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def one_line(text: str, limit: int = 200) -> str:
    """The text without line breaks, cut to `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
