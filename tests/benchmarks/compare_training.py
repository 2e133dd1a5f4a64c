"""minituner against what people use today: the same records, the same packs, step by step in turns, one JSON.

    python tests/benchmarks/compare_training.py --peers transformers trl --rounds 8 > assets/benchmarks/peers.json
    python tests/benchmarks/compare_training.py --variants --rounds 6     each optimisation off, and other methods

All programs are loaded at once, each in its own environment, and take turns:

    round 1   ours  transformers  trl        one optimizer step each, one pack of at most 1,024 real tokens
    round 2   ours  transformers  trl        whoever slows the machine down slows all of them
    ...       the first two rounds are not counted

So ratios mean something on a machine that others use too; seconds mean less. Environments are made under
--environments (default: the cache folder, outside the repository), pinned below, with torch for CPUs; a peer that
cannot be installed or run is in the JSON with the first line of its error. transformers comes with minituner.
It is not a test: it takes minutes, and a few GB of memory for each program.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from minituner.data.encoding import IGNORE
from minituner.data.prepare import prepare
from minituner.errors import MinitunerError
from minituner.home import home
from minituner.model.loading import load_tokenizer
from minituner.model.sources import fetch
from minituner.plan.bench_data import make_records
from minituner.plan.bench_train import RECORDS, WARM_UP, Worker, benchmark_recipe, own_worker, settings_of, summary
from minituner.plan.machine import machine_facts
from minituner.recipe import Recipe

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
PINS: dict[str, list[str]] = {
    "transformers": [],  # minituner's own environment
    "trl": ["trl==1.16.0", "transformers==5.23.0", "peft==0.21.2"],
    "llamafactory": ["llamafactory==0.9.5"],
}
LEAKS = {"transformers": True, "trl": False, "llamafactory": False}
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "all on": ([], {}),
    "without fused lora": (["train.fused=[swiglu, norm]"], {}),
    "without fused swiglu": (["train.fused=[lora, norm]"], {}),
    "without fused norm": (["train.fused=[lora, swiglu]"], {}),
    "nothing fused": (["train.fused=[]"], {}),
    "huge pages": ([], {"THP_MEM_ALLOC_ENABLE": "1"}),
    "compiled too": (["train.compile=true"], {}),
    "qlora": (["method.name=qlora"], {}),
    "full": (["method.name=full"], {}),
}


def environment(peer: str, place: Path, given: dict[str, str]) -> str:
    """The Python of the peer's environment, made if it is not there."""
    if peer in given:
        return given[peer]
    if not PINS[peer]:
        return sys.executable
    python = place / peer / "bin" / "python"
    if not (place / peer / ".ready").is_file():
        print(f"making an environment for {peer}", file=sys.stderr, flush=True)
        venv.create(place / peer, with_pip=True, clear=True)
        for packages in ([TORCH], PINS[peer]):  # torch first: nothing later then pulls a CUDA build
            done = subprocess.run(
                [str(python), "-m", "pip", "install", "--quiet", "--no-input", *packages],
                capture_output=True,
                text=True,
                check=False,
            )
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            if done.returncode:
                raise MinitunerError(f"{peer} cannot be installed: {(errors or ['unknown'])[0]}")
        (place / peer / ".ready").touch()
    return str(python)


def packs_of(recipe: Recipe, count: int) -> list[list[dict[str, list[int]]]]:
    """The first packs in the order in which our own training takes them, documents with ids and labels."""
    from minituner.train.feed import Feed

    prepared = prepare(
        recipe.data, load_tokenizer(fetch(recipe.model.name_or_path)), seed=recipe.train.seed, say=lambda line: None
    )
    feed = Feed(prepared, recipe)
    packs = []
    for step in range(count):
        documents = prepared.documents(feed.packs(step)[0][0])
        pack = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in documents]
        for document in pack:
            document["labels"][0] = IGNORE  # where rows are joined, the first token must not be a target
        packs.append(pack)
    return packs


