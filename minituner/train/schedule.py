"""The learning rate as a function of the step, and nothing else.

No state means nothing to save: a resumed run, or one with more epochs, reads the right value off the same curve.

    warm-up of w steps: 1/(w+1), 2/(w+1), ... then the peak; w = 0 starts at the peak, so a run of one step learns too

(The ancestor converted warm-up to whole steps and crashed at 0; at 1 it kept the learning rate near zero for the whole
run, and the loss did not move.) Lesson: notebook 07.
"""

from __future__ import annotations

import math

from minituner.recipe import TrainSection


def learning_rate(step: int, total_steps: int, train: TrainSection) -> float:
    """The learning rate of optimizer step `step` (0-based) out of `total_steps`; always above zero."""
    warmup = min(int(train.warmup_ratio * total_steps), total_steps - 1)
    if step < warmup:
        return train.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total_steps - warmup, 1)  # 0 at the peak, below 1 at the last step
    if train.lr_schedule == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if train.lr_schedule == "linear":
        return train.learning_rate * max(1 - done, 0.0)
    return train.learning_rate
