"""Reading a Python config without running it: its syntax tree, and constants folded by hand.

    lr = 2e-4 / 2                                 -> 0.0001
    data_path = f"{root}/train.json"              -> "data/train.json"
    prompt_template = PROMPT_TEMPLATE.qwen_chat   -> Ref("xtuner.utils.PROMPT_TEMPLATE.qwen_chat")
    model = dict(type=SupervisedFinetune, ...)    -> Call("dict", ..., {"type": Ref(...), ...})
    os.system("...")                              -> Unread("os.system('...')", line 12)

Nothing of the file is imported, called or evaluated: names are looked up in what the file itself assigned, a handful of
operators is computed on numbers, texts and lists of bounded size, and everything else stays a piece of text that says
where it stood. So a config from a stranger is as safe to read as any text. Lesson: notebook 08.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minituner.errors import UsageError

MAX_BYTES = 1_000_000  # a config is a few kB; ten of its pages do not make 100 kB
MAX_DEPTH = 60
MAX_SIZE = 100_000  # characters of a folded text, items of a folded list
MAX_NUMBER = 10**18


@dataclass(frozen=True)
class Ref:
    """A dotted name that the file imports or takes for granted, with its full path where an import tells it."""

    path: str

    @property
    def name(self) -> str:
        """The last part: `AdamW` of `torch.optim.AdamW`."""
        return self.path.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Call:
    """A call that was not made: the function's name, its arguments folded."""

    function: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    line: int

    def get(self, key: str, default: Any = None) -> Any:
        """A named argument, as `dict(...).get`."""
        return self.named.get(key, default)


@dataclass(frozen=True)
class Unread:
    """An expression or statement that is not folded: its text and its line."""

    text: str
    line: int


@dataclass
class Config:
    """What a file assigns at its top level, and the statements that were left alone."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    unread: list[Unread] = field(default_factory=list)
    imports: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)  # names that a later line reads: pieces of something larger


class _TooLarge(Exception):
    """A folded value would pass the bounds above."""


def read_config(path: str | Path) -> Config:
    """Fold the file's top-level assignments in their order.

    Raises:
        UsageError: it is not there, too large, not Python, or nested too deeply.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no file", fix="name the Python config")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UsageError(
                f"{path}: {path.stat().st_size / 1e6:.1f} MB is no config file",
                why=f"at most {MAX_BYTES / 1e6:g} MB are read",
            )
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a text file in UTF-8", fix="name the Python config") from None
    try:
        tree = ast.parse(text, filename=path.name)
    except SyntaxError as error:
        raise UsageError(f"{path}:{error.lineno or 1}: not Python: {error.msg}") from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as Python: {error or type(error).__name__}") from None
    return _Folder(path).run(tree)


_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


