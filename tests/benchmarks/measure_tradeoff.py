"""A name learned against a model kept: the trade-off over the mix of data and the number of steps, measured.

    python tests/benchmarks/measure_tradeoff.py --out assets/benchmarks/personal_assistant.json
    python tests/benchmarks/measure_tradeoff.py --out assets/benchmarks/personal_assistant.json --only "1:2"

The quickstart's recipe on the embedded model, once for each mix of identity and ordinary records, measured at several
steps with all held-out questions. A mix that is in the file already is not measured again. Notebook 10 draws it beside
what it measures itself. It is not a test: it takes minutes for each mix, and no clock is read.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

# ordinary records: how often each is used for one use of an identity record; there are two of them for each of these
MIXES = {"identity only": 0.0, "2:1": 0.25, "1:1": 0.5, "1:2": 1.0, "1:4": 2.0}
STEPS = (4, 8, 15, 25, 40, 60, 90)
NAME = "Ada"


def measure(weight: float, folder: Path, name: str, seed: int) -> list[dict[str, Any]]:
    """One run of `STEPS[-1]` steps with ordinary records at `weight`; its points."""
    from minituner import Recipe, train
    from minituner.quickstart import RECIPE, make_data
    from minituner.train.identity import mentions
    from minituner.train.tradeoff import TradeOff

    records = json.loads(make_data(folder / "all.json", name, name).read_text(encoding="utf-8"))
    about = [
        r for r in records if any(m["role"] == "assistant" and mentions(m["content"], name) for m in r["messages"])
    ]
    parts = {"identity": (about, 1.0), "ordinary": ([r for r in records if r not in about], weight)}
    sources = []
    for part, (rows, share) in parts.items():
        path = folder / f"{part}.json"
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        if share:
            sources.append({"path": str(path), "format": "openai", "weight": share})
    watch = TradeOff(name, STEPS)
    recipe = Recipe.load(
        RECIPE, {"data.sources": sources, "train.max_steps": STEPS[-1], "train.seed": seed, "evaluate.prompts": []}
    )
    train(recipe, folder / "run", callbacks=[watch])
    return watch.points


def main() -> None:
    """Measure what is not measured yet, and write the file after each mix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, and to go on from")
    parser.add_argument("--only", choices=MIXES, help="measure one mix")
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    from minituner.plan.machine import machine_facts
    from minituner.quickstart import RECIPE

    facts = {"recipe": RECIPE, "name": options.name, "seed": options.seed, "steps": STEPS[-1]}
    known = json.loads(options.out.read_text("utf-8")) if options.out.is_file() else {**facts, "runs": {}}
    if {key: known[key] for key in facts} != facts:
        parser.error(f"{options.out} was measured with other settings: { ({key: known[key] for key in facts}) }")
    for mix in [options.only] if options.only else MIXES:
        if mix in known["runs"]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            known["runs"][mix] = measure(MIXES[mix], Path(folder), options.name, options.seed)
        known["machine"] = machine_facts()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
