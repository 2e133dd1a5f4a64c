"""Evaluation: the loss on records that are never trained on.

    train loss   falls, and falls        eval_loss   falls, then rises: from there on the model learns by heart

    step 0     step 100     step 200     end
    eval       eval         eval         eval        every `evaluate.every_steps`, and at both ends

It is one number over all held-out tokens, and all ranks: the sum of losses divided by the supervised tokens, never a
mean of means. The model is in eval mode (no dropout) and the random generators are put back, so a run with evaluation
trains bit for bit as one without. A request to stop is seen after each micro-batch. Lesson: notebook 07.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from minituner.errors import StoppedEarly
from minituner.model.loss import loss_sum
from minituner.train.feed import Feed
from minituner.train.preempt import StopRequest

if TYPE_CHECKING:
    from minituner.train.run import Run


@dataclass(frozen=True)
class Measured:
    """A loss over `supervised_tokens`, or, where the ranks were asked to stop meanwhile, the exit status for that."""

    eval_loss: float = 0.0
    supervised_tokens: int = 0
    stopping: int = 0


class Evaluation:
    """Measures a run's held-out loss when it is due; does nothing where nothing is held out."""

    def __init__(self, run: Run, stop: StopRequest) -> None:
        self.run, self.stop = run, stop
        held_out = run.prepared.held_out
        self.feed = Feed(held_out, _in_order(run.recipe), run.engine.rank, run.engine.world_size) if held_out else None
        if self.feed is not None:
            self.feed.cut_tails, self.feed.share_prefixes = run.feed.cut_tails, run.feed.share_prefixes

    def due(self) -> bool:
        """Whether to measure after this step."""
        run, every = self.run, self.run.recipe.evaluate.every_steps
        return self.feed is not None and (run.step == run.total_steps or bool(every and run.step % every == 0))

    def measure(self) -> Measured:
        """The loss of the model as it is now; every rank calls it."""
        engine, losses, supervised = self.run.engine, 0.0, 0.0
        if self.feed is None:
            return Measured()
        with untouched(engine.model):
            for number in range(self.feed.steps_per_epoch):
                (batch,) = self.feed.window(number, lambda batch: batch.to(engine.device))
                loss = loss_sum(engine.model, batch, self.run.attention, self.run.head).item()
                loss, count, *votes = engine.all_sums([loss, batch.supervised_tokens, *self.stop.votes()])
                losses, supervised = losses + loss, supervised + count
                if stopping := self.stop.decide(votes):
                    return Measured(stopping=stopping)
        return Measured(losses / max(supervised, 1), int(supervised))

    def before_the_first_step(self) -> Measured:
        """The same, where there is nothing yet that a stop would have to save.

        Raises:
            StoppedEarly: a rank was asked to stop.
        """
        measured = self.measure()
        if measured.stopping:
            error = StoppedEarly(
                "stopped before the first step; nothing had to be saved", fix="start the same command again"
            )
            error.exit_code, error.said_elsewhere = measured.stopping, not self.run.is_main
            raise error
        return measured


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Within: no dropout, no gradients. After it the model's mode and all random generators are as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):  # no_grad as a decorator would end at the yield
            yield
    finally:
        model.train(was_training)


def _in_order(recipe: Any) -> Any:
    """The recipe of a feed that gives each pack once, one micro-batch after the other."""
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"gradient_accumulation_steps": 1, "num_epochs": 1.0}),
            "data": recipe.data.model_copy(update={"shuffle": False}),
        }
    )
