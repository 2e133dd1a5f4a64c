"""A folder that is there whole or not at all: filled aside, then renamed.

    with new_folder(out, force=False) as aside:        .merged.part-4711/     being filled
        ...                                            merged/                renamed at the end, the old one gone

Whatever goes wrong inside (an error, a full disk, Ctrl-C), `out` is as it was before. Lesson: notebook 09.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minituner.errors import MinitunerError, UsageError


def check_free(out: Path, force: bool) -> None:
    """Refuse a place that holds something.

    Raises:
        UsageError: `out` is a file, or a folder with something in it and no `force`.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", fix="give a folder that does not exist yet")
    if out.exists() and any(out.iterdir()) and not force:
        raise UsageError(f"{out} exists and is not empty", fix="choose another folder, or replace it with --force")


@contextmanager
def new_folder(out: Path, force: bool, *, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Within: an empty folder to fill; afterwards it is `out`.

    Args:
        force: replace what is there.
        inputs: folders that are read; `out` must not be, or hold, one of them.

    Raises:
        UsageError: as `check_free`, or `out` would replace what is read. MinitunerError: the disk is full or cannot
            be written.
    """
    from safetensors import SafetensorError

    check_free(out, force)
    for read in inputs:
        if read.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{out} holds {read}, which is read", fix="write into another folder")
    aside = out.absolute().with_name(f".{out.absolute().name}.part-{os.getpid()}")
    old = aside.with_name(f"{aside.name}-old")
    try:
        aside.mkdir(parents=True)
        yield aside
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(aside, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        near = next((place for place in aside.parents if place.is_dir()), Path("/"))
        raise MinitunerError(
            f"cannot write {out}: {reason}",
            why=f"{shutil.disk_usage(near).free / 1e9:.2f} GB are free there; nothing was replaced",
            fix="make room, or choose another folder",
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
