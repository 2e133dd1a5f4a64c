"""Shared fixtures: a cache of its own for every test, and a tiny model built once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from minituner.home import home
from tests.tiny import tiny_folder, write_chats

# What a test says must not depend on how busy the machine is.
settings.register_profile("minituner", deadline=None)
settings.load_profile("minituner")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Matrices this small are done before a second thread has started; on a busy machine waiting for it takes ages."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _imported_modules_are_not_garbage() -> None:
    """Every collection of a run that ends need not look through half a million objects of imported code."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _a_cache_for_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests prepare is not left in the user's cache; its models are lent, for making one takes half a minute."""
    models = home() / "models"
    models.mkdir(parents=True, exist_ok=True)
    place = tmp_path_factory.mktemp("home")
    (place / "models").symlink_to(models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITUNER_HOME", str(place))
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and tokenizer."""
    return tiny_folder(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that only this test sees."""
    monkeypatch.setenv("MINITUNER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Twelve small chats."""
    return write_chats(tmp_path / "chats.jsonl")
