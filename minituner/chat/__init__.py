"""Chat with a model: one answer, a terminal, later a web page. Calling the package answers: `chat(folder, prompt=...)`.

Lesson: notebook 09.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """So that `from minituner import chat` gives something to call and something to import from."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `minituner.chat.session.chat`."""
        from minituner.chat.session import chat

        return chat(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
