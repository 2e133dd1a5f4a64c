"""The same model on the same tokens in other shapes: packed or padded, short packs or long ones.

    python tests/benchmarks/training_shapes.py padded > assets/benchmarks/padded.json
    python tests/benchmarks/training_shapes.py lengths --figure assets/benchmarks/lengths.png > ...

    packed    documents in one row of 1,024, each attends to itself         fill 98%
    padded    four documents a batch, as they come                          fill of Alpaca-like data about 50%
    grouped   four documents a batch, sorted by length first                 fill above 90%

Packing saves what padding wastes, so its speed-up is near 1 / fill: large on data of very different lengths, none on
data of equal ones. Both are measured, and the fill stands beside each. In `lengths` every document has 256 tokens, so
the work of a token is the same in a pack of 512 and of 8,192; `block_mask` is transformers' SDPA with one mask for the
whole row, whose cost grows with the square of the row; `two_packs` is train.per_device_batch_size=2, for packs that are
too short to be worth a pass over all weights. One process, one model, kinds in turns. Not a test: minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minituner.data.collate import Document, collate, pad_batch
from minituner.data.encoding import IGNORE
from minituner.data.packing import pack
from minituner.model.loss import loss_sum
from minituner.plan.bench_data import make_records
from minituner.plan.bench_train import RECORDS, benchmark_recipe
from minituner.plan.machine import machine_facts
from minituner.recipe import Recipe
from minituner.train.ranks import Ranks
from minituner.train.run import Run, set_up

PACK, BATCH = 1024, 4
DOCUMENT = 256  # tokens of every document where all are equal
SIZES = (512, 1024, 2048, 4096, 8192)
MOST_TWO_PACKS = 512
MOST_BLOCK_MASK = 2048  # longer rows under one mask cost more than the rest of the measurement


def packed_loss(run: Run, documents: Sequence[Document]) -> torch.Tensor:
    """The summed loss of one row in which each document attends to itself."""
    return loss_sum(run.model, collate([documents]), run.attention, run.head)


def block_mask_loss(run: Run, documents: Sequence[Document]) -> torch.Tensor:
    """The same by transformers' SDPA, which makes one (T, T) mask of the positions."""
    run.model.set_attn_implementation("sdpa")
    try:
        return loss_sum(run.model, collate([documents]), "sdpa", run.head)
    finally:
        run.model.set_attn_implementation(run.attention)


def padded_loss(run: Run, documents: Sequence[Document]) -> torch.Tensor:
    """The same documents as rows of a padded batch, the head at supervised positions only (as above)."""
    batch = pad_batch(documents, pad_id=0)
    assert run.head is not None
    run.model.set_attn_implementation("sdpa")
    try:
        hidden = run.head.decoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
    finally:
        run.model.set_attn_implementation(run.attention)
    targets = batch["labels"][:, 1:]
    keep = targets != IGNORE
    return run.head.loss_sum(hidden[:, :-1][keep], targets[keep])


LOSSES = {
    "packed": packed_loss,
    "two_packs": packed_loss,
    "block_mask": block_mask_loss,
    "padded": padded_loss,
    "grouped": padded_loss,
}


def timed(run: Run, kind: str, batches: Sequence[Sequence[Document]]) -> tuple[float, float]:
    """Seconds of one optimizer step over these micro-batches, and its loss per target."""
    start, total, targets = time.perf_counter(), 0.0, sum(int((d[1][1:] != IGNORE).sum()) for b in batches for d in b)
    for documents in batches:
        loss = LOSSES[kind](run, documents)
        total += loss.item()
        run.engine.backward(loss / targets)
    run.engine.step(0.0)  # the rate is 0, so every kind sees the same weights, and losses can be compared
    return time.perf_counter() - start, total / targets


def in_rows(documents: Sequence[Document], most: int) -> list[list[Document]]:
    """Best-fit packs."""
    plan = pack([len(ids) for ids, _ in documents], most, "best_fit")
    return [[documents[i] for i in plan[n]] for n in range(len(plan))]


