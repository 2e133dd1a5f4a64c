"""Chat in the terminal: type, Enter, read the answer as it comes.

/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer
"""

from __future__ import annotations

import sys

from minituner.chat.session import ChatSession
from minituner.errors import MinitunerError

LEAVE = ("/exit", "/quit", "exit", "quit")
RESET = ("/reset", "reset")


def run(session: ChatSession) -> None:
    """Talk until the input ends."""
    print("Type a message and press Enter. /reset forgets the conversation, /exit leaves, Ctrl-C stops an answer.")
    while True:
        try:
            text = input("\nyou: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text.lower() in LEAVE:
            return
        if text.lower() in RESET:
            session.reset()
            print("(forgotten)")
            continue
        if not text:
            continue
        print("assistant: ", end="", flush=True)
        try:
            session.ask(text, stream=show)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        except MinitunerError as error:
            print(error.text(), end="")
        print()


def show(text: str) -> None:
    """Print a piece of an answer at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
