"""`make test-fast` stays fast: whatever starts a training's process or a browser is marked slow, whoever writes it.

Read from the source, not from a run: a test is found through the helpers and fixtures of its file that it uses.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
STARTERS = {"ranks_of", "rank_environments", "on_ranks", "run_all", "run_ranks", "FakeSlurm", "sync_playwright"}
STARTERS |= {"run_command", "Command", "Process", "CONTEXT"}  # the server that they are forked from takes seconds
FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py") if path.name != "test_lanes.py")


def used(function: ast.FunctionDef) -> set[str]:
    """Every name that a function mentions: what it calls, hands on, and asks for as a fixture."""
    named = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    named |= {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    return named | {argument.arg for argument in function.args.args}


def is_slow(node: ast.FunctionDef | ast.Assign) -> bool:
    marks = node.decorator_list if isinstance(node, ast.FunctionDef) else [node.value]
    return any("pytest.mark.slow" in ast.unparse(mark) for mark in marks)


def unmarked(source: str) -> list[str]:
    """The tests of a file that start something heavy, by themselves or through a helper, and are not marked slow."""
    body = ast.parse(source).body
    if any(
        isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark" and is_slow(node) for node in body
    ):
        return []
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    heavy, before = set(STARTERS), 0
    while len(heavy) > before:
        before = len(heavy)
        heavy |= {name for name, function in functions.items() if used(function) & heavy}
    return [
        name for name, node in functions.items() if name in heavy and name.startswith("test_") and not is_slow(node)
    ]


@pytest.mark.parametrize("file", FILES)
def test_what_starts_processes_or_a_browser_is_marked_slow(file: str) -> None:
    assert not unmarked((TESTS / file).read_text(encoding="utf-8")), "add @pytest.mark.slow"


def test_a_test_is_found_through_its_helpers_and_fixtures() -> None:
    source = """
import pytest
def start(): return ranks_of([])
@pytest.fixture
def two(): return start()
def test_helper(): start()
def test_fixture(two): pass
@pytest.mark.slow
def test_marked(two): pass
def test_light(): pass
"""
    assert unmarked(source) == ["test_helper", "test_fixture"]
    assert unmarked(source + "pytestmark = [pytest.mark.slow]\n") == []
