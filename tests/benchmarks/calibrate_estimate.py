"""How good is the plan? Predicted against measured peak memory, for each method and ZeRO stage, on this machine's CPU.

    python tests/benchmarks/calibrate_estimate.py --out calibration.json
    python tests/benchmarks/calibrate_estimate.py --measured calibration.json      predict anew, measure nothing

Each combination runs 3 steps of the embedded model over packs of 512 tokens, in fresh processes: one, or two gloo ranks
with ZeRO. Memory is what the system says of the process with the most; seconds are worth what the machine is idle.
It is not a test: it takes many minutes, and needs 8 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMBINATIONS = [
    (method, zero)
    for zero in (None, "zero2", "zero3")
    for method in ("full", "lora", "qlora")
    if (method, zero) != ("qlora", "zero3")  # refused: stage 3 cuts quantised weights away from their scales
]


def recipe_of(method: str, zero: str | None, data: Path) -> Any:
    """The recipe of one combination."""
    from minituner import Recipe

    return Recipe.from_values(
        {
            "name": "calibration",
            "model": {"name_or_path": "smollm2-135m-instruct", "dtype": "float32"},
            "method": {"name": method},
            "data": {"sources": [{"path": str(data), "format": "alpaca"}], "max_length": 512},
            "train": {"gradient_accumulation_steps": 1, "num_epochs": 1, "learning_rate": 1e-5},
            "distributed": {"zero": zero},
        }
    )


def main() -> None:
    """Measure what is not measured yet, predict everything, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where measurements are written, and read from by a later call")
    parser.add_argument("--measured", type=Path, help="use these measurements")
    parser.add_argument("--only-measure", action="store_true", help="do not predict")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    from minituner.plan.machine import machine_facts
    from minituner.plan.probe import Probe, real_steps

    place = options.measured or options.out
    known = json.loads(place.read_text()) if place and place.is_file() else {"machine": machine_facts(), "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "alpaca.jsonl"
        script = ROOT / "data_scripts" / "make_alpaca_like.py"
        subprocess.run(
            [sys.executable, str(script), "--records", "200", "--out", str(data)], check=True, stdout=subprocess.DEVNULL
        )
        rows = []
        for method, zero in COMBINATIONS:
            name, world = f"{method} {zero or 'no zero'}", 2 if zero else 1
            recipe = recipe_of(method, zero, data)
            if name not in known["runs"] and not options.measured:
                print(f"measuring {name}", file=sys.stderr, flush=True)
                known["runs"][name] = asdict(real_steps(recipe, options.steps, world))
                if options.out:
                    options.out.write_text(json.dumps(known, indent=1))
            if name in known["runs"] and not options.only_measure:
                rows.append(compared(name, recipe, world, Probe(**known["runs"][name])))
                print(f"{name}: {rows[-1]['ratio']:.3f}", file=sys.stderr, flush=True)
    print(json.dumps({"machine": known["machine"], "rows": rows}, indent=2))


def compared(name: str, recipe: Any, world: int, probe: Any) -> dict[str, Any]:
    """Predicted and measured bytes of the steps, the program's own included and not."""
    from minituner import estimate

    plan = estimate(recipe, gpus=world, device="cpu")
    predicted = plan.peak_bytes
    return {
        "combination": name,
        "predicted_mb": round(predicted / 1e6),
        "measured_mb": round(probe.steps_peak_bytes / 1e6),
        "ratio": predicted / probe.steps_peak_bytes,
        "ratio_without_program": (predicted - plan.parts["program"]) / (probe.steps_peak_bytes - probe.program_bytes),
        "set_up_peak_mb": round(probe.set_up_peak_bytes / 1e6),
        "parts_mb": {part: round(size / 1e6) for part, size in plan.parts.items()},
        "seconds": probe.seconds,
    }


if __name__ == "__main__":
    main()
