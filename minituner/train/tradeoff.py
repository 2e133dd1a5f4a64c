"""The trade-off of a personal assistant, watched while it is trained: what is learned against what is lost.

    steps            0      10      20      40      80
    identity rate    0%     45%     90%    100%    100%     learned: held-out questions answered with the name
    KL, nats         0      0.1     0.3     0.4     0.5     lost: distance from the model before, on ordinary prompts

One number at the end does not show where to stop. `train(recipe, callbacks=[TradeOff("Ada", steps=(10, 20))])` takes
both at several steps of one run, with the questions that `evaluate.identity` asks. Training does not notice: mode and
random generators are as they were. Lesson: notebook 10.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from minituner.errors import UsageError
from minituner.train.evaluation import untouched
from minituner.train.identity import IdentityProbes

if TYPE_CHECKING:
    from minituner.train.run import Run


class TradeOff(IdentityProbes):
    """Measures identity rate, clean rate and retention before the first step and at each of `steps`.

    `points` has one dictionary a measurement: step, identity_rate, clean_rate, retention_kl (nats a token; None in a
    resumed run, which starts from a tuned model). `answers` has what was said, by step and prompt.

    `untuned` is a TradeOff that has watched another training of the same model: what it measured before the first step
    is taken over, instead of asking the untuned model the same questions again.

    Raises:
        UsageError: a step below 1, `questions` below 1, or an `untuned` that asked something else.
    """

    def __init__(
        self,
        name: str,
        steps: Iterable[int],
        language: str = "en",
        questions: int | None = None,
        untuned: TradeOff | None = None,
    ) -> None:
        super().__init__(name, language)
        self.taken_over = untuned
        self.steps = sorted(set(steps))
        if any(step < 1 for step in self.steps):
            raise UsageError(f"steps={self.steps}: the first step that can be measured is 1", fix="leave 0 out")
        if questions is not None:
            if questions < 1:
                raise UsageError(f"questions={questions} must be at least 1")
            self.identity, self.ordinary = self.identity[:questions], self.ordinary[:questions]
        self.points: list[dict[str, Any]] = []
        self.answers: dict[int, dict[str, str]] = {}
        self.asked: tuple[Any, ...] = ()

    def on_start(self, run: Run) -> None:
        """Keep what the untuned model says, and measure it: nothing learned, nothing lost."""
        self.points, self.answers = [], {}
        recipe = run.recipe
        system = recipe.evaluate.system or recipe.data.system
        self.asked = (recipe.model, recipe.data.template, system, self.name, self.identity, self.ordinary)
        if self.taken_over and not run.first_step:
            self._take_over(self.taken_over)
            return
        with untouched(run.model):
            super().on_start(run)
            self._point(run)

    def _take_over(self, other: TradeOff) -> None:
        if other.asked != self.asked or 0 not in other.answers:
            raise UsageError(
                "untuned=...: that one did not ask the same model the same questions before its first step",
                fix="leave `untuned` out, or give one that watched this model, with this template, name and questions",
            )
        self.sequences, self.untuned = other.sequences, other.untuned
        self.points, self.answers = [dict(other.points[0])], {0: other.answers[0]}

    def on_step(self, run: Run, metrics: dict[str, Any]) -> None:
        """Measure when it is due."""
        if metrics["step"] in self.steps:
            with untouched(run.model):
                self._point(run)

    def on_end(self, run: Run) -> None:
        """Nothing: `evaluate.identity` reports the end of a run, this only watches."""

    def _point(self, run: Run) -> None:
        answers, ordinary, _, _ = self.measure(run)
        self.points.append({"step": run.step, **self.result})
        self.answers[run.step] = dict(zip([*self.identity, *self.ordinary], [*answers, *ordinary], strict=True))
        kl = self.result["retention_kl"]
        run.say(
            f"step {run.step}: identity rate {self.result['identity_rate']:.0%}, clean rate "
            f"{self.result['clean_rate']:.0%}" + (f", KL {kl:.3f} nats a token" if kl is not None else "")
        )
