"""The doctor's checks: one question about this machine each, and what to do where the answer is no.

    [ok]       packages          torch 2.13.0, transformers 5.23.0, ...
    [missing]  bitsandbytes      not installed
                 disables  method.name=qlora and int8_lora, 8-bit AdamW
                 mend      pip install 'minituner[quantization]'

Which versions are needed is read from the package's own metadata, so there is no second list to forget. Nothing is
asked of the network unless told to. Lesson: the first cell of every notebook shows the short form.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "missing", "too old", "slow", "low", "broken"]

# What each extra of pyproject.toml is for; `dev` is for developing minituner itself.
EXTRAS = {
    "notebooks": "the lessons, their figures and widgets",
    "deepspeed": "ZeRO (distributed.zero) and sequence parallel",
    "quantization": "method.name=qlora and int8_lora, 8-bit AdamW",
    "flash": "flash-attn's kernels (torch's own do the same)",
    "web": "the web page to chat in",
    "tracking": "log.to=tensorboard and wandb (metrics.jsonl is always written)",
}
ENOUGH_MEMORY, ENOUGH_DISK = 3e9, 3e9  # the quickstart: 135 million parameters in float32, twice, and its files
HUB_SECONDS = 2.0


@dataclass(frozen=True)
class Check:
    """One answer. `required`: training does not work without it."""

    name: str
    status: Status
    detail: str
    disables: str = ""
    mend: str = ""
    required: bool = False
    values: dict[str, Any] = field(default_factory=dict)

    def lines(self, width: int = 0) -> list[str]:
        """As text: one line, and two more where something is amiss."""
        first = f"{f'[{self.status}]':10} {self.name:{width}}  {self.detail}"
        more = (("disables", self.disables), ("mend", self.mend))
        return [first, *(f"             {key:9} {text}" for key, text in more if text and self.status != "ok")]

    def as_values(self) -> dict[str, Any]:
        """The same for programs."""
        return asdict(self)


def all_checks(*, network: bool = False) -> Iterator[Check]:
    """Every check, in the order they are shown."""
    yield python()
    yield from packages()
    yield gpu()
    yield rates()
    yield from extras()
    yield compiler()
    yield memory()
    yield disk()
    yield cache()
    if network:
        yield hub()


def python() -> Check:
    """The interpreter against `requires-python`."""
    from packaging.specifiers import SpecifierSet

    wanted, here = metadata("minituner")["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(here, prereleases=True):
        return Check("python", "ok", here, required=True)
    mend = "conda env create -f environment.yml"
    return Check("python", "too old", f"{here}, needed {wanted}", "everything", mend, required=True)


def requirements() -> dict[str, list[Any]]:
    """The package's requirements by extra ("" holds those always needed), as packaging.Requirement objects."""
    from packaging.requirements import Requirement

    groups: dict[str, list[Any]] = {"": []}
    names = ["", *(metadata("minituner").get_all("Provides-Extra") or [])]
    for one in map(Requirement, requires("minituner") or []):
        if one.name == "minituner":
            continue
        holding = [n for n in names if one.marker is None or one.marker.evaluate({"extra": n})]
        # Without a marker it is needed always, and not once more by every extra.
        for name in [""] if "" in holding else holding:
            groups.setdefault(name, []).append(one)
    groups.pop("dev", None)
    return groups


def state_of(requirement: Any) -> tuple[Status, str]:
    """Whether a requirement is met here: its status, and the version that is."""
    try:
        here = version(requirement.name)
    except PackageNotFoundError:
        return "missing", "not installed"
    if requirement.specifier.contains(here, prereleases=True):
        return "ok", here
    return "too old", f"{here}, needed {requirement.specifier}"


def packages() -> Iterator[Check]:
    """What training always needs: one line where all is well, one more for each package that is not."""
    good: dict[str, str] = {}
    for requirement in requirements()[""]:
        status, text = state_of(requirement)
        if status == "ok":
            good[requirement.name] = text
        else:
            mend = f"pip install --upgrade '{requirement}'"
            yield Check(requirement.name, status, text, "training", mend, required=True)
    yield Check("packages", "ok", ", ".join(map(" ".join, good.items())), required=True, values=good)


def extras() -> Iterator[Check]:
    """One check for each package of the optional extras."""
    for extra, members in requirements().items():
        for requirement in members if extra else ():
            yield _extra(extra, requirement)


def _extra(extra: str, requirement: Any) -> Check:
    status, text = state_of(requirement)
    disables = EXTRAS.get(extra, f"what the extra {extra!r} is for")
    mend = f"pip install 'minituner[{extra}]'" + " --no-build-isolation" * (extra == "flash")
    if extra == "flash" and status == "missing" and not _has_gpu():
        return Check(requirement.name, "ok", "not installed, and of no use without a CUDA GPU")
    if status == "ok" and requirement.name == "bitsandbytes":
        status, more = bitsandbytes_library()
        text, mend = f"{text}, {more}", "pip install --force-reinstall --no-deps bitsandbytes"
    elif status == "ok" and requirement.name == "deepspeed":
        text += " (not imported here: that takes seconds)"
        if find_spec("deepspeed") is None:
            status, text = "broken", f"{text}: installed, but its module cannot be found"
    return Check(requirement.name, status, text, disables, mend)


