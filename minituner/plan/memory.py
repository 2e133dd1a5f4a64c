"""Memory: what one rank holds at the two moments that can be the worst, part by part.

                     weights  gradients  optimizer  activations  logits  temporary  communication
    in the backward     x      some or      x            x          x        x            x
    at the update       x        all        x                                             x

On a CPU two more belong to a process: the program itself, and fragments that its C library cannot hand back.

What grows with the parameters follows ZeRO's formulas (train/zero_bytes.py) and what this package and DeepSpeed keep
beside them; what grows with the tokens is read off a rehearsal (activations.py). A stage cuts the first three among
the ranks, and never the activations. Lesson: notebook 08.
"""

from __future__ import annotations

from dataclasses import dataclass

from minituner.plan.activations import Paper, Rehearsal
from minituner.train.engines import BUCKET
from minituner.train.zero import PRESETS
from minituner.train.zero_bytes import bytes_held

PARTS = (
    "program",
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "temporary",
    "communication",
    "fragments",
)
STAGES: dict[str, tuple[int, bool]] = {
    "none": (0, False),
    "zero1": (1, False),
    "zero2": (2, False),
    "zero2_offload": (2, True),
    "zero3": (3, False),
    "zero3_offload": (3, True),
}
# Numbers whose gradients travel in one message by our presets, and whose weights stage 3 keeps gathered by default.
REDUCE_BUCKET, MAX_LIVE = PRESETS["zero2"]["reduce_bucket_size"], 1_000_000_000
# Resident before a model is there: Python, torch, transformers, peft, datasets; DeepSpeed and a process group.
# Measured: see the calibration in README.md. On a GPU it lies in main memory, and is not counted.
PROGRAM, PROGRAM_DEEPSPEED = 0.55e9, 0.65e9
# Adapters' small gradients lie scattered among the activations on a CPU, and the C library (glibc) can hand back little
# of what lies between: for each byte of activations so many more stay resident. Measured with 6 and 30 layers and rows
# of 256 and 512 (1.3 to 1.5; 0.8 with rows of 1,024); with MALLOC_MMAP_THRESHOLD_=65536 in the environment they are all
# but gone. Fused layers make less between their gradients: 0.4 to 0.5 with rows of 512, 0.2 with 1,024.
FRAGMENTS, FRAGMENTS_FUSED, FRAGMENTS_FUSED_DEEPSPEED = 1.45, 0.35, 0.45


@dataclass(frozen=True)
class Sizes:
    """What of a model with its method the parameters' share of the memory depends on."""

    parameters: int
    trained: int
    frozen_bytes: float
    trained_size: int
    """Bytes of one trained number: 4, or 2 where the recipe asks for half precision."""
    largest_trained: int
    """Numbers in the largest trained weight."""
    largest_unpacked: float
    """Bytes of the largest quantised weight, made whole for a product."""
    adapters: bool
    """Trained are small matrices beside frozen ones."""
    idle: int
    """Parameters of experts that do not work on a given token."""
    eight_bit: bool
    """The optimizer keeps its averages in 8 bits."""
    fused: bool
    """LoRA's layers are fused (model/fused.py); stage 3 leaves them as they are."""

    @classmethod
    def of(cls, paper: Paper, *, eight_bit: bool, fused: bool) -> Sizes:
        """Of a model on paper."""
        trained = paper.trained
        return cls(
            parameters=paper.base_parameters + (0 if paper.method.name == "full" else sum(p.numel() for p in trained)),
            trained=sum(p.numel() for p in trained),
            frozen_bytes=paper.frozen_bytes,
            trained_size=max(p.element_size() for p in trained),
            largest_trained=max(p.numel() for p in trained),
            largest_unpacked=float(max((layer.weight.nbytes for layer in paper.quantised), default=0)),
            adapters=paper.method.name != "full",
            idle=paper.idle_parameters,
            eight_bit=eight_bit,
            fused=fused,
        )


