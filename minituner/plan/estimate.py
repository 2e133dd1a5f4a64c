"""The estimate: what a run will hold and how long it will take, before anything is spent on it.

    estimate("smollm2_135m_instruct_lora_alpaca_e3", gpus=8, card="a100-80gb")

      parameters   -> trained, frozen             config.json and the method, on torch's meta device
      memory       -> parts, per rank and stage   formulas (memory.py) and a rehearsal without memory (activations.py)
      work         -> steps, tokens, FLOPs        the prepared packs (workload.py) and the model's products (flops.py)
      time         -> seconds                     FLOPs over a rate: three real steps, or the most a card can do
      does it fit? -> the cheapest change         tried on paper, one after the other (remedies.py)

Weights are never loaded. A time without a probe is a lower bound and says so. Lesson: notebook 08.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minituner.errors import UsageError
from minituner.plan.cards import Card, find_card, parse_bytes
from minituner.plan.memory import STAGES, Sizes, host_bytes, rank_bytes
from minituner.plan.workload import Row, Workload, config_folder, workload_of
from minituner.recipe import Recipe

HEADROOM = 0.9  # of a device's memory: the rest is for CUDA's own context, workspaces of kernels, fragments
USUAL_SHARE = 0.4  # of a card's data sheet, that well-set-up training reaches; an assumption, and said to be one


@dataclass(frozen=True)
class Change:
    """A change that was tried on paper: what it costs, the settings, and the memory it leads to."""

    name: str
    cost: str
    overrides: tuple[str, ...]
    peak_bytes: float
    fits: bool


@dataclass(frozen=True)
class Estimate:
    """What a recipe needs; prints as a table, `values` holds the same for programs."""

    recipe: Recipe = field(repr=False)
    device: str
    card: str | None
    world_size: int
    stage: str
    dtype: str
    parameters: int
    trained: int
    active: int
    """Parameters that work on one token: all, but for a mixture of experts."""
    parts: dict[str, float]
    host: float
    stages: dict[str, dict[str, float]]
    limit: float | None
    row: Row
    workload: Workload
    flops: float | None
    rate: float | None
    rate_from: str
    seconds: float | None
    least: bool
    """`seconds` is a lower bound."""
    changes: tuple[Change, ...]
    probe: Any = None
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> float:
        """The most that one rank holds on its device."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """Whether that fits with some headroom; None where no limit is known."""
        return None if self.limit is None else self.peak_bytes <= HEADROOM * self.limit

    @property
    def cheapest(self) -> Change | None:
        """The first change that makes it fit."""
        return next((change for change in self.changes if change.fits), None)

    @property
    def values(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        from minituner.plan.estimate_text import values_of

        return values_of(self)

    def lines(self) -> list[str]:
        """Everything as text."""
        from minituner.plan.estimate_text import lines_of

        return lines_of(self)

    def __repr__(self) -> str:
        return "\n".join(self.lines())


def estimate(
    recipe: Recipe | str | Path,
    *,
    gpus: int | None = None,
    nodes: int = 1,
    gpu_memory: str | int | None = None,
    card: str | None = None,
    device: str | None = None,
    probe: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Estimate:
    """Plan a run of this recipe; what `minituner estimate` prints.

    Args:
        gpus: devices of one node (ranks on a CPU); default 1.
        gpu_memory: `24GB` (24e9 bytes) or `24GiB`; default the card's, or this machine's.
        card: a GPU by name (plan/cards.py), for a plan made elsewhere.
        device: "cpu" or "cuda"; default a GPU if anything above speaks of one, else this machine's.
        probe: run three real steps on this machine, and take its rate.

    Raises:
        UsageError: settings that contradict each other. SourceError: the model's config cannot be had.
    """
    from minituner.plan.remedies import QUANTIZED, fewer_passes, remedies

    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    chosen = find_card(card) if card else None
    device = _device(device, gpus, nodes, gpu_memory, chosen, probe)
    world_size = (gpus or 1) * nodes
    _check(recipe, world_size, gpus, nodes)
    if gpu_memory is not None:
        limit: float | None = parse_bytes(gpu_memory)
    else:
        limit = chosen.memory_bytes if chosen else _own_memory(device, world_size)
    folder = config_folder(recipe, say)
    plans = Plans(folder, device, chosen, world_size)
    work = workload_of(recipe, folder, world_size, say)
    stage = _stage(recipe)
    parts, host = plans.parts(recipe, work.fullest, stage), plans.host(recipe, stage)
    names = list(STAGES) if world_size > 1 and recipe.train.optimizer == "adamw" else [stage]
    if recipe.method.name in QUANTIZED:
        names = [name for name in names if not name.startswith("zero3")]
    stages = {name: plans.parts(recipe, work.fullest, name) for name in names}
    # A probe's rate is in model FLOPs, which do not count what is computed twice; a card's counts every operation.
    sizes, flops = plans.sizes(recipe), plans.flops(recipe, work, recompute=not probe)
    seen = None
    if probe:
        from minituner.plan.probe import real_steps

        seen = real_steps(recipe, world_size=world_size)
    rate, rate_from, least = _rate(plans, recipe, chosen, device, world_size, seen)
    changes = ()
    if limit is not None and sum(parts.values()) > HEADROOM * limit:
        changes = remedies(plans, recipe, work.fullest, HEADROOM * limit)
    notes = [work.note] if work.note else []
    if limit is not None:
        notes += fewer_passes(plans, recipe, work.fullest, HEADROOM * limit)
    if sizes.idle and recipe.method.name in QUANTIZED:
        notes.append(
            f"{recipe.method.name} quantises linear layers; a mixture's experts are stacks, and stay as they are"
        )
    if device == "cuda":
        notes.append("GPU memory is predicted and was not measured: kernels keep a little less than counted here")
    return Estimate(
        recipe=recipe,
        device=device,
        card=chosen.name if chosen else None,
        world_size=world_size,
        stage=stage,
        dtype=plans.dtype_name(recipe),
        parameters=sizes.parameters,
        trained=sizes.trained,
        active=sizes.parameters - sizes.idle,
        parts=parts,
        host=host,
        stages=stages,
        limit=limit,
        row=work.fullest,
        workload=work,
        flops=flops,
        rate=rate,
        rate_from=rate_from,
        seconds=flops / rate if flops and rate else None,
        least=least,
        changes=changes,
        probe=seen,
        notes=tuple(notes),
    )


class Plans:
    """Memory of one model under changing settings; each model and rehearsal is made once."""

    def __init__(self, folder: Path, device: str, card: Card | None, world_size: int) -> None:
        self.folder, self.device, self.card, self.world_size = folder, device, card, world_size
        self._papers: dict[Any, Any] = {}
        self._rehearsals: dict[Any, Any] = {}

    def dtype_name(self, recipe: Recipe) -> str:
        """The type of the weights (of quantised ones, what they are computed in), as `load_model` chooses it."""
        name = recipe.model.dtype
        if name != "auto":
            return name
        if recipe.method.name == "full":
            return "float32"
        if self.device == "cuda":
            return "bfloat16" if self.card is None or self.card.bfloat16 else "float32"
        from minituner.model.loading import resolve_dtype

        return str(resolve_dtype("auto", "cpu")[0]).removeprefix("torch.")

    def parts(self, recipe: Recipe, row: Row, stage: str) -> dict[str, float]:
        """Bytes that one rank holds at its worst moment."""
        number = STAGES[stage][0]
        # On a CPU freed memory is not there for gradients (memory.py); ZeRO takes them away as they appear.
        there = self.device == "cpu" or number > 0 or recipe.train.gradient_accumulation_steps > 1
        shared = recipe.distributed.sequence_parallel_size
        piece = Row(_shared(row.seq_lens, shared), -(-row.supervised // shared))
        step = self._rehearse(recipe, piece, there, number == 3)
        return rank_bytes(self.sizes(recipe), step, stage, self.world_size, gradients_there=there, device=self.device)

    def host(self, recipe: Recipe, stage: str) -> float:
        """Bytes of main memory that a rank's offloading takes."""
        return host_bytes(self.sizes(recipe), stage, self.world_size) if self.device == "cuda" else 0.0

    def sizes(self, recipe: Recipe) -> Sizes:
        """Parameters and bytes of the model with its method."""
        fused = "lora" in recipe.train.fused and not recipe.method.use_dora and not recipe.method.lora_dropout
        return Sizes.of(self._paper(recipe), eight_bit=recipe.train.optimizer == "adamw_8bit", fused=fused)

    def flops(self, recipe: Recipe, work: Workload, *, recompute: bool) -> float | None:
        """Model FLOPs of the whole run; with `recompute`, also what activation checkpointing does a second time."""
        if work.tokens is None:
            return None
        recompute = recompute and recipe.train.activation_checkpointing
        fewer = self._computes_fewer(recipe)
        tokens, pairs = (work.computed, work.computed_pairs) if fewer else (work.tokens, work.pairs)
        return self._paper(recipe).flops.of(tokens, work.supervised, pairs, recompute=recompute)

    def _computes_fewer(self, recipe: Recipe) -> bool:
        """Whether a run would share prefixes; on a GPU that is the kernel's matter, and the plan counts every token."""
        packed = recipe.data.packing != "none" or recipe.train.per_device_batch_size > 1
        alike = not recipe.method.lora_dropout and recipe.data.isolate_documents
        whole = recipe.distributed.sequence_parallel_size == 1
        return self.device == "cpu" and recipe.train.share_prefixes and packed and alike and whole

    def _paper(self, recipe: Recipe) -> Any:
        import torch

        from minituner.plan.activations import Paper

        dtype = self.dtype_name(recipe)
        whole = not (recipe.distributed.zero or "").startswith("zero3")
        fused = tuple(recipe.train.fused) if whole else ()
        key = (recipe.method.model_dump_json(), recipe.train.activation_checkpointing, dtype, fused)
        if key not in self._papers:
            self._papers[key] = Paper(self.folder, recipe, getattr(torch, dtype))
        return self._papers[key]

    def _rehearse(self, recipe: Recipe, row: Row, there: bool, whole: bool) -> Any:
        paper = self._paper(recipe)
        key = (id(paper), row, there, whole)
        if key not in self._rehearsals:
            self._rehearsals[key] = paper.rehearse(
                row.seq_lens, row.supervised, gradients_there=there, whole_logits=whole
            )
        return self._rehearsals[key]