def turns(workers: dict[str, Worker], rounds: int) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Rows of each worker that lasted, and the error of each that did not; they take one step at a time, in turns."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name, worker in workers.items():
            if name in failed:
                continue
            try:
                rows[name].append(worker.ask("step"))
            except MinitunerError as error:
                failed[name] = str(error)
                continue
            last = rows[name][-1]
            rate = last["tokens"] / last["seconds"]
            print(f"{number + 1}/{rounds} {name}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
    return {name: many for name, many in rows.items() if name not in failed}, failed


def figures_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The steady state of one program."""
    steady = rows[WARM_UP:]
    seconds = sum(row["seconds"] for row in steady)
    return {
        "tokens_per_second": round(sum(row["tokens"] for row in steady) / seconds, 1),
        "trained_tokens_per_second": round(sum(row["supervised_tokens"] for row in steady) / seconds, 1),
        "tokens": sum(row["tokens"] for row in steady),
        "peak_memory_gb": round(max(row["peak_memory_gb"] for row in rows), 3),
        "first_step_seconds": round(rows[0]["seconds"], 3),
        "seconds_of_each_step": [round(row["seconds"], 3) for row in rows],
    }


def compare_peers(recipe: Recipe, records: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Ours and the peers, in turns."""
    packs = packs_of(recipe, options.rounds)
    spec = {
        "model": str(Path(fetch(recipe.model.name_or_path)).resolve()),
        "packs": packs,
        "records": str(records),
        "max_length": recipe.data.max_length,
        "lora_rank": recipe.method.lora_rank,
        "learning_rate": recipe.train.learning_rate,
    }
    given = dict(item.split("=", 1) for item in options.python)
    workers, failed = {"minituner": own_worker(recipe)}, {}
    for peer in options.peers:
        try:
            python = environment(peer, options.environments, given)
            extra = {"PYTHONPATH": options.trl_path} if peer == "trl" and options.trl_path else {}
            command = [python, str(HERE / "peer.py"), peer]
            workers[peer] = Worker(command, json.dumps(spec), {"HF_HUB_OFFLINE": "1", **extra})
        except MinitunerError as error:
            failed[peer] = str(error)
    gemm = [workers["minituner"].ask("gemm")["gemm_flops_per_second"]]
    rows, stopped = turns(workers, options.rounds)
    gemm.append(workers["minituner"].ask("gemm")["gemm_flops_per_second"])
    own = summary(workers["minituner"].facts, rows["minituner"], gemm)
    result: dict[str, Any] = {"minituner": own, "peers": {}}
    for peer in options.peers:
        if peer in rows:
            figures = figures_of(rows[peer])
            figures["documents_see_each_other"] = LEAKS[peer]
            figures["ratio"] = round(own["tokens_per_second"] / figures["tokens_per_second"], 3)
            figures["memory_ratio"] = round(own["peak_memory_gb"] / figures["peak_memory_gb"], 3)
            result["peers"][peer] = figures | workers[peer].facts
        else:
            result["peers"][peer] = {"error": (failed | stopped)[peer]}
    for worker in workers.values():
        worker.__exit__(None, None, None)
    return result


def compare_variants(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """Ours with all optimisations, and with each of them off, two at a time: the first takes turns with each other."""
    result: dict[str, Any] = {}
    for name in options.only or [name for name in VARIANTS if name != "all on"]:
        changes, env = VARIANTS[name]
        other = Recipe.from_values(recipe.model_dump(mode="json"), overrides=changes)
        with own_worker(recipe) as ours, own_worker(other, env) as theirs:
            gemm = [ours.ask("gemm")["gemm_flops_per_second"]]
            rows, failed = turns({"all on": ours, name: theirs}, options.rounds)
            gemm.append(ours.ask("gemm")["gemm_flops_per_second"])
            if failed:
                result[name] = {"error": str(failed)}
                continue
            both = {"all on": summary(ours.facts, rows["all on"], gemm), name: summary(theirs.facts, rows[name], gemm)}
        speed = both["all on"]["tokens_per_second"] / both[name]["tokens_per_second"]
        memory = both["all on"]["peak_memory_gb"] / both[name]["peak_memory_gb"]
        result[name] = {"all_on_is_faster_by": round(speed, 3), "all_on_memory_ratio": round(memory, 3), **both}
    return result


def main() -> None:
    """Measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", default=[], choices=sorted(PINS))
    parser.add_argument("--variants", action="store_true", help="ours with each optimisation on and off")
    parser.add_argument("--only", nargs="*", choices=sorted(VARIANTS), help="these variants")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--environments", type=Path, default=home() / "peers")
    parser.add_argument("--python", nargs="*", default=[], metavar="PEER=PYTHON", help="an environment that is there")
    parser.add_argument("--trl-path", help="a folder that TRL was installed into with --target")
    parser.add_argument("overrides", nargs="*", help="changes to the benchmark's recipe, key.path=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minituner-compare-") as folder:
        records = make_records(Path(folder) / "alpaca.jsonl", RECORDS, seed=42)
        recipe = Recipe.from_values(benchmark_recipe(records).model_dump(mode="json"), overrides=options.overrides)
        figures = {"machine": machine_facts(), "settings": settings_of(recipe, options.rounds)}
        if options.peers:
            figures |= compare_peers(recipe, records, options)
        if options.variants:
            figures["variants"] = compare_variants(recipe, options)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
