"""The estimate for people (lines) and for programs (plain values).

    memory of each rank   weights 15.2 GB, gradients 15.2 GB, optimizer 30.5 GB, ...    = 84.1 GB
    stage          weights   gradients   optimizer   activations   ...       all   fits 24 GB
    * none           ...                                                             no

Lesson: notebook 08.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from minituner.data.ledger import counted
from minituner.plan.memory import PARTS

if TYPE_CHECKING:
    from minituner.plan.estimate import Change, Estimate

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size(number: float) -> str:
    """Bytes in decimal units: `2.15 GB`."""
    factor, name = next(((f, n) for f, n in UNITS if number >= f), (1.0, "B"))
    return f"{number / factor:.3g} {name}" if number / factor < 999.5 else f"{number / factor:,.0f} {name}"


def duration(seconds: float) -> str:
    """Seconds in the largest unit that is not too coarse."""
    if seconds < 120:
        return f"{seconds:.3g} seconds"
    return f"{seconds / 60:.3g} minutes" if seconds < 7200 else f"{seconds / 3600:.3g} hours"


def lines_of(plan: Estimate) -> list[str]:
    """Everything that `minituner estimate` prints."""
    where = plan.card or ("this kind of GPU" if plan.device == "cuda" else "CPU")
    row = plan.row
    out = [
        f"{plan.recipe.name}: {plan.recipe.method.name} on {plan.world_size} x {where}, weights in {plan.dtype}",
        f"parameters     {plan.parameters:,}, of which {plan.trained:,} are trained "
        f"({plan.trained / plan.parameters:.2%})"
        + (f"; {plan.active:,} work on one token" if plan.active < plan.parameters else ""),
        f"micro-batch    {row.tokens:,} tokens at most, {counted(len(row.seq_lens), 'document')}, "
        f"{row.supervised:,} targets",
        *_work(plan),
        "",
        f"memory of one rank at its worst moment: {size(plan.peak_bytes)}",
    ]
    out += [f"  {part:14} {size(number):>8}" for part, number in plan.parts.items() if number]
    if plan.host:
        out.append(f"  and {size(plan.host)} of main memory for each rank (offload)")
    if plan.limit is not None:
        word = "fits" if plan.fits else "does not fit"
        out.append(f"  {word}: {size(plan.limit)} there, of which a tenth is left for what cannot be foreseen")
    if len(plan.stages) > 1:
        out += ["", *_stage_table(plan)]
    if plan.changes:
        out += ["", "what would make it fit, the cheapest first (tried on paper):", *_change_table(plan.changes)]
        best = plan.cheapest
        if best:
            out.append("  next: minituner train RECIPE " + shlex.join(best.overrides))
        else:
            out.append("  none of them is enough: more or larger devices, or a smaller model")
    if plan.probe is not None:
        seen = plan.probe
        out += ["", f"probe: {len(seen.seconds)} steps, measured peak {size(seen.steps_peak_bytes)} while they ran"]
    return [*out, *(f"note: {note}" for note in plan.notes)]


def _work(plan: Estimate) -> list[str]:
    work = plan.workload
    if work.steps is None or plan.flops is None:
        return ["work           not known"]
    out = [
        f"work           {work.steps:,} steps, {work.tokens:,.0f} tokens, {plan.flops:.3g} floating-point operations"
    ]
    if plan.seconds is None:
        return [*out, f"time           {plan.rate_from}"]
    least = "at least " if plan.least else ""
    return [*out, f"time           {least}{duration(plan.seconds)} at {plan.rate / 1e12:.3g} TFLOP/s: {plan.rate_from}"]


def _stage_table(plan: Estimate) -> list[str]:
    parts = [part for part in PARTS if any(row.get(part) for row in plan.stages.values())]
    out = ["  stage         " + "".join(f"{part:>15}" for part in [*parts, "all"])]
    for name, row in plan.stages.items():
        mark = "*" if name == plan.stage else " "
        numbers = [*(row[part] for part in parts), sum(row.values())]
        out.append(f"{mark} {name:14}" + "".join(f"{size(number):>15}" for number in numbers))
    return out


def _change_table(changes: tuple[Change, ...]) -> list[str]:
    return [
        f"  {change.name:26} {size(change.peak_bytes):>8}  {'fits' if change.fits else 'no':5} {change.cost:42} "
        f"{' '.join(change.overrides)}"
        for change in changes
    ]


def values_of(plan: Estimate) -> dict[str, Any]:
    """The estimate as plain values; bytes, seconds and FLOPs are numbers without units."""
    work = plan.workload
    return {
        "recipe": plan.recipe.name,
        "method": plan.recipe.method.name,
        "device": plan.device,
        "card": plan.card,
        "world_size": plan.world_size,
        "stage": plan.stage,
        "dtype": plan.dtype,
        "parameters": plan.parameters,
        "trained": plan.trained,
        "active_parameters": plan.active,
        "micro_batch": {
            "tokens": plan.row.tokens,
            "documents": len(plan.row.seq_lens),
            "supervised_tokens": plan.row.supervised,
        },
        "peak_bytes": plan.peak_bytes,
        "parts": plan.parts,
        "host_bytes": plan.host,
        "limit_bytes": plan.limit,
        "fits": plan.fits,
        "stages": plan.stages,
        "steps": work.steps,
        "tokens": work.tokens,
        "supervised_tokens": work.supervised,
        "flops": plan.flops,
        "flops_per_second": plan.rate,
        "rate_from": plan.rate_from,
        "seconds": plan.seconds,
        "seconds_is_a_lower_bound": plan.least,
        "changes": [
            {
                "name": change.name,
                "cost": change.cost,
                "overrides": list(change.overrides),
                "peak_bytes": change.peak_bytes,
                "fits": change.fits,
            }
            for change in plan.changes
        ],
        "probe": None
        if plan.probe is None
        else {
            "seconds": list(plan.probe.seconds),
            "steps_peak_bytes": plan.probe.steps_peak_bytes,
            "flops_per_second": plan.probe.flops_per_second,
        },
        "notes": list(plan.notes),
    }