def rank_bytes(
    sizes: Sizes, step: Rehearsal, stage: str, world_size: int, *, gradients_there: bool, device: str
) -> dict[str, float]:
    """Bytes that one rank has on its device at its worst moment, by `PARTS`.

    Args:
        step: the rehearsal of one micro-batch.
        stage: a key of `STAGES`.
        gradients_there: it was rehearsed with the gradients of an earlier micro-batch there.
        device: "cpu" or "cuda"; offloading moves nothing on a CPU, and a GPU holds no program.
    """
    number, offload = STAGES[stage]
    on_cpu, moved = device == "cpu", offload and device == "cuda"
    fixed = _fixed(sizes, number, moved, world_size)
    fixed["program"] = (PROGRAM_DEEPSPEED if number else PROGRAM) if on_cpu else 0.0
    whole = float(sizes.trained * sizes.trained_size)
    backward, update = dict(fixed), dict(fixed)
    if number == 0:
        backward["gradients"] = whole if gradients_there else float(step.peak["gradients"])
        update["gradients"] = whole
        if world_size > 1:
            update["communication"] = 4.0 * min(max(BUCKET, sizes.largest_trained), sizes.trained)
    else:
        kept = 0.0 if moved else bytes_held(sizes.trained, world_size, number)["gradients"]
        # Gradients are laid into one bucket as they appear; on a GPU all of it is taken at once.
        bucket = sizes.trained_size * float(min(REDUCE_BUCKET, sizes.trained) if on_cpu else REDUCE_BUCKET)
        backward["gradients"] = update["gradients"] = kept
        backward["communication"] = update["communication"] = bucket
    for part in ("activations", "logits", "temporary"):
        backward[part] = float(step.peak[part])
    backward["temporary"] = max(backward["temporary"], sizes.largest_unpacked)
    if on_cpu:
        # The C library keeps what activations gave back (pieces below 32 MB) for more of their kind; gradients and
        # messages come on top of them, and the two moments are one.
        # So it is with what only passes through: gradients before they are cut, and weights that stage 3 gathers for
        # the forward pass and again for the backward pass.
        passing = whole * (number > 0)
        passing += (sizes.frozen_bytes + whole) * _live(sizes) * (number == 3)
        fused = FRAGMENTS_FUSED_DEEPSPEED if number else FRAGMENTS_FUSED
        scattered = fused if sizes.fused and number < 3 else FRAGMENTS
        backward["fragments"] = passing + scattered * step.peak["activations"] * sizes.adapters
        return {part: max(backward.get(part, 0.0), update.get(part, 0.0)) for part in PARTS}
    worst = max(backward, update, key=lambda parts: sum(parts.values()))
    return {part: worst.get(part, 0.0) for part in PARTS}


def host_bytes(sizes: Sizes, stage: str, world_size: int) -> float:
    """Bytes in main memory that offloading takes there, for each rank."""
    number, offload = STAGES[stage]
    if not offload:
        return 0.0
    moved = 16.0 * sizes.trained / world_size  # own copy, two averages, summed gradients
    weights = sizes.frozen_bytes + sizes.trained * sizes.trained_size
    return moved + (weights / world_size if number == 3 else 0.0)


def _fixed(sizes: Sizes, number: int, offload: bool, world_size: int) -> dict[str, float]:
    """What is there at every moment of a step."""
    weights = sizes.frozen_bytes + sizes.trained * float(sizes.trained_size)
    if number == 0:
        each = 2.0 + 2 * 4 / 256 if sizes.eight_bit else 2.0 * sizes.trained_size
        return {"weights": weights, "optimizer": each * sizes.trained}
    # Beside AdamW's averages DeepSpeed keeps a float32 copy of what this rank updates.
    optimizer = bytes_held(sizes.trained, world_size, number)["optimizer"] + 4.0 * sizes.trained / world_size
    if number == 3:
        weights = weights / world_size * (not offload) + weights * _live(sizes)
    return {"weights": weights, "optimizer": 0.0 if offload else optimizer}


def _live(sizes: Sizes) -> float:
    """The share of the weights that stage 3 has gathered at a time."""
    return min(1.0, MAX_LIVE / sizes.parameters)
