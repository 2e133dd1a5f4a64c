"""A config is read as text: constants are folded, the rest is named, and nothing of it ever runs."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minituner.errors import UsageError
from minituner.migrate.folding import MAX_BYTES, Call, Ref, Unread, read_config


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "config.py"
    path.write_text(text, encoding="utf-8")
    return read_config(path).values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x = 2e-4 / 2", 1e-4),
        ("x = 1024 * 2 + 1", 2049),
        ("x = -3", -3),
        ("a = 'd'\nx = f'{a}/train-{1 + 1}.json'", "d/train-2.json"),
        ("import os.path as osp\nx = osp.join('a', 'b')", "a/b"),
        ("import os.path\nx = os.path.join('a', 'b')", "a/b"),
        ("a, b = 1, [2, 3]\nx = b + [a]", [2, 3, 1]),
        ("x = 4\nx *= 3", 12),
        ("x = 1 if 2 > 1 and not False else 9", 1),
        ("d = dict(a=dict(b=[1, 5]))\nx = d['a']['b'][-1]", 5),
        ("d = {'a': 1}\nd['a'] = '你好'\nx = d['a']", "你好"),
        ("x: float = float('0.5')", 0.5),
        ("y = [1]\nx = [*y, 2]", [1, 2]),
    ],
)
def test_what_is_constant_is_folded(tmp_path: Path, text: str, value: Any) -> None:
    assert read(tmp_path, text)["x"] == value


def test_names_of_imports_keep_their_whole_path(tmp_path: Path) -> None:
    values = read(tmp_path, "from a.b import C\nimport torch as t\nx = C.key\ny = t.float16\nz = dict(type=C, n=1)")
    assert values["x"] == Ref("a.b.C.key")
    assert values["y"] == Ref("torch.float16")
    assert isinstance(values["z"], Call)
    assert values["z"].get("type") == Ref("a.b.C")


LEAVES = st.integers(-(10**6), 10**6) | st.text(max_size=8) | st.booleans() | st.none()
LITERALS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(LITERALS)
def test_any_literal_is_read_as_python_would(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("literal")
    assert read(folder, f"x = {value!r}") == {"x": ast.literal_eval(repr(value))}


HOSTILE = {
    "call": "import os\nx = os.system('touch {mark}')",
    "import": "import {module}",
    "lambda": "x = (lambda: open('{mark}', 'w'))()",
    "comprehension": "x = [open('{mark}', 'w') for _ in range(3)]",
    "function": "def f():\n    open('{mark}', 'w')\nf()",
    "eval": "x = eval(\"open('{mark}', 'w')\")",
    "dunder": "x = ().__class__.__bases__[0].__subclasses__()",
    "class": "class X:\n    open('{mark}', 'w')",
    "with": "with open('{mark}', 'w') as f:\n    x = 1",
    "format": "x = '{{0.__class__}}'.format(1)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_of_a_hostile_file_runs(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "evilmodule.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    values = read(tmp_path, HOSTILE[name].format(mark=mark, module="evilmodule"))
    assert not mark.exists()
    if "x" in values:
        assert isinstance(values["x"], Unread | Call)


BOMBS = {
    "power": "x = 9 ** 9 ** 9",
    "repeat": "x = 'a' * 10 ** 12",
    "list": "x = [0] * 10 ** 12",
    "doubling": "x = 'ab'\n" + "x = x + x\n" * 200,
    "shared lists": "x = [1]\n" + "x = [x, x]\n" * 200 + "y = x == x\nz = str(x)\nw = f'{x}'",
    "width": "x = f'{1:>999999999}'",
    "digits": "x = 1\n" + "x = x * 1000000\n" * 500,
    "attribute chain": "x = a" + ".b" * 5_000,
    "unary": "x = " + "-" * 20_000 + "1",
    "sum": "x = " + "1+" * 50_000 + "1",
    "brackets": "x = " + "[" * 150 + "]" * 150,
    "self": "x = dict(a=1)\nx['a'] = x",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_named_or_refused_at_once(tmp_path: Path, name: str) -> None:
    try:
        values = read(tmp_path, BOMBS[name])  # unbounded, each would fill the memory or never return
    except UsageError as error:
        refused = str(error)
        assert "config.py" in refused
    else:
        assert set(values) >= {"x"}


@pytest.mark.parametrize("text", ["x = [" * 300, "x = = 1", "\0", "x = 1\n  y = 2"])
def test_what_is_not_python_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"config\.py"):
        read(tmp_path, text)


def test_ten_megabytes_and_other_bytes_are_refused_unread(tmp_path: Path) -> None:
    big = tmp_path / "big.py"
    big.write_text("x = 1\n" * (10 * MAX_BYTES // 6))
    with pytest.raises(UsageError, match="MB is no config"):
        read_config(big)
    other = tmp_path / "other.py"
    other.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        read_config(other)
    with pytest.raises(UsageError, match="cannot read"):
        read_config(tmp_path / "none.py")
