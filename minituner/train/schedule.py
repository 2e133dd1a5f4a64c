"""The learning rate as a function of the step, and nothing else.

The curves are transformers' own (`get_scheduler`: cosine, linear, constant), read at a step instead of being walked
along. No state means nothing to save: a resumed run, or one with more epochs, reads the right value off the curve.

    warm-up of w steps: 1/(w+1), 2/(w+1), ... then the peak; w = 0 starts at the peak, so a run of one step learns too

Only the warm-up is read one step further on: transformers' own begins with a rate of 0, so its first step computes a
gradient and changes nothing. From the peak on the values are equal. (The ancestor converted warm-up to whole steps and
crashed at 0; at 1 it kept the learning rate near zero for the whole run, and the loss did not move.)
Lesson: notebook 07.
"""

from __future__ import annotations

from minituner.recipe import TrainSection

NAMES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def learning_rate(step: int, total_steps: int, train: TrainSection) -> float:
    """The learning rate of optimizer step `step` (0-based) out of `total_steps`; always above zero."""
    warmup = warmup_steps(total_steps, train)
    if step < warmup:
        return train.learning_rate * _curve(train.lr_schedule, step + 1, warmup + 1, total_steps + 1)
    return train.learning_rate * _curve(train.lr_schedule, min(step, total_steps), warmup, total_steps)


def _curve(name: str, step: int, warmup: int, total_steps: int) -> float:
    """transformers' multiplier of the peak at `step`."""
    import torch

    from minituner.model.quantized import import_bitsandbytes

    import_bitsandbytes()  # the next line imports peft, and that bitsandbytes
    from transformers import get_scheduler

    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # it wants an optimizer to drive; only its curve is of use
    scheduler = get_scheduler(NAMES[name], nothing, num_warmup_steps=warmup, num_training_steps=total_steps)
    return scheduler.lr_lambdas[0](step)


def warmup_steps(total_steps: int, train: TrainSection) -> int:
    """How many steps raise the rate; at least one is left for the peak."""
    return min(int(train.warmup_ratio * total_steps), total_steps - 1)
