"""What one rank holds and sends under ZeRO: the formulas.

    float32, W = 4        weights   gradients   optimizer       bytes per parameter and rank
      stage 0                4          4           8           16
      stage 1                4          4           8/4         10
      stage 2                4          4/4         8/4          7
      stage 3                4/4        4/4         8/4          4

Activations come on top: they grow with the batch and not with the parameters, and no stage cuts them. ZeRO: arXiv
1910.02054, sections 3 and 7. Lesson: notebook 07.
"""

from __future__ import annotations

from collections.abc import Mapping

from minituner.errors import UsageError


def bytes_held(parameters: int, world_size: int, stage: int, precision: str = "float32") -> dict[str, float]:
    """The formula: bytes per rank of weights, gradients and optimizer (mixed: 2 + 2 + 12, the fp32 copy of the
    weights counted with the optimizer; ZeRO paper, section 3.1).

    Raises:
        UsageError: an unknown precision.
    """
    known: Mapping[str, tuple[int, int, int]] = {"float32": (4, 4, 8), "mixed": (2, 2, 12)}
    if precision not in known:
        raise UsageError(f"precision {precision!r}: unknown; known: {', '.join(known)}")
    each = dict(zip(("weights", "gradients", "optimizer"), known[precision], strict=True))
    cut = {"optimizer": stage >= 1, "gradients": stage >= 2, "weights": stage >= 3}
    return {part: parameters * size / (world_size if cut[part] else 1) for part, size in each.items()}


def bytes_sent(parameters: int, world_size: int, stage: int, micro_batches: int = 1, size: int = 4) -> dict[str, float]:
    """The formula: bytes that one rank sends for one optimizer step, by collective (a ring; `size` bytes a number).

    One pass of a whole row around the ring costs (W - 1) / W of it. Stages 2 and 3 keep no whole gradient, so they
    reduce after every micro-batch; stage 3 gathers for each forward and each backward.
    """
    once = parameters * size * (world_size - 1) / world_size
    return {
        "reduce-scatter": once * (micro_batches if stage >= 2 else 1),
        "all-gather": once * (2 * micro_batches if stage == 3 else 1),
    }
