"""The faults of a step: a mean of means, and a learning rate that never warms up.

    micro-batches of 300 and 20 supervised tokens, losses summed to 450 and 60

    right            (450 + 60) / 320          = 1.594      every token weighs 1/320
    mean of means    (450 / 300 + 60 / 20) / 2 = 2.250      a token of the short one weighs 15 times as much

    warm-up          1e-5  1e-5  1e-5 ...                   of the recipe's rate: the warm-up's first value, for good

Lessons: notebooks 05 and 07.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minituner.errors import UsageError
from minituner.museum.injection import Injection, part, replaced
from minituner.museum.seen import Seen, in_float32, ready
from minituner.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from minituner.data.collate import Batch
    from minituner.train.run import Run

FROZEN = 1e-5  # where XTuner's linear warm-up starts, as a share of the rate; a warm-up of one step stays there
CLOSE = 1e-4  # relative: how far two float32 sums of the same gradients may lie apart


@contextmanager
def mean_of_means(injection: Injection) -> Iterator[None]:
    """Within: each micro-batch's loss is a mean over its own tokens; a step, the mean of these over all ranks."""
    loop = part("train.loop")
    run_steps, loss_sum = loop.run_steps, loop.loss_sum

    def steps(run: Run, *arguments: Any) -> None:
        window_of = run.feed.window
        share = {"supervised": 0.0, "micro_batches": 1.0}

        def window(step: int, *to_device: Callable[[Batch], Batch]) -> list[Batch]:
            batches = window_of(step, *to_device)
            counts = [batch.supervised_tokens for batch in batches]
            share["supervised"], share["micro_batches"] = run.engine.all_sums([sum(counts), len(batches)])
            injection.acted += len(set(counts)) > 1 or run.engine.world_size > 1
            return batches

        def loss_of(model: Any, batch: Batch, *rest: Any) -> torch.Tensor:
            # The loop divides by all supervised tokens; what is left then is this batch's mean over micro-batches.
            own = max(batch.supervised_tokens, 1)
            return loss_sum(model, batch, *rest) * (share["supervised"] / share["micro_batches"] / own)

        with replaced(run.feed, window=window), replaced(loop, loss_sum=loss_of):
            run_steps(run, *arguments)

    with replaced(loop, run_steps=steps):
        yield


@contextmanager
def frozen_warm_up(injection: Injection) -> Iterator[None]:
    """Within: every learning rate is FROZEN of what it should be."""
    loop = part("train.loop")
    learning_rate = loop.learning_rate

    def frozen(*arguments: Any) -> float:
        injection.acted += 1
        return FROZEN * learning_rate(*arguments)

    with replaced(loop, learning_rate=frozen):
        yield


def see_mean_of_means(recipe: Recipe, scratch: Path) -> Seen:
    """The first step as the loop makes it, and the same packs as one big batch: loss and gradient norm."""
    from torch.nn.utils import clip_grad_norm_

    from minituner.data.collate import collate
    from minituner.model.loss import loss_sum

    recipe = in_float32(recipe)
    step = one_step(recipe, scratch / "run")
    run = ready(recipe, scratch)
    packs = [run.prepared.documents(number) for numbers in run.feed.packs(0) for number in numbers]
    whole = collate(packs, isolate=recipe.data.isolate_documents).to(run.engine.device)
    loss = loss_sum(run.engine.model, whole, run.attention, run.head) / max(whole.supervised_tokens, 1)
    run.engine.backward(loss)
    norm = float(clip_grad_norm_((p for p in run.model.parameters() if p.grad is not None), float("inf")))
    run.engine.close()
    wanted = {"loss": float(loss.detach()), "grad_norm": norm}
    passes = all(abs(step[key] - value) <= CLOSE * abs(value) for key, value in wanted.items())
    says = f"first step: loss {step['loss']:.6f}, gradient norm {step['grad_norm']:.6f}; "
    says += f"as one big batch: {wanted['loss']:.6f}, {norm:.6f}"
    return Seen(passes, says, {"step": {key: step[key] for key in wanted}, "big_batch": wanted})


def see_frozen_warm_up(recipe: Recipe, scratch: Path) -> Seen:
    """The highest learning rate of the run against the recipe's, as metrics.jsonl has them."""
    from minituner.train.loop import learning_rate  # the loop's own name for it: what a run will use
    from minituner.train.schedule import warmup_steps

    run = ready(recipe, scratch)
    run.engine.close()
    # The peak comes first after the warm-up; a run's length costs nothing here.
    step = min(warmup_steps(run.total_steps, recipe.train), run.total_steps - 1)
    used = learning_rate(step, run.total_steps, recipe.train)
    says = f"highest learning rate of the run {used:.3g}, in the recipe {recipe.train.learning_rate:.3g}"
    return Seen(used > 0.5 * recipe.train.learning_rate, says, {"used": used, "recipe": recipe.train.learning_rate})


def one_step(recipe: Recipe, work_dir: Path) -> dict[str, Any]:
    """The metrics of the first optimizer step of a recipe, which the real loop makes.

    Raises:
        UsageError: several ranks share a row, which one process cannot play.
    """
    from minituner.train.loop import train

    if recipe.distributed.sequence_parallel_size > 1:
        raise UsageError("one process cannot make a step of distributed.sequence_parallel_size > 1")
    short = recipe.model_copy(deep=True)
    short.train.max_steps, short.evaluate.prompts, short.evaluate.identity = 1, [], None
    return train(short, work_dir, progress=False, say=lambda line: None).metrics[0]