class _Folder:
    """Walks the statements and folds their expressions."""

    def __init__(self, path: Path) -> None:
        self.config = Config(path)

    def run(self, tree: ast.Module) -> Config:
        for statement in tree.body:
            self._statement(statement)
        return self.config

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import):
            # `import a.b` binds a; `import a.b as c` binds a.b.
            self.config.imports |= {a.asname: a.name for a in node.names if a.asname}
            self.config.imports |= {(top := a.name.split(".")[0]): top for a in node.names if not a.asname}
        elif isinstance(node, ast.ImportFrom):
            place = node.module or ""
            self.config.imports |= {(a.asname or a.name): f"{place}.{a.name}".strip(".") for a in node.names}
        elif isinstance(node, ast.Assign):
            value = self._fold(node.value)
            for target in node.targets:
                self._assign(target, value, node.lineno)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, self._fold(node.value), node.lineno)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            before = self._fold(ast.copy_location(ast.Name(node.target.id, ast.Load()), node))
            value = self._binary(type(node.op), before, self._fold(node.value), node)
            self._assign(node.target, value, node.lineno)
        elif not (isinstance(node, ast.Pass) or _is_text(node)):
            self.config.unread.append(self._unread(node))

    def _assign(self, target: ast.expr, value: Any, line: int) -> None:
        if isinstance(target, ast.Name):
            self.config.values[target.id] = value
            self.config.lines[target.id] = line
        elif isinstance(target, ast.Tuple | ast.List) and isinstance(value, tuple | list):
            if len(target.elts) == len(value):
                for part, one in zip(target.elts, value, strict=True):
                    self._assign(part, one, line)
                return
            self.config.unread.append(self._unread(target))
        elif isinstance(target, ast.Subscript) and self._assign_item(target, value):
            pass
        else:
            self.config.unread.append(self._unread(target))

    def _assign_item(self, target: ast.Subscript, value: Any) -> bool:
        """`model["lora"]["r"] = 8`: an edit of what was assigned above; False where there is nothing to edit."""
        holder, key = self._fold(target.value), self._fold(target.slice)
        holder = holder.named if isinstance(holder, Call) else holder
        if isinstance(holder, dict) and isinstance(key, str | int):
            holder[key] = value
            return True
        if isinstance(holder, list) and isinstance(key, int) and -len(holder) <= key < len(holder):
            holder[key] = value
            return True
        return False

    def _fold(self, node: ast.expr, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            return Unread("nested too deeply", getattr(node, "lineno", 0))
        try:
            return self._fold_inner(node, depth + 1)
        except (_TooLarge, ArithmeticError, TypeError, ValueError, KeyError, IndexError):
            return self._unread(node)

    def _fold_inner(self, node: ast.expr, depth: int) -> Any:
        def fold(inner: ast.expr) -> Any:
            return self._fold(inner, depth)

        match node:
            case ast.Constant(value=value):
                return _bounded(value)
            case ast.Name(id=name):
                if name in self.config.values:
                    self.config.used.add(name)
                    return self.config.values[name]
                return Ref(self.config.imports.get(name, name))
            case ast.Attribute(value=inner, attr=attribute):
                owner = fold(inner)
                if isinstance(owner, Ref):
                    return Ref(f"{owner.path}.{attribute}")
                if isinstance(owner, Call) and attribute in owner.named:
                    return owner.named[attribute]
                return self._unread(node)
            case ast.List(elts=items):
                return list(self._items(items, depth))
            case ast.Tuple(elts=items):
                return tuple(self._items(items, depth))
            case ast.Dict(keys=keys, values=values):
                if any(key is None for key in keys):
                    return self._unread(node)
                return {_key(fold(key)): fold(value) for key, value in zip(keys, values, strict=True) if key}
            case ast.JoinedStr(values=parts):
                return _bounded("".join(self._text(part, depth) for part in parts))
            case ast.UnaryOp(op=op, operand=inner):
                return self._unary(op, fold(inner), node)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(type(op), fold(left), fold(right), node)
            case ast.BoolOp(op=op, values=parts):
                folded = [fold(part) for part in parts]
                if not all(_plain(part) for part in folded):
                    return self._unread(node)
                return all(folded) if isinstance(op, ast.And) else any(folded)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                sides = fold(left), fold(right)
                return _COMPARE[type(op)](*sides) if all(map(_plain, sides)) else self._unread(node)
            case ast.IfExp(test=test, body=body, orelse=other):
                condition = fold(test)
                return fold(body if condition else other) if _plain(condition) else self._unread(node)
            case ast.Subscript(value=inner, slice=place):
                owner, key = fold(inner), fold(place)
                owner = owner.named if isinstance(owner, Call) else owner
                return owner[key] if isinstance(owner, dict | list | tuple | str) else self._unread(node)
            case ast.Call(func=function, args=arguments, keywords=keywords):
                return self._call(function, arguments, keywords, node, depth)
        return self._unread(node)

    def _items(self, nodes: list[ast.expr], depth: int) -> Iterator[Any]:
        if len(nodes) > MAX_SIZE:
            raise _TooLarge
        for node in nodes:
            if isinstance(node, ast.Starred):
                inner = self._fold(node.value, depth)
                if not isinstance(inner, list | tuple):
                    raise TypeError("only a list can be unpacked")
                yield from inner
            else:
                yield self._fold(node, depth)

    def _call(
        self, function: ast.expr, arguments: list[ast.expr], keywords: list[ast.keyword], node: ast.Call, depth: int
    ) -> Any:
        """A call as data. `dict(...)` is what configs are made of; a few that only convert are folded."""
        called = self._fold(function, depth)
        if not isinstance(called, Ref):
            return self._unread(node)
        values = tuple(self._items(arguments, depth))
        named: dict[str, Any] = {}
        for keyword in keywords:
            value = self._fold(keyword.value, depth)
            if keyword.arg is not None:
                named[keyword.arg] = value
            elif isinstance(value, Call) and value.function == "dict":
                named |= value.named
            elif isinstance(value, dict):
                named |= {str(key): inner for key, inner in value.items()}
            else:
                return self._unread(node)
        simple = {"int": int, "float": float, "str": str, "bool": bool}
        if called.path in simple and len(values) == 1 and not named and isinstance(values[0], str | int | float):
            return _bounded(simple[called.path](values[0]))
        if called.path in ("os.path.join", "osp.join", "posixpath.join") and all(isinstance(v, str) for v in values):
            return _bounded("/".join(str(v).rstrip("/") for v in values))
        return Call(called.path, values, named, node.lineno)

    def _text(self, node: ast.expr, depth: int) -> str:
        """One piece of an f-string."""
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.FormattedValue) and node.format_spec is None and node.conversion == -1:
            value = self._fold(node.value, depth)
            if isinstance(value, str | int | float | bool):
                return str(value)
        raise ValueError("only plain values are put into texts")

    def _unary(self, op: ast.unaryop, value: Any, node: ast.expr) -> Any:
        if not _plain(value):
            return self._unread(node)
        if isinstance(op, ast.USub):
            return -value
        if isinstance(op, ast.UAdd):
            return +value
        return (not value) if isinstance(op, ast.Not) else self._unread(node)

    def _binary(self, op: type[ast.operator], left: Any, right: Any, node: ast.AST) -> Any:
        """Arithmetic whose result is known to be small before it is computed."""
        if op not in _BINARY or _opaque(left) or _opaque(right):
            return self._unread(node)
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        joins = op is ast.Add and type(left) is type(right) and isinstance(left, str | list | tuple)
        repeats = op is ast.Mult and isinstance(left, str | list | tuple) and isinstance(right, int)
        if repeats and len(left) * max(right, 0) > MAX_SIZE:
            raise _TooLarge
        if op is ast.Pow and not (numbers and abs(left) <= 10**6 and abs(right) <= 20):
            raise _TooLarge
        if not (numbers or joins or repeats):
            return self._unread(node)
        return _bounded(_BINARY[op](left, right))

    def _unread(self, node: ast.AST) -> Unread:
        line = getattr(node, "lineno", 0)
        try:
            text = ast.unparse(node).splitlines()[0][:120]
        except (RecursionError, MemoryError, ValueError, IndexError):
            text = type(node).__name__
        return Unread(text, line)


def _is_text(node: ast.stmt) -> bool:
    """True for a docstring, or a comment in quotes."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _opaque(value: Any) -> bool:
    return isinstance(value, Ref | Call | Unread)


def _plain(value: Any) -> bool:
    """A single value. Lists may share their parts, so that comparing or printing a small one can take for ever."""
    return value is None or isinstance(value, str | int | float)


def _key(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    raise TypeError("only plain values are keys")


def _bounded(value: Any) -> Any:
    """The value, if it is of a kind and size that a setting has."""
    if isinstance(value, str | list | tuple) and len(value) > MAX_SIZE:
        raise _TooLarge
    if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= MAX_NUMBER):
        raise _TooLarge
    return value
