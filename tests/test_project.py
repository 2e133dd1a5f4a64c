"""The files around the package: three lists of packages in step, no file too long, the README's tree complete."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TREE = "## Where things are"
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(.*)")


def name_of(requirement: str) -> str:
    """A requirement's package, spelled as the index compares it."""
    found = REQUIREMENT.match(requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found.group(1)).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {name_of(line): line.split("==")[1].strip() for line in lines if "==" in line and not line.startswith("#")}


def wanted() -> dict[str, str]:
    """Package -> its range, over all dependencies and extras of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return {name_of(r): REQUIREMENT.match(r).group(2) for group in groups for r in group if name_of(r) != "minituner"}


def conda_lines() -> dict[str, tuple[str, str, bool]]:
    """Package -> (version part, remark, active) of the pip section of environment.yml, extras in comments included."""
    lines = {}
    for line in (ROOT / "environment.yml").read_text().split("- pip:")[1].splitlines():
        if found := re.match(r"\s+(# )?- ([A-Za-z0-9._-]+)([<>=~][^ ]*)\s*(?:# (.*))?$", line):
            lines[name_of(found.group(2))] = (found.group(3), found.group(4) or "", not found.group(1))
    return lines


def test_environment_yml_has_every_dependency_and_extra_with_the_pin_and_a_remark() -> None:
    lines, locked = conda_lines(), pins()
    assert set(lines) == set(wanted()), "the same packages as pyproject.toml"
    for package, (version, remark, _) in lines.items():
        expected = f"=={locked[package]}" if package in locked else wanted()[package]
        assert version == expected, package
        assert len(remark) > 5, f"{package} needs a remark"


def test_environment_yml_is_valid_and_installs_what_the_package_needs() -> None:
    loaded = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert "python=3.11" in loaded["dependencies"]
    active = {name_of(item) for item in loaded["dependencies"][-1]["pip"] if not item.startswith("--")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {name_of(r) for r in project["dependencies"]} <= active
    assert "--editable ." in loaded["dependencies"][-1]["pip"]


def test_every_dependency_is_pinned_inside_its_range() -> None:
    from packaging.specifiers import SpecifierSet

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = pins()
    for package in map(name_of, [*project["dependencies"], *project["optional-dependencies"]["notebooks"]]):
        assert package in locked
    for package, allowed in wanted().items():
        if package in locked:
            assert SpecifierSet(allowed).contains(locked[package]), package


def closure(lines: list[str], extras: Iterable[str] = (), found: set[tuple[str, frozenset[str]]] | None = None) -> set:
    """(package, its extras) of all that these requirements ask for in this environment, and of what those ask for."""
    from packaging.requirements import Requirement

    found = set() if found is None else found
    for requirement in map(Requirement, lines):
        wanted_here = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": e}) for e in ("", *extras)
        )
        key = (name_of(requirement.name), frozenset(requirement.extras))
        if not wanted_here or key in found or key[0] == "minituner":
            continue
        found.add(key)
        with suppress(PackageNotFoundError):  # an optional part that this environment was made without
            closure(requires(key[0]) or [], requirement.extras, found)
    return found


def test_the_lock_is_closed_over_what_packages_ask_for() -> None:
    """Else a pack for a room without network holds a version that nobody tested (`pip freeze` hides setuptools)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("notebooks", "web", "quantization", "deepspeed", "dev")
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    found = {package for package, _ in closure(lines)}
    assert len(found) > 100
    assert not sorted(found - set(pins()))


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_of_the_package_is_longer_than_400_lines() -> None:
    files = tracked("minituner/*.py", "data_scripts/*.py")
    assert len(files) > 30
    long = {str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text("utf-8").splitlines())) > 400}
    assert not long


def test_every_module_says_what_it_is() -> None:
    import ast

    for file in tracked("minituner/*.py"):
        assert ast.get_docstring(ast.parse(file.read_text("utf-8"))), file


@pytest.mark.skipif(
    "@@TREE@@" in (ROOT / "README.md").read_text("utf-8") or TREE not in (ROOT / "README.md").read_text("utf-8"),
    reason="the README has no tree yet",
)
def test_the_readme_s_tree_names_every_file_of_the_package() -> None:
    tree = (ROOT / "README.md").read_text("utf-8").split(TREE)[1].split("\n## ")[0]
    words = set(re.findall(r"[\w.-]+", tree))
    files = [f for f in tracked("minituner/*") if f.suffix in {".py", ".yaml"} and f.name != "__init__.py"]
    assert not sorted(str(f.relative_to(ROOT)) for f in files if f.name not in words)
