"""minituner against what people use today: the same records, the same packs, step by step in turns, one JSON.

    python tests/benchmarks/compare_training.py --peers all --rounds 5 > assets/benchmarks/training_peers.json
    python tests/benchmarks/compare_training.py --variants --rounds 6     each optimisation off, and other methods

Programs are loaded together, each in its own environment (peer_environments.py), and take turns:

    round 1   ours  transformers  trl        one optimizer step each, one pack of at most 1,024 real tokens
    round 2   ours  transformers  trl        whoever slows the machine down slows all of them
    ...       the first two rounds are not counted
    then      ours  xtuner  axolotl          the next ones, two at a time beside ours: all at once would fill the memory

So ratios mean something on a machine that others use too; seconds mean less. That all train the same thing can be seen:
the same documents, `trained_parameters`, and losses that agree. Who lets documents see each other is measured, not
believed: the first token of a pack is changed, and the hidden states tell how far that reaches. Environments are made
under --environments (default: the cache folder, outside the repository), with torch for CPUs; a peer that cannot be
installed or run is in the JSON with its error. transformers comes with minituner.
It is not a test: it takes minutes, and a few GB of memory for each program. Lesson: notebook 07.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from peer_environments import ENVIRONMENTS, environment

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
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "all on": ([], {}),
    "without fused lora": (["train.fused=[swiglu, norm, rotary]"], {}),
    "without fused swiglu": (["train.fused=[lora, norm, rotary]"], {}),
    "without fused norm": (["train.fused=[lora, swiglu, rotary]"], {}),
    "without fused rotary": (["train.fused=[lora, swiglu, norm]"], {}),
    "without fused layer": (["train.fused=[lora, swiglu, norm, rotary]"], {}),
    "nothing fused": (["train.fused=[]"], {}),
    "without shared prefixes": (["train.share_prefixes=false"], {}),
    "without cut tails": (["train.cut_tails=false"], {}),
    "huge pages": ([], {"THP_MEM_ALLOC_ENABLE": "1"}),
    "compiled too": (["train.compile=true"], {}),
    "qlora": (["method.name=qlora"], {}),
    "full": (["method.name=full"], {}),
}


def packs_of(recipe: Recipe, count: int) -> tuple[list[list[dict[str, list[int]]]], list[dict[str, Any]]]:
    """The first packs in the order in which our own training takes them: as documents with ids and labels, and the
    records that those were made from."""
    from minituner.train.feed import Feed

    prepared = prepare(
        recipe.data, load_tokenizer(fetch(recipe.model.name_or_path)), seed=recipe.train.seed, say=lambda line: None
    )
    feed = Feed(prepared, recipe)
    lines = Path(recipe.data.sources[0].path).read_text(encoding="utf-8").splitlines()
    packs, records = [], []
    for step in range(count):
        number = feed.packs(step)[0][0]
        pack = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in prepared.documents(number)]
        for document in pack:
            document["labels"][0] = IGNORE  # where rows are joined, the first token must not be a target
        packs.append(pack)
        for row in prepared.packs[number]:
            where = prepared.dataset[int(prepared.rows[int(row)])]["where"]  # alpaca.jsonl:17
            records.append(json.loads(lines[int(where.rsplit(":", 1)[1]) - 1]))
    return packs, records


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
                failed[name] = error.text()
                continue
            last = rows[name][-1]
            rate = last["tokens"] / last["seconds"]
            print(f"{number + 1}/{rounds} {name}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
    return {name: many for name, many in rows.items() if name not in failed}, failed


def figures_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The steady state of one program, and every step's tokens and loss."""
    steady = rows[WARM_UP:]
    seconds = sum(row["seconds"] for row in steady)
    supervised = sum(row["supervised_tokens"] for row in rows)
    return {
        "tokens_per_second": round(sum(row["tokens"] for row in steady) / seconds, 1),
        "trained_tokens_per_second": round(sum(row["supervised_tokens"] for row in steady) / seconds, 1),
        "seconds_per_step": round(statistics.median(row["seconds"] for row in steady), 4),
        "peak_memory_gb": round(max(row["peak_memory_gb"] for row in rows), 3),
        "first_step_seconds": round(rows[0]["seconds"], 3),
        "mean_loss": round(sum(row["loss"] * row["supervised_tokens"] for row in rows) / supervised, 5),
        "seconds_of_each_step": [round(row["seconds"], 3) for row in rows],
        "tokens_of_each_step": [row["tokens"] for row in rows],
        "trained_tokens_of_each_step": [row["supervised_tokens"] for row in rows],
        "loss_of_each_step": [round(row["loss"], 5) for row in rows],
    }


