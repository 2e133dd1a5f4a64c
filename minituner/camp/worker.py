"""A process that holds one learner's answer and nothing else: it gets cases, and gives back what the function returns.

    report                                worker (this file, in an interpreter of its own)
    {"file": ..., "name": "labels_of"} -> loads the learner's function behind the guard
                                       <- {"ready": true}, or {"error": "NameError: ..."}
    {"arguments": [...]}               -> calls it
                                       <- {"value": [...]}, or {"error": "..."}
    {"value": ...}                    <-> {"call": 0, "arguments": [...]}, where an argument is a function

The right values are never here: the report draws the cases, compares and judges, so whatever an answer prints, forges
or breaks, it can only fail. What it could still do is look for the answer key in the package, or do harm; hence the
guard (an audit hook: no files but Python's own, no network, no processes, no minituner) and the limits on memory and
time. It is a wall against tricks, not against an attacker with native code; `sandbox.py` puts the system's own walls
around it where it may. This file imports only the standard library, and numpy. Lesson: the teacher's kit.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

KINDS = {"tuple": tuple, "set": set, "bytes": bytes}
NUMBERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
NUMBERS += ("float16", "float32", "float64", "bool")
HIDDEN = ("minituner", "torch", "transformers")
DENIED = (
    *("os.", "socket.", "subprocess.", "ctypes.", "shutil.", "signal.", "pty.", "mmap.", "fcntl.", "resource.", "gc."),
    *("urllib.", "http.", "ftplib.", "smtplib.", "imaplib.", "poplib.", "telnetlib.", "sqlite3.", "webbrowser."),
    *("sys.settrace", "sys.setprofile", "sys.addaudithook", "tempfile.", "glob.", "pathlib."),
)
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fspath")  # importing needs them


def encode(value: Any, functions: list[Callable[..., Any]] | None = None, depth: int = 0) -> Any:
    """A value as JSON: lists as they are, everything else that JSON lacks as {"$kind": ...}; functions by number.

    Raises:
        TypeError: the value is of a kind that no exercise asks for, or nested endlessly.
    """
    if depth > 20:
        raise TypeError("the value is nested more than 20 deep")
    if value is None or isinstance(value, bool | str):
        return value
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # numpy's arrays and scalars
        listed = encode(value.tolist(), None, depth + 1)
        return {"$array": listed, "dtype": str(value.dtype)} if getattr(value, "ndim", 0) else listed
    if isinstance(value, int | float):
        return value
    if isinstance(value, list | range):
        return [encode(item, functions, depth + 1) for item in value]
    if isinstance(value, dict):
        pairs = [[encode(k, functions, depth + 1), encode(v, functions, depth + 1)] for k, v in value.items()]
        return {"$dict": pairs}
    for kind, type_ in KINDS.items():
        if isinstance(value, type_):
            return {f"${kind}": [encode(item, functions, depth + 1) for item in value]}
    if callable(value) and functions is not None:
        functions.append(value)
        return {"$function": len(functions) - 1}
    raise TypeError(
        f"the function returns {type(value).__name__}; numbers, texts, lists, dictionaries, arrays are wanted"
    )


def decode(value: Any, ask: Callable[[int, tuple[Any, ...]], Any] | None = None) -> Any:
    """The value that `encode` wrote; a function becomes one that calls `ask(number, arguments)`.

    Raises:
        ValueError: this was not written by `encode`.
    """
    if isinstance(value, list):
        return [decode(item, ask) for item in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()), ("", None))
    if kind == "$array":
        import numpy as np

        numbers = np.array(content)
        if value["dtype"] not in NUMBERS or numbers.dtype.kind not in "biuf":
            raise ValueError("an array of numbers is wanted")
        return numbers.astype(value["dtype"])
    if kind == "$dict":
        return {decode(key, ask): decode(item, ask) for key, item in content}
    if kind == "$function" and ask is not None:
        return lambda *arguments: ask(content, arguments)
    if kind[1:] in KINDS:
        return KINDS[kind[1:]](decode(content, ask))
    raise ValueError(f"unknown kind of value: {kind!r}")


def guard(readable: tuple[str, ...], hidden: tuple[str, ...]) -> None:
    """From now on refuse what an answer does not need; an audit hook cannot be taken off again.

    Everything the hook uses is bound here, for an answer may change what names mean.
    """
    realpath, fsdecode, separator = os.path.realpath, os.fsdecode, os.sep
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    denied, harmless, modules, refused, missing = DENIED, HARMLESS, HIDDEN, PermissionError, ImportError
    an_int, what_is = int, isinstance

    def within(path: str, folders: tuple[str, ...]) -> bool:
        found = False
        for folder in folders:  # no any(): an answer may have replaced it
            found = found or path == folder or path.startswith(folder + separator)
        return found

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if what_is(path, an_int):
                return
            real = realpath(fsdecode(path))
            if flags & writing or not within(real, readable) or within(real, hidden):
                raise refused("an answer is checked without files")
        elif event == "import":
            if arguments[0].partition(".")[0] in modules:
                name = arguments[0].partition(".")[0]
                raise missing(f"an answer is checked without {name}: plain Python and numpy will do")
        elif event.startswith(denied) and event not in harmless:
            raise refused(f"an answer is checked without {event}")

    sys.addaudithook(hook)


def limit(memory: int, seconds: int) -> None:
    """Bytes of memory and seconds of computing that this process may use; it may write no file."""
    import resource

    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def load(file: str, name: str) -> Callable[..., Any]:
    """The function `name` of the learner's file.

    Raises:
        NameError: the file defines no such function.
    """
    spec = importlib.util.spec_from_file_location("answer", file)
    if spec is None or spec.loader is None:
        raise NameError(f"{file} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise NameError(f"the cell defines no function {name}")
    return getattr(module, name)


def serve(requests: TextIO, replies: TextIO) -> None:
    """Load what the first line names, then answer one call a line until the lines end."""
    write, flush, dumps, loads, readline = replies.write, replies.flush, json.dumps, json.loads, requests.readline

    def reply(**what: Any) -> None:
        write(dumps(what) + "\n")
        flush()

    def ask(number: int, arguments: tuple[Any, ...]) -> Any:
        reply(call=number, arguments=[encode(argument) for argument in arguments])
        return decode(loads(readline())["value"])

    first = loads(readline())
    limit(first["memory"], first["seconds"])
    guard(tuple(first["readable"]), tuple(first["hidden"]))
    try:
        function = load(first["file"], first["name"])
    except BaseException as error:  # SystemExit too: whatever it is becomes the learner's sentence
        reply(error=f"{type(error).__name__}: {str(error)[:300]}")
        return
    reply(ready=True)
    while line := readline():
        try:
            value = encode(function(*[decode(argument, ask) for argument in loads(line)["arguments"]]))
        except BaseException as error:
            reply(error=f"{type(error).__name__}: {str(error)[:300]}")
        else:
            reply(value=value)


def main() -> None:
    """Speak over standard input and a copy of standard output; what the answer itself prints goes nowhere."""
    importlib.import_module("numpy.random")  # before the guard: the import asks for what an answer must not have
    sys.dont_write_bytecode = True
    requests, replies = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    serve(requests, replies)


if __name__ == "__main__":
    main()
