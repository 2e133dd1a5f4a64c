"""The command that reads old configs: `minituner import-cfg`.

    minituner import-cfg internlm2_1_8b_qlora_alpaca_e3_copy.py -o mine.yaml

The file is read as text and never run; a table says what became of each setting. Lesson: notebook 08.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

migrate_app = typer.Typer()


@migrate_app.command("import-cfg")
def import_cfg(
    file: Annotated[Path, typer.Argument(help="An XTuner or InternEvo config (Python); it is not run.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: beside it, with the ending .yaml.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table and the recipe as JSON.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Carry an old config over into a recipe, and say what became of each setting."""
    from minituner.errors import UsageError
    from minituner.migrate.importing import import_config
    from minituner.migrate.report import next_commands

    imported = import_config(file)
    recipe = imported.recipe
    target = out or file.with_suffix(".yaml")
    if target.exists() and not force:
        raise UsageError(f"{target} exists", fix="choose another place with -o, or --force")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(recipe.dump_commented(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}", fix="choose another place with -o") from None
    if as_json:
        print(json.dumps({**imported.to_dict(), "written": str(target)}, indent=2, ensure_ascii=False))
        return
    print("\n".join(imported.lines()))
    print(f"written: {target}")
    print("\n".join(f"next: {command}" for command in next_commands(target)))
