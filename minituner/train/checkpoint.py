"""Checkpoints: complete, or not there.

    checkpoints/step-000100/
        model.safetensors       the trained weights, by parameter name
        optimizer.safetensors   AdamW's averages, and where every rank's random generators are
        state.json              step and counters
        manifest.json           size and sha256 of every file above, written last
    latest                      name of the newest complete checkpoint

Everything is written into a folder beside the final one, flushed to disk, renamed, and only then does `latest` move;
old ones are removed last. A kill at any moment leaves the previous checkpoint whole (a checkpoint that is saved again
under the same step waits as `.step-000100.old` and is put back). No pickle: safetensors and JSON.
Lesson: notebook 07.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minituner.errors import MinitunerError, UsageError

if TYPE_CHECKING:
    from minituner.train.ranks import Ranks

NAME = re.compile(r"step-\d{6,}")
MANIFEST = "manifest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, each read when it is asked for.

    Every rank resumes from the same files; reading them whole, eight ranks of a machine would hold eight copies.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file = safe_open(path, "pt")
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(slots=True)
class Checkpoint:
    """What a checkpoint holds."""

    path: Path
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    state: dict[str, Any]


def save(
    work_dir: Path,
    step: int,
    weights: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep_last: int = 2,
) -> Path:
    """Write the checkpoint of `step` and return its folder.

    Raises:
        MinitunerError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = work_dir / "checkpoints" / f"step-{step:06d}"
    aside = folder.with_name(f".{folder.name}.part")
    try:
        _put_back(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(_plain(weights), aside / "model.safetensors")
        save_file(_plain(optimizer), aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps({**state, "step": step}, indent=1), encoding="utf-8")
        manifest = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in (*aside.iterdir(), aside):
            _flush(file)
        if folder.exists():  # the same step saved again: move the old one out of the way first
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(aside, folder)
        _flush(folder.parent)
        _point(work_dir, folder.name)
        _rotate(folder.parent, folder.name, keep_last)
    except (OSError, SafetensorError) as error:  # safetensors writes in Rust, with an error type of its own
        shutil.rmtree(aside, ignore_errors=True)
        free = f"{shutil.disk_usage(work_dir).free / 1e9:.2f} GB are free there; " if work_dir.is_dir() else ""
        raise MinitunerError(
            f"cannot write the checkpoint {folder}: {getattr(error, 'strerror', None) or error}",
            why=f"{free}earlier checkpoints are whole",
            fix="make room or choose another --work-dir, then resume",
            next_command=resume_command(work_dir),
        ) from None
    return folder


def resume_command(work_dir: Path) -> str:
    """The command that goes on with the run in `work_dir`."""
    return shlex.join(
        ["minituner", "train", str(work_dir / "recipe.yaml"), "--work-dir", str(work_dir), "--resume", "auto"]
    )


def _put_back(place: Path) -> None:
    """Undo a save that was killed between moving the old checkpoint of its step away and putting the new one there."""
    for old in place.glob(".step-*.old"):
        folder = place / old.name.removeprefix(".").removesuffix(".old")
        if not folder.exists():
            os.replace(old, folder)


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in main memory, each alone in its storage, as safetensors wants them; copied where they aren't."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return {name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for name, t in plain.items()}


def random_states(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Where the random generators of every rank are: `random/RANK/torch`, `random/RANK/cuda`. All ranks call it."""
    here = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        here["cuda"] = torch.cuda.get_rng_state()
    return {
        f"random/{rank}/{kind}": state
        for kind, own in here.items()
        for rank, state in enumerate(ranks.gather_tensors(own))
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _point(work_dir: Path, name: str) -> None:
    """Move `latest`, atomically."""
    aside = work_dir / ".latest.part"
    aside.write_text(name + "\n", encoding="utf-8")
    _flush(aside)
    os.replace(aside, work_dir / "latest")
    _flush(work_dir)


def _rotate(folder: Path, newest: str, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints, and left-overs of interrupted saves."""
    names = [name for name in _names(folder) if _step(name) <= _step(newest)]
    for name in names[:-keep_last]:
        shutil.rmtree(folder / name)
    for rest in folder.glob(".step-*"):
        shutil.rmtree(rest, ignore_errors=True)


def _names(place: Path) -> list[str]:
    """The checkpoints' names, by step."""
    return sorted((p.name for p in place.glob("step-*") if NAME.fullmatch(p.name)), key=_step)


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file is as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if missing := set(FILES) - set(manifest):
            return f"manifest.json does not name {', '.join(sorted(missing))}"
        for name, facts in manifest.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["size"] or _sha256(file) != facts["sha256"]:
                return f"{name} is damaged (its sha256 differs from the manifest)"
    except FileNotFoundError:
        return "no manifest.json: the save did not finish"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None


def find(work_dir: Path, resume: str | Path, say: Callable[[str], None]) -> Path | None:
    """The folder to resume from: `auto` is the newest whole checkpoint (damaged ones are passed over aloud).

    `if-any` is the same, but None where no checkpoint was ever finished: for a job that is queued again by a machine.
    (Where there are some and all are damaged it is an error too: starting over silently would throw work away.)

    Newest is what `latest` names, then what is older; a higher step than `latest` is left from another run in the same
    folder, or its save was killed just before the end, and is taken last.

    Raises:
        UsageError: there is none, or the one asked for by path is not whole.
    """
    if str(resume) not in ("auto", "if-any"):
        folder = Path(resume)
        if not folder.is_dir():
            known = ", ".join(_names(work_dir / "checkpoints")) or "none"
            raise UsageError(
                f"--resume {resume}: there is no such folder",
                why=f"checkpoints under {work_dir / 'checkpoints'}: {known}",
                fix="--resume auto takes the newest whole one",
            )
        if not (folder / MANIFEST).exists() and (latest := _latest(folder)):
            folder = folder / "checkpoints" / latest
        if wrong := problem(folder):
            raise UsageError(f"cannot resume from {folder}: {wrong}", fix="--resume auto takes the newest whole one")
        return folder
    place = work_dir / "checkpoints"
    _put_back(place)
    names = _names(place)[::-1]
    if not names and str(resume) == "if-any":
        say(f"--resume if-any: no checkpoint under {place} yet; starting from the beginning")
        return None
    latest = _latest(work_dir)
    if latest in names:
        names = names[names.index(latest) :] + names[: names.index(latest)]
    for name in names:
        wrong = problem(place / name)
        if wrong is None:
            return place / name
        say(f"passing over checkpoint {name}: {wrong}")
    raise UsageError(
        f"--resume {resume}: no whole checkpoint under {place}",
        fix="leave --resume out to start from the beginning",
    )


def _latest(work_dir: Path) -> str | None:
    file = work_dir / "latest"
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else None


def state_of(folder: Path) -> dict[str, Any]:
    """The counters and the plan of a checkpoint, without its tensors."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint; `find` has already checked it against its manifest."""
    return Checkpoint(
        path=folder,
        weights=Tensors(folder / "model.safetensors"),
        optimizer=Tensors(folder / "optimizer.safetensors"),
        state=state_of(folder),
    )


def restore_random_states(optimizer: Mapping[str, torch.Tensor], rank: int = 0) -> None:
    """Set this rank's random generators back to where they were."""
    torch.set_rng_state(optimizer[f"random/{rank}/torch"])
    if f"random/{rank}/cuda" in optimizer and torch.cuda.is_available():
        torch.cuda.set_rng_state(optimizer[f"random/{rank}/cuda"])


def load_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy saved weights into the trainable parameters of the same names.

    Raises:
        UsageError: the names differ: the checkpoint belongs to another recipe.
    """
    from minituner.model.adapters import trainable_parameters

    parameters = trainable_parameters(model)
    if set(parameters) != set(weights) or any(parameters[n].shape != weights[n].shape for n in parameters):
        raise UsageError(
            "this checkpoint was made with other trainable parameters than the recipe has",
            why=f"{len(weights)} tensors saved, {len(parameters)} in the recipe's model; names or shapes differ",
            fix="resume with the recipe.yaml in the run's folder",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