def bitsandbytes_library() -> tuple[Status, str]:
    """Whether bitsandbytes' compiled library loads; without it, importing the package works and using it fails."""
    try:
        from bitsandbytes import cextension
    except (ImportError, OSError, RuntimeError) as error:
        return "broken", f"but cannot be imported: {str(error).splitlines()[0]}"
    library = type(cextension.lib).__name__
    if library.startswith("ErrorHandler"):
        return "broken", "but its compiled library does not load"
    return "ok", f"its {'CUDA' if library.startswith('Cuda') else 'CPU'} library loads"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def gpu() -> Check:
    """The card, its memory and driver; and a card that torch cannot use."""
    import torch

    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        values = {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(total / 1e9, 1),
            "free_gb": round(free / 1e9, 1),
            "cuda": torch.version.cuda or torch.version.hip,
            "driver": driver,
        }
        text = (
            f"{values['count']} x {values['name']}, compute capability {values['capability']},"
            f" {values['free_gb']:.0f} of {values['memory_gb']:.0f} GB free, CUDA {values['cuda']},"
            f" driver {driver or '?'}"
        )
        return Check("GPU", "ok", text, values=values)
    if driver is None:
        return Check("GPU", "ok", "none; training runs on the CPU, with the same results", values={"driver": None})
    if torch.version.cuda is None:
        text, mend = (
            "there is one, but this torch is built for CPUs",
            "install torch's CUDA build: pytorch.org/get-started",
        )
    else:
        text = f"there is one, but torch (CUDA {torch.version.cuda}) cannot use it with driver {driver}"
        mend = "update the driver, or install the torch built for its CUDA version: pytorch.org/get-started"
    return Check("GPU", "broken", text, "the GPU: training would run on the CPU", mend, values={"driver": driver})


def rates() -> Check:
    """Matrix products a second in float32 and bfloat16, measured: a CPU's feature flags do not tell which is fast."""
    import torch

    from minituner.plan.flops import gemm_rate

    device = "cuda" if _has_gpu() else "cpu"
    wide, half = gemm_rate(torch.float32, device), gemm_rate(torch.bfloat16, device)
    text = f"float32 {wide / 1e9:,.0f} GFLOP/s, bfloat16 {half / 1e9:,.0f}, on the {'GPU' if _has_gpu() else 'CPU'}"
    values = {"float32_flops": wide, "bfloat16_flops": half, "device": device}
    if half >= wide:
        return Check("rates", "ok", text, values=values)
    disables = "bfloat16 here: it saves memory and costs time"
    return Check("rates", "slow", text, disables, "keep model.dtype=auto, which takes float32 here", values=values)


def compiler() -> Check:
    """A C++ compiler, which torch.compile writes code for."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
    found = next((name for name in names if shutil.which(name)), None)
    if found:
        return Check("compiler", "ok", _first_line(found, "--version") or found)
    mend = {"Darwin": "xcode-select --install", "Windows": "install the Visual Studio Build Tools (C++)"}
    return Check(
        "compiler",
        "missing",
        f"no C++ compiler ({', '.join(names)})",
        "torch.compile",
        mend.get(platform.system(), "conda install -c conda-forge cxx-compiler, or sudo apt-get install g++"),
    )


def memory() -> Check:
    """Main memory, free and in all."""
    import psutil

    here = psutil.virtual_memory()
    text = f"{here.available / 1e9:.1f} of {here.total / 1e9:.1f} GB free"
    values = {"total": here.total, "available": here.available}
    if here.available >= ENOUGH_MEMORY:
        return Check("memory", "ok", text, values=values)
    return Check("memory", "low", text, "the quickstart may not fit", "close other programs", values=values)


def disk() -> Check:
    """Room on the disk of the cache."""
    from minituner.home import home

    free = shutil.disk_usage(_existing(home())).free
    text, values = f"{free / 1e9:.1f} GB free for the cache", {"free": free}
    if free >= ENOUGH_DISK:
        return Check("disk", "ok", text, values=values)
    mend = "make room, or MINITUNER_HOME=/another/disk"
    return Check("disk", "low", text, "the model and checkpoints may not fit", mend, values=values)


def cache() -> Check:
    """Where models and prepared data are kept, and how large that has become."""
    from minituner.home import home

    place = home()
    size = sum(f.lstat().st_size for f in place.rglob("*") if not f.is_dir()) if place.is_dir() else 0
    text = f"{place}, {size / 1e6:,.0f} MB" if place.is_dir() else f"{place}, not made yet"
    values = {"folder": str(place), "bytes": size}
    if os.access(_existing(place), os.W_OK):
        return Check("cache", "ok", text, values=values)
    mend = "MINITUNER_HOME=/a/folder/of/yours"
    return Check("cache", "broken", f"{text}, cannot be written", "everything", mend, required=True, values=values)


def hub() -> Check:
    """Whether the model hub answers, within two seconds; the address is huggingface_hub's (HF_ENDPOINT)."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    disables = "fetching models and data sets by name; the embedded model and local folders work"
    if constants.HF_HUB_OFFLINE:
        return Check("hub", "missing", "HF_HUB_OFFLINE is set", disables, "unset HF_HUB_OFFLINE")
    answers: list[str] = []

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).status_code
            answers.append(f"answered {status}" if status >= 500 else "")
        except Exception as error:  # whatever the HTTP library raises (it depends on huggingface_hub) is the answer
            answers.append(f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}")

    # Looking a name up has no time limit of its own, hence the thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    problem = answers[0] if answers else f"no answer within {HUB_SECONDS:.0f} seconds"
    if not problem:
        return Check("hub", "ok", f"{constants.ENDPOINT} answers")
    mend = "HF_ENDPOINT=https://a-mirror, a proxy (HTTPS_PROXY), or model.name_or_path=/a/local/folder"
    return Check("hub", "missing", f"{constants.ENDPOINT}: {problem}", disables, mend)


def _existing(place: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    while not place.exists():
        place = place.parent
    return place


def _first_line(*command: str) -> str | None:
    """The first line a program prints; None if it is not there, fails, or says nothing in five seconds."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
