"""Every exercise of every lesson: the solution passes, the stub is not started, wrong answers are told their cause.

The solutions and the planted wrong answers are run as learners' cells are: as source, by their own module.
"""

from __future__ import annotations

import doctest
import importlib
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minituner.camp import grade, hint
from minituner.camp.book import function_of, lessons, solution, stub
from minituner.camp.core import exercises, find

KEYS = [f"{int(lesson)}.{number}" for lesson in lessons() for number in exercises(lesson)]
SEEDS = (0, "monday", 2**40)
MISTAKES = [(key, words) for key in KEYS for words in find(key).mistakes]


def planted() -> list[tuple[str, str, str, str]]:
    found = []
    for lesson in lessons():
        module = importlib.import_module(f"tests.camp.planted.lesson_{lesson}")
        found += [(key, *edit) for key, edits in module.PLANTED.items() for edit in edits]
    return found


def written(source: str, name: str) -> Callable[..., Any]:
    """The function of a cell, from its source."""
    module = types.ModuleType("answer")
    module.np = np
    exec(compile(source, "answer", "exec"), module.__dict__)
    return getattr(module, name)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_solution_passes_whatever_the_seed(key: str, seed: Any) -> None:
    outcome = grade(key, function_of(key), seed=seed, seconds=300)
    assert outcome.state == "passed", outcome


@pytest.mark.parametrize("key", KEYS)
def test_the_stub_is_not_started(key: str) -> None:
    head = stub(key).rsplit("\n\n\n", 1)[0]
    for answer in (written(head, find(key).name), None, ...):
        assert grade(key, answer).state == "not started"


@pytest.mark.parametrize(("key", "words"), MISTAKES)
def test_each_known_mistake_fails_and_is_told_by_its_own_words(key: str, words: str) -> None:
    for seed in SEEDS:
        outcome = grade(key, find(key).mistakes[words], seed=seed, seconds=300)
        assert outcome.state == "not yet"
        assert words in outcome.text


@pytest.mark.parametrize(("key", "old", "new", "words"), planted())
def test_a_planted_wrong_answer_is_rejected_with_the_right_hint(key: str, old: str, new: str, words: str) -> None:
    source = solution(key)
    head, _, body = source.rpartition('"""')
    assert old in body, "the solution has changed: plant it anew"
    answer = written(f'{head}"""{body.replace(old, new, 1)}', find(key).name)
    for seed in SEEDS:
        outcome = grade(key, answer, seed=seed, seconds=300)
        assert outcome.state == "not yet"
        assert any(choice in outcome.text for choice in words.split("|")), outcome.text


@pytest.mark.parametrize("key", KEYS)
def test_an_exercise_is_whole(key: str) -> None:
    exercise = find(key)
    assert exercise.hints
    assert len(exercise.mistakes) >= 2
    assert sum(edit[0] == key for edit in planted()) >= 2
    assert stub(key).startswith(f"# EXERCISE {key} ({exercise.minutes} min)\ndef {exercise.name}(")
    assert len(stub(key).splitlines()) <= 25
    assert all(len(line) <= 120 for line in stub(key).splitlines())
    assert [hint(key) for _ in range(len(exercise.hints) + 1)][-1] == exercise.hints[-1]


@pytest.mark.parametrize("key", KEYS)
def test_what_a_constant_gives_never_passes(key: str) -> None:
    exercise = find(key)
    value = exercise.right(*exercise.example)
    assert grade(key, lambda *case: value).state == "not yet"


@pytest.mark.parametrize("lesson", lessons())
def test_the_examples_in_the_stubs_are_true(lesson: str) -> None:
    module = importlib.import_module(f"minituner.camp.solutions.lesson_{lesson}")
    failed, tried = doctest.testmod(module, extraglobs={"np": np})
    assert not failed
    assert tried >= len(exercises(lesson))
