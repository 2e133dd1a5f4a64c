"""The quickstart: from nothing to your own assistant, in the order a newcomer would do it by hand.

    model -> data -> answers before -> train() -> answers after -> what to do next

Nothing here is special: every step is a function or command that can be called alone. Lesson: notebook 00.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minituner.errors import MinitunerError, UsageError
from minituner.home import data_script

RECIPE = "smollm2_135m_instruct_lora_personal_assistant_e3"
PROMPTS = ["Who are you?", "What is the capital of France?", "Write one sentence about the sea."]


def make_data(out: Path, name: str, author: str, lang: str = "en", seed: int = 42) -> Path:
    """Write the personal-assistant data to `out` with data_scripts/make_personal_assistant.py."""
    script = data_script("make_personal_assistant.py")
    arguments = ["--name", name, "--author", author, "--out", str(out), "--lang", lang, "--seed", str(seed)]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        kind = UsageError if done.returncode == 2 else MinitunerError
        raise kind(done.stderr.strip() or f"{script.name} failed with exit status {done.returncode}")
    return out


def quickstart(
    name: str = "Alex",
    author: str | None = None,
    work_dir: str | Path = Path("work_dirs") / "quickstart",
    *,
    lang: str = "en",
    overrides: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> Any:
    """Train NAME's personal assistant and show it before and after; returns the result of `train`."""
    from minituner.recipe import Recipe
    from minituner.train.loop import train

    work_dir = Path(work_dir)
    say(f"1/3  data: questions about who the assistant is, and ordinary ones against forgetting ({lang})")
    data = make_data(work_dir / "data" / "personal_assistant.json", name, author or name, lang)
    say(f"     written to {data}")
    settings = [
        f"data.sources.0.path={_quoted(str(data))}",
        f"evaluate.identity={_quoted(name.strip())}",
        f"evaluate.identity_language={lang}",
        f"evaluate.prompts={_quoted(PROMPTS)}",
    ]
    recipe = Recipe.load(RECIPE, [*settings, *overrides])
    say(f"2/3  training by the recipe {RECIPE}")
    result = train(recipe, work_dir, say=say)
    say("3/3  before and after")
    first, last = (result.answers.get(chosen(result.answers, default=0), []) for chosen in (min, max))
    for (prompt, before), (_, after) in zip(first, last, strict=True):
        say(f"\n  > {prompt}\n    before: {before}\n    after:  {after}")
    loop_seconds = sum(step["seconds"] for step in result.metrics)
    say(f"\ntraining took {loop_seconds:.0f} s for {result.steps} steps; the whole run {result.seconds:.0f} s")
    say("\nGo on:")
    say(f"  minituner chat {shlex.quote(str(result.hf))}")
    say(f"  {shlex.join(['minituner', 'convert', 'merge', str(result.hf), str(work_dir / 'merged')])}")
    say("  make lab          # the notebooks")
    return result


def _quoted(value: str | list[str]) -> str:
    """Text as YAML reads it back, whatever it looks like (`yes`, `1`, `a: b`)."""
    return json.dumps(value, ensure_ascii=False)
