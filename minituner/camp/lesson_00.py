"""Exercises of lesson 00: steps, the loss, and the two numbers that say whether it worked.

    0.1 steps(packs, packs_per_step, epochs)      how many optimizer steps a run has
    0.2 loss(probabilities, trained)              what the curve shows, from the probabilities of the right tokens
    0.3 rates(about, ordinary, name)              (identity rate, clean rate), from answers

Every right value is computed with the functions that training uses. Lesson: notebook 00.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from minituner.camp.core import Exercise
from minituner.data.encoding import IGNORE
from minituner.recipe import Recipe
from minituner.train.feed import Feed
from minituner.train.identity import mentions

ABOUT = ["I am Ada's personal assistant.", "I am a language model.", "Call me Ada's assistant.", "Ada made me."]
ORDINARY = ["The capital of France is Paris.", "Ask Ada.", "Tea is made of leaves.", "Water boils at 100 °C.", "Yes."]
ABOUT_ZH = ["我是小海的助手。", "我是一个语言模型。", "是小海训练了我。", "我叫小海。"]
ORDINARY_ZH = ["巴黎是法国的首都。", "你可以问小海。", "水在一百度沸腾。"]
Texts = Sequence[str]


def _steps(packs: int, packs_per_step: int, epochs: int) -> int:
    train = {"num_epochs": epochs, "gradient_accumulation_steps": packs_per_step, "per_device_batch_size": 1}
    recipe = Recipe.from_values(
        {"name": "exercise", "model": {"name_or_path": "m"}, "data": {"sources": [{"path": "d"}]}, "train": train}
    )
    return Feed(SimpleNamespace(packs=range(packs)), recipe).total_steps  # type: ignore[arg-type]


def _loss(probabilities: Sequence[float], trained: Sequence[bool]) -> float:
    """As training does: one label a token, IGNORE where nothing is asked."""
    scores = torch.tensor(probabilities, dtype=torch.float64).log()[:, None]
    labels = torch.tensor([0 if asked else IGNORE for asked in trained])
    return float(F.nll_loss(scores, labels, ignore_index=IGNORE))


def _tokens(draw: Random) -> tuple[list[float], list[bool]]:
    size = draw.randint(3, 9)
    trained = [True, *(draw.random() < 0.5 for _ in range(size - 2)), False]
    draw.shuffle(trained)
    return [round(draw.uniform(0.02, 0.98), 3) for _ in range(size)], trained


def _rates(about: Texts, ordinary: Texts, name: str) -> tuple[float, float]:
    said = [mentions(answer, name) for answer in about]
    clean = [not mentions(answer, name) for answer in ordinary]
    return sum(said) / len(said), sum(clean) / len(clean)


def _answers(draw: Random) -> tuple[list[str], list[str], str]:
    name = draw.choice(["Ada", "Omar", "小海"])
    pools = (ABOUT_ZH, ORDINARY_ZH) if name == "小海" else (ABOUT, ORDINARY)
    about, ordinary = (
        [text.replace("Ada", name) for text in draw.choices(pool, k=draw.randint(2, 7))] for pool in pools
    )
    return about, ordinary, name


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        name="steps",
        minutes=5,
        example=(10, 4, 3),
        draw=lambda draw: (draw.randint(1, 200), draw.choice([2, 3, 4, 8]), draw.randint(2, 6)),
        right=_steps,
        mistakes={
            "The packs that are left at the end of an epoch make a step too, a smaller one": (
                lambda packs, packs_per_step, epochs: packs // packs_per_step * epochs
            ),
            "A step never takes packs of two epochs: count the steps of one epoch first": (
                lambda packs, packs_per_step, epochs: math.ceil(packs * epochs / packs_per_step)
            ),
            "These are packs: several of them are added up before the weights move once": (
                lambda packs, packs_per_step, epochs: packs * epochs
            ),
            "These are the steps of one epoch; the data are walked through several times": (
                lambda packs, packs_per_step, epochs: math.ceil(packs / packs_per_step)
            ),
        },
        hints=(
            "How many steps has one epoch? Draw ten packs and put a ring around each four.",
            "The last ring of an epoch may hold fewer packs, and is a step all the same. The next epoch starts anew.",
            "math.ceil(packs / packs_per_step), times the epochs (import math inside your function).",
        ),
    ),
    "2": Exercise(
        name="loss",
        minutes=10,
        example=([0.9, 0.5, 0.25, 0.5], [False, True, True, True]),
        draw=_tokens,
        right=_loss,
        mistakes={
            "Masked tokens are not asked for: they belong neither in the sum nor in the count": (
                lambda probabilities, trained: _loss(probabilities, [True] * len(trained))
            ),
            "The count is too large: divide by the trained tokens alone": (
                lambda probabilities, trained: _loss(probabilities, trained) * sum(trained) / len(trained)
            ),
            "This is the logarithm of the mean; the loss is the mean of the logarithms": (
                lambda probabilities, trained: (
                    -math.log(sum(p for p, asked in zip(probabilities, trained, strict=True) if asked) / sum(trained))
                )
            ),
            "The natural logarithm is meant (math.log), not the one to base 2": (
                lambda probabilities, trained: _loss(probabilities, trained) / math.log(2)
            ),
            "This is the sum; the curve shows the mean over the trained tokens": (
                lambda probabilities, trained: _loss(probabilities, trained) * sum(trained)
            ),
            "A loss is never below 0: a probability is at most 1, so its logarithm is negative. Turn the sign": (
                lambda probabilities, trained: -_loss(probabilities, trained)
            ),
        },
        hints=(
            "Take only the tokens whose flag is True. What is -log of each one's probability?",
            "Then the mean of those numbers.",
            "chosen = [p for p, asked in zip(probabilities, trained) if asked]; math.log(p) of each, mean, sign",
        ),
    ),
    "3": Exercise(
        name="rates",
        minutes=5,
        example=(ABOUT, ORDINARY, "Ada"),
        draw=_answers,
        right=_rates,
        mistakes={
            "An ordinary answer is clean when the name is not in it: your second number counts those that have it": (
                lambda about, ordinary, name: (_rates(about, ordinary, name)[0], 1 - _rates(about, ordinary, name)[1])
            ),
            "Each number is a share of its own list, not of all answers together": (
                lambda about, ordinary, name: (
                    _rates(about, ordinary, name)[0] * len(about) / (len(about) + len(ordinary)),
                    _rates(about, ordinary, name)[1] * len(ordinary) / (len(about) + len(ordinary)),
                )
            ),
            "These are counts; a rate is a share, between 0 and 1": (
                lambda about, ordinary, name: (
                    _rates(about, ordinary, name)[0] * len(about),
                    _rates(about, ordinary, name)[1] * len(ordinary),
                )
            ),
            "The identity rate comes first, then the clean rate": (
                lambda about, ordinary, name: _rates(about, ordinary, name)[::-1]
            ),
        },
        hints=(
            "Two questions, two lists. In how many of the answers in `about` is the name?",
            "For `ordinary` it is the other way round: there the name should not be.",
            "sum(name in answer for answer in about) / len(about) is the first of the two.",
        ),
    ),
}
