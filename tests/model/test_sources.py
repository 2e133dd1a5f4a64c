"""Sources: a name finds its place, a half-finished folder counts as nothing, and a refusal says why."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from minituner.errors import SourceError, UsageError
from minituner.model import sources
from minituner.model.sources import EMBEDDED, MARKER, fetch, source_of
from tests.model.fake_sources import empty_home, silent, tiny_folder


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_home(tmp_path, monkeypatch)


# ---- folders and names ----------------------------------------------------------------------------------------------


def test_local_folder_is_used_as_it_is(models: Path, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "cwd" / "模型")
    assert fetch(folder, say=silent) == folder
    assert fetch(str(folder), source="local", say=silent) == folder
    assert fetch("模型", say=silent) == Path("模型")
    assert source_of(folder) == {"source": "local", "folder": str(folder)}
    tiny_folder(tmp_path / "cwd" / "work_dirs" / "hf")
    assert fetch("work_dirs/hf", say=silent) == Path("work_dirs/hf")


def test_folder_without_config_says_what_is_there_instead(models: Path, tmp_path: Path) -> None:
    def complaint(folder: Path) -> str:
        with pytest.raises(SourceError, match=r"no config\.json") as caught:
            fetch(folder, say=silent)
        return str(caught.value)

    folder = tmp_path / "run"
    folder.mkdir()
    assert "it is empty" in complaint(folder)
    (folder / "log.txt").write_text("")
    assert "it holds log.txt" in complaint(folder)
    assert "it is a file" in complaint(folder / "log.txt")
    tiny_folder(folder / "hf")
    assert f"use {folder / 'hf'}" in complaint(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in complaint(folder)


def test_local_folder_with_missing_or_damaged_shards_is_refused(models: Path, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(SourceError, match=r"model-2\.safetensors missing \(1 in all\)"):
        fetch(folder, say=silent)
    index.write_text("{")
    with pytest.raises(SourceError, match="cannot be read"):
        fetch(folder, say=silent)


def test_path_that_does_not_exist_is_never_sought_on_a_hub(models: Path, tmp_path: Path) -> None:
    for name in ("./owner/model", tmp_path / "nowhere", "~/no/such/model"):
        with pytest.raises(SourceError, match="there is no folder"):
            fetch(name, say=silent)


def test_unknown_name_lists_what_was_tried_and_the_nearest(models: Path) -> None:
    with pytest.raises(SourceError, match="no model is called 'tiny_chta'") as caught:
        fetch("tiny_chta", say=silent)
    for tried in ("a folder", "the embedded model", "the catalog", "a hub"):
        assert tried in caught.value.why
    assert caught.value.fix == "did you mean 'tiny_chat'?"
    with pytest.raises(SourceError, match="did you mean 'smollm2-135m-instruct'"):
        fetch("smollm2-135-instruct", say=silent)


def test_real_catalog_names_the_embedded_model_and_hub_ids() -> None:
    assert sources._names_embedded("smollm2_135m_instruct")
    assert not sources._names_embedded(sources.EMBEDDED_HUB_ID)
    assert not sources._names_embedded("internlm2_1_8b")
    assert "/" in sources._hub_ids("internlm2_1_8b")["hub"]
    with pytest.raises(SourceError, match="did you mean 'internlm2_1_8b'"):
        fetch("internlm2_1_8bb", say=silent)


@pytest.mark.parametrize(
    ("name", "arguments", "what"),
    [
        (EMBEDDED, {"source": "hubb"}, "did you mean 'hub'"),
        ("owner/model", {"source": "embedded"}, "is not embedded"),
        (EMBEDDED, {"revision": "main"}, "revision 'main' cannot be used with the embedded model"),
        (".", {"revision": "main"}, "with a local folder"),
        ("hub_only", {"source": "modelscope"}, "no ModelScope id"),
    ],
)
def test_arguments_that_do_not_fit_together_are_usage_errors(
    models: Path, name: str, arguments: dict[str, Any], what: str
) -> None:
    with pytest.raises(UsageError, match=what):
        fetch(name, say=silent, **arguments)


# ---- hubs -----------------------------------------------------------------------------------------------------------


class FakeHub:
    """snapshot_download over one folder: nothing is local before the first download."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files, self.calls = folder, files, []

    def __call__(self, repository: str, **options: Any) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.calls.append((repository, options["revision"], options.get("local_files_only", False)))
        if options.get("local_files_only"):
            if not self.folder.exists():
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self.files:
            (self.folder / name).write_text("{}")
        return str(self.folder)


