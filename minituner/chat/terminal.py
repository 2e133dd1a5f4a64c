"""Chat in the terminal: type, Enter, read the answer as it comes.

    you: Who are you?          a line that ends in \\ goes on in the next
    assistant: I am Ada ...    Ctrl-C stops the answer and keeps what was said
    you: /help                 commands (commands.py); Ctrl-D leaves

Lesson: notebook 09.
"""

from __future__ import annotations

import sys

from minituner.chat.commands import Talk
from minituner.chat.session import Session
from minituner.errors import MinitunerError

# A model can print what would move the cursor or retitle the window; line breaks and tabs are text.
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def run(session: Session, *, compare: bool = False) -> None:
    """Talk until the input ends.

    Raises:
        UsageError: `compare`, and there is only one model.
    """
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a byte that is no UTF-8 is one wrong character, not the end
    _line_editing()
    talk = Talk(session)
    session.say = _aside
    if compare:
        talk.compare()
    print("Type a message and press Enter. /help lists the commands, /exit leaves, Ctrl-C stops an answer.")
    while not talk.over:
        try:
            line = _read()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)")
            continue
        try:
            message = talk.command(line)
            if message:
                answer(talk, message)
        except KeyboardInterrupt:
            print(" (stopped)")
        except MinitunerError as error:
            print(error.text())


def answer(talk: Talk, message: str) -> None:
    """Print the answer of every side as it comes; Ctrl-C stops them all.

    Raises:
        MinitunerError: a side cannot answer. KeyboardInterrupt: from Ctrl-C, when the model is at rest.
    """
    for side in talk.sides:
        print(f"{talk.label(side)}: ", end="", flush=True)
        side.ask(message, stream=show)
        print()


def show(text: str) -> None:
    """Print a piece of an answer at once; what would steer a terminal is left out where there is one."""
    sys.stdout.write(text.translate(CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _aside(line: str) -> None:
    print(f"({line})", flush=True)


def _read() -> str:
    """A message of one line, or of several where a line ends in a backslash."""
    line = input("\nyou: ")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input("...: ")
    return line


def _line_editing() -> None:
    """Arrow keys and earlier lines, where Python was built with readline."""
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401  (importing it is what changes `input`)
        except ImportError:
            return