def two_together(packs: Sequence[list[Document]]) -> list[list[Document]]:
    """Packs two by two, in one row: what a micro-batch of two packs is (data/collate.py)."""
    return [list(chain(*packs[i : i + 2])) for i in range(0, len(packs), 2)]


def in_batches(documents: Sequence[Document], among: int) -> list[list[Document]]:
    """Batches of four as they come, or sorted by length inside groups of `among`."""
    order: list[Document] = []
    for start in range(0, len(documents), among):
        group = list(documents[start : start + among])
        order += sorted(group, key=lambda document: len(document[0])) if among > 1 else group
    return [order[i : i + BATCH] for i in range(0, len(order), BATCH)]


def fill(kind: str, batches: Sequence[Sequence[Document]], most: int) -> float:
    """Real tokens by those computed; for packs by their capacity, though nothing is computed beyond their tokens."""
    lengths = [[len(ids) for ids, _ in batch] for batch in batches]
    room = sum(most if kind == "packed" else max(n) * len(n) for n in lengths)
    return sum(map(sum, lengths)) / room


def equal_documents(documents: Sequence[Document], count: int) -> list[Document]:
    """`count` documents of exactly DOCUMENT tokens, cut from the text of others joined; the first third is masked."""
    ids = np.concatenate([ids for ids, _ in documents])
    ids = np.resize(ids, count * DOCUMENT).reshape(count, DOCUMENT)
    labels = ids.copy()
    labels[:, : DOCUMENT // 3] = IGNORE
    return list(zip(ids, labels, strict=True))


def measure_padded(run: Run, documents: list[Document], rounds: int, count: int) -> dict[str, Any]:
    """Packed, padded and grouped on `count` documents as they are, and on half as many of equal length."""
    result: dict[str, Any] = {}
    for name, some in (("alpaca_like", documents[:count]), ("uniform", equal_documents(documents, count // 2))):
        kinds = {
            "packed": in_rows(some, PACK),
            "padded": in_batches(some, 1),
            "grouped": in_batches(some, len(some)),
        }
        rows = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, batches in kinds.items():
                rows[kind].append(timed(run, kind, batches))
                print(f"{name} {kind}: {rows[kind][-1][0]:.2f} s", file=sys.stderr, flush=True)
        tokens, seconds = sum(len(ids) for ids, _ in some), medians(rows)
        result[name] = {
            "documents": len(some),
            "tokens": tokens,
            "loss": {kind: many[0][1] for kind, many in rows.items()},
            "fill": {kind: round(fill(kind, batches, PACK), 4) for kind, batches in kinds.items()},
            "tokens_per_second": {kind: round(tokens / value, 1) for kind, value in seconds.items()},
            "packed_is_faster_than": {
                kind: round(seconds[kind] / seconds["packed"], 3) for kind in kinds if kind != "packed"
            },
        }
    return result


def measure_lengths(run: Run, documents: list[Document], rounds: int, sizes: Sequence[int]) -> dict[str, Any]:
    """The same documents in packs of several sizes: one at a time, short ones two at a time, under one mask for a row.

    Rates are those of the fastest round after the first, which warms up.
    """
    longest = max(sizes)
    some = equal_documents(documents, longest // DOCUMENT)
    kinds = [("packed", n) for n in sizes]
    kinds += [("two_packs", n) for n in sizes if n <= MOST_TWO_PACKS and 2 * n <= longest]
    kinds += [("block_mask", n) for n in sizes if n <= MOST_BLOCK_MASK]
    rows = {kind: [] for kind in kinds}
    timed(run, "packed", [some[:2]])  # the first step of a process takes its memory from the system
    for number in range(rounds):
        for kind, size in kinds[:: (-1) ** number]:  # there and back, so that nobody always comes first
            if kind == "block_mask" and number > 1:  # one counted round of the slow ones shows where they go
                continue
            packs = in_rows(some, size)
            together = two_together(packs) if kind == "two_packs" else packs
            rows[kind, size].append(timed(run, kind, together))
            print(f"{kind} {size}: {rows[kind, size][-1][0]:.2f} s", file=sys.stderr, flush=True)
    # The least: half a minute each, of which whatever else the machine does only takes away.
    seconds = {key: min(seconds for seconds, _ in many[1:] or many) for key, many in rows.items()}
    rates = {kind: {n: round(longest / seconds[k, n], 1) for k, n in kinds if k == kind} for kind, _ in kinds}
    ours = rates["packed"].values()
    return {
        "document_tokens": DOCUMENT,
        "tokens_a_step": longest,
        "tokens_per_second": rates,
        "seconds": {f"{kind} {n}": [round(seconds, 2) for seconds, _ in many] for (kind, n), many in rows.items()},
        "loss": {f"{kind} {size}": many[0][1] for (kind, size), many in rows.items()},
        "packed_slowest_by_fastest": round(min(ours) / max(ours), 4),
    }


def medians(rows: dict[Any, list[tuple[float, float]]]) -> dict[Any, float]:
    """Median seconds after the first round, which warms up."""
    return {key: statistics.median(seconds for seconds, _ in many[1:] or many) for key, many in rows.items()}


def draw(figures: dict[str, Any], file: Path) -> None:
    """Tokens a second against the size of the pack."""
    from minituner.viz.picture import frame, new_figure
    from minituner.viz.style import PALETTE

    figure = new_figure(6, 3.2)
    axes = figure.subplots()
    names = {
        "packed": "minituner: one attention call per document",
        "two_packs": "the same, two packs a micro-batch",
        "block_mask": "one mask for the whole row (SDPA)",
    }
    for number, (kind, rates) in enumerate(figures["tokens_per_second"].items()):
        sizes = [int(size) for size in rates]
        axes.plot(sizes, list(rates.values()), "oDs"[number] + "-", color=PALETTE[number], label=names[kind])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes_of(figures), [f"{n:,}" for n in sizes_of(figures)])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"tokens in a pack (documents of {figures['document_tokens']})")
    axes.set_ylabel("tokens/s")
    axes.legend(frameon=False)
    frame(axes)
    figure.savefig(file, dpi=100, bbox_inches="tight")


def sizes_of(figures: dict[str, Any]) -> list[int]:
    """The sizes that were measured."""
    return [int(size) for size in figures["tokens_per_second"]["packed"]]


def documents_of(run: Run) -> Iterator[Document]:
    """The documents of the run's packs, in their order."""
    for number in range(len(run.prepared.packs)):
        yield from run.prepared.documents(number)


def main() -> None:
    """Measure one of the two, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("padded", "lengths"))
    parser.add_argument("--rounds", type=int, default=4, help="the first of several is not counted")
    parser.add_argument("--documents", type=int, default=64, help="of different lengths; half as many of equal ones")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--figure", type=Path, help="where the curve is drawn")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the benchmark's recipe")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minituner-shapes-") as name:
        folder = Path(name)
        records = make_records(folder / "alpaca.jsonl", RECORDS, seed=42)
        recipe = Recipe.from_values(benchmark_recipe(records).model_dump(mode="json"), overrides=options.set)
        run = set_up(recipe, folder, folder, lambda line: print(line, file=sys.stderr), Ranks())
        documents = list(documents_of(run))
        timed(run, "packed", [documents[:1]])  # kernels are chosen
        random.Random(0).shuffle(documents)  # not the order of packs
        if options.what == "padded":
            figures = measure_padded(run, documents, options.rounds, options.documents)
        else:
            figures = measure_lengths(run, documents, options.rounds, options.sizes)
            if options.figure:
                draw(figures, options.figure)
    print(json.dumps({"machine": machine_facts(), "rounds": options.rounds, **figures}, indent=1))


if __name__ == "__main__":
    main()
