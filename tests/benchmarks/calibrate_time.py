"""How good is the time of a plan? Seconds said after a probe of three steps, against the run that follows, here.

    python tests/benchmarks/calibrate_time.py --out assets/benchmarks/estimate_time.json

For each recipe: `minituner estimate --probe`, then `minituner train`, each in a process of its own. The plan says what
steps take; the seconds of a run are those of its loop, saving and all (no evaluation is asked for).
It is not a test: seconds are worth what the machine is idle. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from minituner.plan.machine import machine_facts

ROOT = Path(__file__).resolve().parents[2]
COMMON = ["save.every_steps=null", "evaluate.prompts=[]", "evaluate.identity=null", "train.max_steps=12"]
CASES = {
    "lora, packs of 512": [],
    "lora, packs of 1024": ["data.max_length=1024"],
    "lora, no packing": ["data.packing=none", "train.gradient_accumulation_steps=4"],
    "full, packs of 512": ["method.name=full", "train.learning_rate=1e-5"],
    "qlora, packs of 512": ["method.name=qlora"],
}


def command(*arguments: str, cwd: Path) -> str:
    """Run `minituner ARGUMENTS`; what it printed.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "minituner", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"minituner {' '.join(arguments)}: exit status {done.returncode}\n{done.stderr}")
    return done.stdout


def measured(name: str, changes: list[str], folder: Path) -> dict[str, Any]:
    """One case: seconds said, seconds taken."""
    recipe = folder / "recipe.yaml"
    work_dir = folder / name.replace(" ", "-").replace(",", "")
    settings = [*COMMON, *changes]
    plan = json.loads(command("estimate", str(recipe), *settings, "--probe", "--json", cwd=folder))
    command("train", str(recipe), *settings, "--work-dir", str(work_dir), cwd=folder)
    (summary,) = work_dir.glob("runs/*/summary.json")
    took = json.loads(summary.read_text(encoding="utf-8"))["seconds"]
    return {"case": name, "said_seconds": plan["seconds"], "took_seconds": took, "ratio": plan["seconds"] / took}


def main() -> None:
    """Measure every case and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = folder / "alpaca.jsonl"
        script = ROOT / "data_scripts" / "make_alpaca_like.py"
        subprocess.run(
            [sys.executable, str(script), "--records", "400", "--out", str(data)], check=True, stdout=subprocess.DEVNULL
        )
        from minituner import Recipe

        Recipe.from_values(
            {
                "name": "calibration",
                "model": {"name_or_path": "smollm2-135m-instruct", "dtype": "float32"},
                "method": {"name": "lora"},
                "data": {"sources": [{"path": str(data), "format": "alpaca"}], "max_length": 512},
                "train": {"gradient_accumulation_steps": 1},
            }
        ).dump(folder / "recipe.yaml")
        rows = []
        for name, changes in CASES.items():
            rows.append(measured(name, changes, folder))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    text = json.dumps({"machine": machine_facts(), "rows": rows}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
