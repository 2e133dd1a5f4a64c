"""Against XTuner: its templates are these, and the names of its configs are recipe names here or say what they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from minituner.catalog import compose, find_template, load, xtuner_name
from minituner.errors import UsageError
from minituner.recipe import Recipe
from tests.shared_data import SHARED, needs_shared

# Not recipes for supervised text: images, preference tuning, reward models, conversion scripts.
NOT_SFT = re.compile(r"^llava_|^internvl_|_dpo|_orpo|_reward_|^POLAR|^convert_")


@needs_shared
def test_templates_equal_xtuner() -> None:
    expected = json.loads((SHARED / "reference" / "templates.json").read_text(encoding="utf-8"))
    assert {key: find_template(key) for key in load("templates")} == expected["PROMPT_TEMPLATE"]
    assert len(load("templates")) == 27
    assert expected["SYSTEM_TEMPLATE"] == load("system_prompts")


def test_xtuner_names_resolve() -> None:
    """The names of all configs that XTuner ships: what is supervised text resolves, the rest says what it is."""
    names = (Path(__file__).parent / "xtuner_config_names.txt").read_text(encoding="utf-8").split()
    assert len(names) == len(set(names)) == 589
    plain = [name for name in names if not NOT_SFT.search(name)]
    resolved = [name for name in names if xtuner_name(name)]
    same = sum(xtuner_name(name) == name for name in resolved)
    print(
        f"{len(set(plain) & set(resolved))} of {len(plain)} plain SFT names resolve, "
        f"{len(resolved)} of all {len(names)}, {same} without a change"
    )
    assert set(plain) <= set(resolved)
    assert len(resolved) >= 500
    for name in names:
        if xtuner_name(name):
            assert Recipe.from_values(compose(name), name).name == name
            # what it is translated to makes the same run
            ours, theirs = compose(xtuner_name(name)), compose(name)
            assert {k: v for k, v in ours.items() if k not in {"name", "notes"}} == {
                k: v for k, v in theirs.items() if k not in {"name", "notes"}
            }
        else:
            with pytest.raises(UsageError) as caught:
                compose(name)
            assert caught.value.what.startswith(f"{name!r} is a ")
            assert caught.value.fix, "what to use instead, or that it is not there yet"
