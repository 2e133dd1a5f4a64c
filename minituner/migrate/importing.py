"""Which old config is it? One function for both kinds. Lesson: notebook 08."""

from __future__ import annotations

from pathlib import Path

from minituner.errors import UsageError
from minituner.migrate import internevo, xtuner
from minituner.migrate.folding import read_config
from minituner.migrate.report import Imported


def import_config(path: str | Path) -> Imported:
    """The recipe that an XTuner or InternEvo config describes, and what became of each of its settings.

    Raises:
        UsageError: it cannot be read, is neither, or is for something that is not trained here.
    """
    config = read_config(path)
    if internevo.looks_like(config):
        return internevo.convert(config)
    if xtuner.looks_like(config):
        return xtuner.convert(config)
    known = ", ".join(list(config.values)[:8]) or "nothing"
    raise UsageError(
        f"{path} looks like neither an XTuner nor an InternEvo config",
        why=f"it assigns {known}; XTuner's assign train_dataloader, InternEvo's data = dict(seq_len=...)",
        fix="name the config itself; a config that inherits (read_base) has to be resolved first",
    )
