"""The quickstart from end to end, over the tiny model, for names that break careless programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minituner import Recipe
from minituner.errors import MinitunerError, UsageError
from minituner.quickstart import PROMPTS, RECIPE, data_script, make_data, quickstart
from tests.train.processes import run_command


def overrides(model_folder: Path) -> tuple[str, ...]:
    """The same recipe, over the tiny model, two steps long."""
    return (
        f"model.name_or_path={model_folder}",
        "model.dtype=float32",
        "method.target_modules=all-linear",  # the recipe names layers that the tiny model does not have
        "train.max_steps=2",
        "evaluate.max_new_tokens=4",
    )


@pytest.mark.slow
def test_it_runs_from_end_to_end_and_says_how_to_go_on(model_folder: Path, tmp_path: Path) -> None:
    arguments = ["quickstart", "--name", "Ada", "--work-dir", "my quickstart", *overrides(model_folder)]
    status, output = run_command(arguments, tmp_path)
    assert status == 0, output
    work_dir = tmp_path / "my quickstart"
    for prompt in PROMPTS:
        assert output.count(f"> {prompt}") >= 3, "before, after, and side by side"
    assert "tokens  100.0%  raw" in output
    assert "identity rate" in output
    assert "retention" in output
    assert "minituner chat 'my quickstart/hf'" in output
    assert "minituner convert merge 'my quickstart/hf' 'my quickstart/merged'" in output
    assert "make lab" in output
    assert "Traceback" not in output
    records = json.loads((work_dir / "data" / "personal_assistant.json").read_text(encoding="utf-8"))
    assert sum("Ada" in json.dumps(record) for record in records) >= 60
    assert (work_dir / "hf" / "adapter_config.json").is_file()
    probes = json.loads(next(work_dir.glob("runs/*/identity.json")).read_text(encoding="utf-8"))
    assert {"identity_rate", "clean_rate", "retention_kl"} <= set(probes)
    status, output = run_command(["chat", "my quickstart/hf", "--prompt", "Hi", "--max-new-tokens", "2"], tmp_path)
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.usefixtures("own_home")
@pytest.mark.parametrize(
    ("name", "lang"), [("上官云朵", "zh"), ('O\'Neil "Ada": #1 {x}', "en"), (" yes ", "en"), ("Ädá 😀", "both")]
)
def test_any_name_goes_through_as_it_is(name: str, lang: str, model_folder: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / "wörk: #dir"
    quiet = (*overrides(model_folder), "evaluate.prompts=[Hi]", "evaluate.max_new_tokens=1", "train.max_steps=1")
    said: list[str] = []
    result = quickstart(name, None, work_dir, lang=lang, overrides=quiet, say=said.append)
    recipe = Recipe.load(work_dir / "recipe.yaml")
    assert recipe.evaluate.identity == name.strip()
    assert recipe.evaluate.prompts == ["Hi"], "an override wins over the quickstart's own prompts"
    assert recipe.data.sources[0].path == str(work_dir / "data" / "personal_assistant.json")
    assert name.strip() in (work_dir / "data" / "personal_assistant.json").read_text(encoding="utf-8").replace(
        '\\"', '"'
    )
    assert any(name.strip() in line for line in said if line.startswith("identity rate"))
    assert result.probes["identity_rate"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "  ", "a\nb", "{name}", "<|im_end|>", "x" * 200])
def test_a_name_that_cannot_be_used_is_exit_2_before_anything_starts(name: str, tmp_path: Path) -> None:
    status, output = run_command(["quickstart", "--name", name, "--work-dir", "w"], tmp_path)
    assert status == 2, output
    assert "--name" in output
    assert "fix:" in output
    assert "Traceback" not in output
    assert not (tmp_path / "w" / "runs").exists()


@pytest.mark.slow
def test_wrong_options_are_exit_2_with_a_message(tmp_path: Path) -> None:
    for arguments, said in ((["--lang", "fr"], "fr"), (["train.learning_rte=1"], "did you mean 'learning_rate'?")):
        status, output = run_command(["quickstart", "--work-dir", "w", *arguments], tmp_path)
        assert status == 2, output
        assert said in output
        assert "Traceback" not in output


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, output = run_command(["quickstart", "--work-dir", "file/w"], tmp_path)
    assert status in (1, 2), output
    assert "file/w" in output
    assert "Traceback" not in output


def test_the_step_by_step_way_makes_the_same_data(tmp_path: Path) -> None:
    a = make_data(tmp_path / "a.json", "Ada", "Ada")
    b = make_data(tmp_path / "b.json", "Ada", "Ada")
    assert a.read_bytes() == b.read_bytes()
    with pytest.raises(UsageError, match="--name"):
        make_data(tmp_path / "c.json", "", "Ada")
    with pytest.raises(MinitunerError, match=r"nothing\.py is missing"):
        data_script("nothing.py")


def test_its_recipe_is_in_the_catalog_and_for_its_data() -> None:
    recipe = Recipe.load(RECIPE)
    assert recipe.name == RECIPE
    assert recipe.data.sources[0].format == "openai"
    assert recipe.model.name_or_path == "smollm2-135m-instruct"
