"""Install the course from this folder, without network: `python install.py`.

    SHA256SUMS checked -> FOLDER/.venv -> pip, told to use wheels/ and nothing else -> notebooks and data -> the model

    python install.py                       into ./minituner-course
    python install.py --into FOLDER         somewhere else
    python install.py --try                 and train two steps at the end

`minituner camp pack` wrote this folder and copied this file into it (minituner/camp/pack_install.py). It uses the
standard library alone, so that it runs before anything is installed. Exit status: 0 done, 1 failed, 2 cannot work here.
Lesson: notebooks/teaching.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn


def stop(status: int, what: str, *, why: str = "", fix: str = "") -> NoReturn:
    """Say what is wrong and how to go on, and leave."""
    lines = [what, *([f"  why:  {why}"] if why else []), *([f"  fix:  {fix}"] if fix else [])]
    print("\n".join(lines), file=sys.stderr)
    sys.exit(status)


def check_machine(facts: dict[str, Any]) -> None:
    """Leave with 2 where the wheels cannot fit: another Python, another system or processor."""
    here = {
        "python": "{}.{}".format(*sys.version_info[:2]),
        "system": platform.system(),
        "machine": platform.machine(),
    }
    if other := {key: (facts[key], value) for key, value in here.items() if facts[key] != value}:
        packed, found = next(iter(other.values()))
        key = next(iter(other))
        stop(
            2,
            f"this pack is for {key} {packed}, and here is {found}",
            why="wheels hold compiled code: each Python version, system and processor has its own",
            fix=f"run it with Python {packed}" if key == "python" else "make a pack on a machine of this kind",
        )


def check_files(pack: Path) -> int:
    """Compare every file with SHA256SUMS; leave with 1 and all names that differ. Returns how many are right."""
    wrong, count = [], 0
    for line in (pack / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        wanted, _, name = line.partition("  ")
        path, digest = pack / name, hashlib.sha256()
        if not path.is_file():
            wrong.append(f"{name}: missing")
            continue
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != wanted:
            wrong.append(f"{name}: changed")
        count += 1
    if wrong:
        shown = "\n        ".join(wrong[:10])
        stop(1, f"{len(wrong)} files are not as packed", why=shown, fix="copy the folder again; nothing was installed")
    return count


def run(arguments: list[str], environment: dict[str, str], cwd: Path | None = None) -> None:
    """Run a command and leave with 1 if it fails; its output goes to the terminal."""
    status = subprocess.run(arguments, env=environment, cwd=cwd, check=False).returncode
    if status:
        stop(1, f"this failed with status {status}: {' '.join(arguments)}")


def offline(pack: Path) -> dict[str, str]:
    """The environment of every command: pip has the wheels and nothing else, and hubs are not asked."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_") and key != "PYTHONPATH"}
    # PIP_CONFIG_FILE: a configuration of this machine must not bring an index back.
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (pack / "wheels").as_uri(), "PIP_CONFIG_FILE": os.devnull}
    return {**kept, **pip, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}


def copy_course(pack: Path, folder: Path) -> None:
    """Copy notebooks and data; a file that is there already and differs is kept: it may be somebody's work."""
    kept = 0
    for source in sorted(path for path in (pack / "course").rglob("*") if path.is_file()):
        target = folder / source.relative_to(pack / "course")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            kept += target.read_bytes() != source.read_bytes()
        else:
            shutil.copyfile(source, target)
    if kept:
        print(f"kept as they are, because they were there and differ: {kept} of the files in {folder}")


def main() -> None:
    """Check, install, and say how to begin."""
    parser = argparse.ArgumentParser(description="Install the minituner course from this folder, without network.")
    parser.add_argument("--into", type=Path, default=Path("minituner-course"), help="default: ./minituner-course")
    parser.add_argument("--try", dest="trial", action="store_true", help="train two steps at the end")
    options = parser.parse_args()
    pack, folder = Path(__file__).resolve().parent, options.into.absolute()
    facts = json.loads((pack / "pack.json").read_text(encoding="utf-8"))
    check_machine(facts)
    print(f"checking      {check_files(pack)} files are as packed", flush=True)
    environment, venv = offline(pack), folder / ".venv"
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"environment   {venv}", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(venv)], env=environment, check=False).returncode
    if made:
        fix = "install the system's package for it (on Debian and Ubuntu: python3-venv), or use another Python"
        stop(1, "this Python cannot make virtual environments", fix=fix)
    print(f"packages      {len(facts['packages'])} from wheels/, each with its checksum", flush=True)
    wanted = ["--require-hashes", "--only-binary", ":all:", "--requirement", str(pack / "requirements.txt")]
    run([str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", *wanted], environment)
    copy_course(pack, folder)
    for step in [*facts["steps"], *(facts["trial"] if options.trial else [])]:
        print(f"{step['say']}:", flush=True)
        run([str(python), *step["arguments"]], environment, folder)
    activate = venv / ("Scripts/activate" if os.name == "nt" else "bin/activate")
    print(
        f"\nReady. To begin:\n  {'' if os.name == 'nt' else '. '}'{activate}'\n  cd '{folder}'\n  jupyter lab notebooks"
    )


if __name__ == "__main__":
    main()