def compare_peers(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """Ours and the peers, in turns, `options.together` of them beside ours at a time."""
    packs, records = packs_of(recipe, max(options.rounds, options.packs))
    spec = {
        "model": str(Path(fetch(recipe.model.name_or_path)).resolve()),
        "packs": packs,
        "records": records,
        "max_length": recipe.data.max_length,
        "lora_rank": recipe.method.lora_rank,
        "learning_rate": recipe.train.learning_rate,
    }
    names = sorted(ENVIRONMENTS) if "all" in options.peers else list(options.peers)
    longest = max(len(document["input_ids"]) for pack in packs for document in pack)
    result: dict[str, Any] = {"documents": sum(map(len, packs)), "longest_document": longest, "groups": []}
    for start in range(0, len(names), options.together):
        result["groups"].append(compare_group(names[start : start + options.together], recipe, spec, longest, options))
    return result


def compare_group(
    names: list[str], recipe: Recipe, spec: dict[str, Any], longest: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Ours and the peers of one group; `longest` is the longest document, (tokens)."""
    given = dict(item.split("=", 1) for item in options.python)
    workers, failed = {"minituner": own_worker(recipe)}, {}
    for peer in names:
        try:
            command = [environment(peer, options.environments, given), str(HERE / "peer.py"), peer]
            workers[peer] = Worker(
                command, json.dumps(spec), {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            )
        except MinitunerError as error:
            failed[peer] = error.text()
    gemm = [workers["minituner"].ask("gemm")["gemm_flops_per_second"]]
    rows, stopped = turns(workers, options.rounds)
    gemm.append(workers["minituner"].ask("gemm")["gemm_flops_per_second"])
    own = summary(workers["minituner"].facts, rows["minituner"], gemm) | figures_of(rows["minituner"])
    result: dict[str, Any] = {"minituner": own, "peers": {}}
    for peer in names:
        if peer not in rows:
            result["peers"][peer] = {"error": (failed | stopped)[peer]}
            continue
        figures = figures_of(rows[peer]) | workers[peer].facts
        reach = workers[peer].ask("isolation")
        # One more for LLaMA-Factory's line break. A row no longer than a document can be tells nothing.
        sees = reach["first_token_reaches"] > longest + 1 if reach["row"] > longest + 1 else None
        figures["documents_see_each_other"] = sees
        figures["ratio"] = round(own["tokens_per_second"] / figures["tokens_per_second"], 3)
        figures["memory_ratio"] = round(own["peak_memory_gb"] / figures["peak_memory_gb"], 3)
        result["peers"][peer] = figures | reach
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
    parser.add_argument("--peers", nargs="*", default=[], choices=["all", *sorted(ENVIRONMENTS)])
    parser.add_argument("--together", type=int, default=2, help="peers that are loaded at a time, beside ours")
    parser.add_argument("--variants", action="store_true", help="ours with each optimisation on and off")
    parser.add_argument("--only", nargs="*", choices=sorted(VARIANTS), help="these variants")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--packs", type=int, default=64, help="of ours, whose documents the peers get to pack anew")
    parser.add_argument("--environments", type=Path, default=home() / "peers")
    parser.add_argument("--python", nargs="*", default=[], metavar="PEER=PYTHON", help="an environment that is there")
    parser.add_argument("overrides", nargs="*", help="changes to the benchmark's recipe, key.path=value")
    options = parser.parse_args()
    if options.rounds <= WARM_UP:
        parser.error(f"--rounds {options.rounds}: the first {WARM_UP} are not counted, so at least {WARM_UP + 1}")
    with tempfile.TemporaryDirectory(prefix="minituner-compare-") as folder:
        records = make_records(Path(folder) / "alpaca.jsonl", RECORDS, seed=42)
        recipe = Recipe.from_values(benchmark_recipe(records).model_dump(mode="json"), overrides=options.overrides)
        figures = {"machine": machine_facts(), "settings": settings_of(recipe, options.rounds)}
        if options.peers:
            figures |= compare_peers(recipe, options)
        if options.variants:
            figures["variants"] = compare_variants(recipe, options)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
