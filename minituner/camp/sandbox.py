"""Run one learner's answer in a process behind walls, and call it as if it were a function here.

    with Sandbox(program, "labels_of", seconds=20) as answer:
        answer([("prompt", [1, 71])])      # over a pipe; Wrong when it fails, dies, or takes too long

The walls, from the outside in: a process group that is killed; a time limit for the whole exercise; where the system
allows it (Linux, `unshare`) namespaces without network and without other processes, in which the package and its answer
key are hidden; limits on memory, computing and files; the audit hook of `worker.py`. `walls()` says which of them there
are. Lesson: the teacher's kit.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from minituner.camp import worker
from minituner.camp.compare import Wrong
from minituner.errors import UsageError

MEMORY = 2 * 2**30  # bytes of address space
LONGEST = 4_000_000  # characters of one reply
NOT_RUN = " (of other cells only imports, functions and plain data are run: put the rest into the exercise's cell)"
HIDE = 'mount -t tmpfs -o ro none "$0" && exec "$@"'
PACKAGE = Path(__file__).resolve().parents[1]


@lru_cache(maxsize=1)
def namespaces() -> tuple[str, ...]:
    """The command that puts a program behind the system's walls; empty where that is not permitted."""
    unshare, shell = shutil.which("unshare"), shutil.which("sh")
    if unshare is None or shell is None:
        return ()
    command = (unshare, "-r", "-n", "-p", "-m", "--fork", "--kill-child", "--mount-proc", shell, "-c", HIDE)
    command += (str(PACKAGE),)
    probe = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if probe.returncode == 0 else ()


def walls() -> str:
    """What keeps answers in, in words for the report."""
    inner = "a process, time, memory and computing limits, and a guard inside it (no files, sockets or processes)"
    if namespaces():
        return f"{inner}; namespaces without network or other processes, the answer key hidden"
    return f"{inner}; namespaces are not permitted here, so the guard alone refuses the network"


class Sandbox:
    """A learner's program behind walls; calling it calls the function `name`.

    Raises (on call):
        Wrong: the program cannot be loaded, raises, dies, takes too long or says what is not an answer.
    """

    def __init__(self, program: str, name: str, *, seconds: float = 20.0) -> None:
        if os.name != "posix":
            raise UsageError("answers can be run behind walls on Linux and macOS only", fix="on Windows, use WSL")
        self.name, self.seconds = name, seconds
        self._folder = tempfile.TemporaryDirectory(prefix="answer-")
        self._file = Path(self._folder.name) / "answer.py"
        self._file.write_text(program, encoding="utf-8", errors="replace")
        self._unread = b""
        self._started = False

    def __enter__(self) -> Sandbox:
        source = Path(worker.__file__).read_text(encoding="utf-8")
        environment = {"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
        self._process = subprocess.Popen(
            [*namespaces(), sys.executable, "-I", "-c", source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env=environment,
            start_new_session=True,
        )
        self._deadline = time.monotonic() + self.seconds
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._folder.cleanup()

    def __call__(self, *arguments: Any) -> Any:
        """The function's value for these arguments."""
        if not self._started:
            self._send(self._first())
            self._answer([])
            self._started = True
        functions: list[Any] = []
        self._send({"arguments": [worker.encode(argument, functions) for argument in arguments]})
        return self._answer(functions)

    def _first(self) -> dict[str, Any]:
        folders = {self._folder.name, sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}
        return {
            "file": str(self._file),
            "name": self.name,
            "memory": MEMORY,
            "seconds": int(self.seconds) + 1,
            "readable": sorted(os.path.realpath(folder) for folder in folders),
            "hidden": [str(PACKAGE)],
        }

    def _answer(self, functions: list[Any]) -> Any:
        """The next reply; calls of functions that were handed over are answered on the way."""
        while True:
            reply = self._read()
            try:
                if "call" in reply:
                    called = functions[int(reply["call"])]
                    given = [worker.decode(argument) for argument in reply["arguments"]]
                    self._send({"value": worker.encode(called(*given))})
                    continue
                if "error" in reply:
                    error = str(reply["error"])[:300]
                    raise Wrong(f"{self.name} raises {error}" + (NOT_RUN if error.startswith("NameError") else ""))
                return worker.decode(reply["value"]) if "value" in reply else None
            except Wrong:
                raise
            except Exception as error:  # the learner's values are anything: each wrong kind becomes a sentence
                told = f"{self.name} hands over what cannot be used"
                raise Wrong(f"{told} ({type(error).__name__}: {str(error)[:120]})") from None

    def _send(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(what) + "\n").encode())
            self._process.stdin.flush()
        except (BrokenPipeError, OSError):
            raise Wrong(self._gone()) from None

    def _read(self) -> dict[str, Any]:
        """The next line, before the deadline and not without end."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, self._deadline - time.monotonic())):
                    raise Wrong(f"{self.name} did not end within {self.seconds:g} seconds: does a loop never stop?")
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise Wrong(self._gone())
                self._unread += piece
                if len(self._unread) > LONGEST:
                    raise Wrong(f"{self.name} gives more than {LONGEST:,} characters")
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise Wrong(f"{self.name} wrote something that is no answer")
        return reply

    def _gone(self) -> str:
        return f"the process of {self.name} ended without an answer (exit, or out of memory or computing time)"