@pytest.fixture
def hub(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "models--owner--model" / "snapshots" / ("a" * 40), ["config.json", "model.safetensors"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repository, revision: fake.files)
    return fake


def test_hub_id_is_downloaded_once_and_then_found_in_the_cache(hub: FakeHub) -> None:
    said: list[str] = []
    folder = fetch("owner/model", revision="v1", say=said.append)
    assert said == ["fetching    owner/model from the hub"]
    assert hub.calls == [("owner/model", "v1", True), ("owner/model", "v1", False)]
    assert fetch("owner/model", revision="v1", say=silent) == folder
    assert len(hub.calls) == 3
    assert source_of(folder) == {"source": "hub", "repository": "owner/model", "revision": "a" * 40, "sha256": {}}


@pytest.mark.parametrize(
    ("name", "arguments", "repository"),
    [
        ("tiny_chat", {}, "owner/tiny-chat"),
        (EMBEDDED, {"source": "hub"}, sources.EMBEDDED_HUB_ID),
        (sources.EMBEDDED_HUB_ID, {}, sources.EMBEDDED_HUB_ID),
    ],
)
def test_names_find_their_hub_id(hub: FakeHub, name: str, arguments: dict[str, Any], repository: str) -> None:
    fetch(name, say=lambda _: None, **arguments)
    assert {call[0] for call in hub.calls} == {repository}


def test_partial_snapshot_in_the_cache_is_completed(hub: FakeHub) -> None:
    hub.folder.mkdir(parents=True)
    (hub.folder / "config.json").write_text("{}")
    fetch("owner/model", say=lambda _: None)
    assert [call[2] for call in hub.calls] == [True, False]


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (["config.json", "pytorch_model.bin"], "only pickle (pytorch_model.bin); a pickle can run any code"),
        (["config.json", "m.Q4.gguf"], "only GGUF"),
        (["config.json"], "no .safetensors weights"),
        (["model.safetensors"], "no config.json"),
    ],
)
def test_repository_that_cannot_be_used_says_why(hub: FakeHub, files: list[str], why: str) -> None:
    hub.files = files
    with pytest.raises(SourceError, match="cannot be used") as caught:
        fetch("owner/model", say=lambda _: None)
    assert why in caught.value.why


def test_pickles_are_not_asked_for() -> None:
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "training_args.bin"]
    files += ["tokenizer.model", "chat_template.jinja", "modeling_internlm2.py", "optimizer.pt", "onnx/model.json"]
    wanted = set(filter_repo_objects(files, allow_patterns=sources.WANTED, ignore_patterns=sources.UNWANTED))
    assert wanted == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
        "modeling_internlm2.py",
    }


def test_hub_failure_keeps_the_reason(models: Path) -> None:
    with pytest.raises(SourceError, match="could not fetch owner/model") as caught:
        fetch("owner/model", say=lambda _: None)
    assert "ConnectionError: no network here" in caught.value.why
    assert "modelscope" in caught.value.fix
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_modelscope_package_missing_names_the_pip_command(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(SourceError, match="ModelScope") as caught:
        fetch("tiny_chat", source="modelscope", say=silent)
    assert caught.value.next_command == "python -m pip install modelscope"


def test_modelscope_interrupted_is_continued_and_then_cached(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def snapshot_download(repository: str, *, local_dir: str, **options: Any) -> str:
        calls.append(repository)
        tiny_folder(Path(local_dir))
        if len(calls) == 1:
            raise TimeoutError("half way")
        return local_dir

    module = types.ModuleType("modelscope")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "modelscope", module)
    with pytest.raises(SourceError, match="half way"):
        fetch("tiny_chat", source="modelscope", say=lambda _: None)
    folder = fetch("tiny_chat", source="modelscope", say=lambda _: None)
    assert folder == models / "modelscope--their--tiny-chat"
    assert fetch("tiny_chat", source="modelscope", say=silent) == folder
    assert calls == ["their/tiny-chat"] * 2
    assert source_of(folder)["repository"] == "their/tiny-chat"


def test_source_of_reports_a_damaged_marker_and_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not a folder"):
        source_of(tmp_path / "nothing")
    (tmp_path / MARKER).write_text("{")
    with pytest.raises(SourceError, match="cannot be read"):
        source_of(tmp_path)