def _shared(seq_lens: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """A rank's share of a row: with all-to-all attention it holds that part of every activation."""
    if ranks == 1:
        return seq_lens
    total, out = -(-sum(seq_lens) // ranks), []
    for length in seq_lens:
        if total > 0:
            out.append(min(length, total))
            total -= length
    return tuple(out)


def _stage(recipe: Recipe) -> str:
    zero = recipe.distributed.zero
    if zero is None:
        return "none"
    if zero in STAGES:
        return zero
    from minituner.train.zero import stage_of

    return f"zero{stage_of(recipe)}"  # of a DeepSpeed JSON the stage counts; its bucket sizes are taken as default


def _device(device: str | None, gpus: int | None, nodes: int, memory: Any, card: Card | None, probe: bool) -> str:
    from minituner.model.loading import device_of_this_machine

    own = device_of_this_machine()
    if device is None:
        device = "cuda" if gpus or nodes > 1 or memory is not None or card else own
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r} is unknown", fix="cpu or cuda")
    if probe and (device != own or card is not None or nodes > 1):
        raise UsageError(
            "a probe runs on this machine, and the plan is for another one",
            why=f"here is {'a GPU' if own == 'cuda' else 'no GPU'}; the plan speaks of {card.name if card else device}",
            fix="leave --probe out, or plan for this machine (no --card, --gpus, --gpu-memory, --nodes)",
        )
    return device


def _check(recipe: Recipe, world_size: int, gpus: int | None, nodes: int) -> None:
    if (gpus or 1) < 1 or nodes < 1:
        raise UsageError(f"gpus={gpus}, nodes={nodes} must be at least 1")
    shared = recipe.distributed.sequence_parallel_size
    if world_size % shared:
        raise UsageError(
            f"distributed.sequence_parallel_size={shared} does not divide {world_size} ranks",
            fix=f"--gpus {shared}, or distributed.sequence_parallel_size=1",
        )


def _own_memory(device: str, world_size: int) -> float | None:
    """What this machine has for each rank; None for a GPU that is not here."""
    if device == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    import psutil

    return psutil.virtual_memory().total / world_size


def _rate(
    plans: Plans, recipe: Recipe, card: Card | None, device: str, world_size: int, seen: Any
) -> tuple[float | None, str, bool]:
    """FLOP/s of all ranks together, where the number is from, and whether it is only the most there can be."""
    if seen is not None:
        return seen.flops_per_second, f"{len(seen.seconds)} real steps on this machine", False
    if card is not None:
        share = f"{USUAL_SHARE:.0%} of {card.name}'s data sheet, an assumption"
        return card.peak_flops * USUAL_SHARE * world_size, share, False
    from minituner.model.loading import device_of_this_machine

    if device != device_of_this_machine():
        return None, "not known: name the card (--card)", False
    import torch

    from minituner.plan.flops import gemm_rate

    name = plans.dtype_name(recipe)
    rate = gemm_rate(getattr(torch, name), device) * (world_size if device == "cuda" else 1)
    return rate, "a large matrix product on this machine, which training does not reach (--probe measures)", True
