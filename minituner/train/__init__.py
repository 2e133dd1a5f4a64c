"""Training: the loop, the engines under it, checkpoints. Calling the package trains: `train(recipe, work_dir=...)`.

Lessons: notebooks 06 and 07.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """So that `from minituner import train` gives something to call and something to import from."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `minituner.train.loop.train`."""
        from minituner.train.loop import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
