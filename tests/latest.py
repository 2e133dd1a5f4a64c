"""What would break with the newest releases of everything (`make test-latest`); constraints.txt stays as it is.

    .venv-latest/bin/python -m tests.latest [pytest's arguments]

    newer than the lock      transformers 5.23.0 -> 5.24.1, ...
    broke                    tests/model/test_loading.py::test_...     ImportError: ...

Run by the interpreter of an environment that was installed without constraints.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]


def locked(text: str) -> dict[str, str]:
    """Name and version of each pin."""
    lines = (line.split("#")[0].split(";")[0].strip() for line in text.splitlines())
    return {
        name.lower().replace("_", "-"): version for name, _, version in (x.partition("==") for x in lines) if version
    }


def public(version: str) -> str:
    """2.13.0 of 2.13.0+cpu: a build for another device is no other version."""
    return version.partition("+")[0]


def changed(pins: dict[str, str]) -> list[str]:
    """The packages of this environment whose version is not the lock's."""
    here = {(d.metadata["Name"] or "").lower().replace("_", "-"): public(d.version) for d in distributions()}
    return [f"{name} {pins[name]} -> {here[name]}" for name in sorted(pins) if here.get(name, pins[name]) != pins[name]]


def broken(report: Path) -> list[str]:
    """The failed tests of a JUnit report, each with the first line of its error."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):  # pytest wrote it a moment ago
        for problem in [*case.findall("failure"), *case.findall("error")]:
            first = (problem.get("message") or "").strip().splitlines()[:1]
            found.append(f"{case.get('classname')}::{case.get('name')}  {' '.join(first)[:160]}")
    return found


def main(arguments: list[str]) -> int:
    """Run the tests and print what broke; pytest's exit status."""
    news = changed(locked((ROOT / "constraints.txt").read_text(encoding="utf-8")))
    print("not the lock's version:", *(news or ["nothing"]), sep="\n  ", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", *arguments]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        failed = broken(report) if report.is_file() else ["pytest wrote no report: see above"]
    print("broke:", *(failed or ["nothing"]), sep="\n  ")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
