"""The measured side of `minituner bench data`: one job in one fresh process, so that its peak memory is its own.

    parent                                      this process
    python -m minituner.plan.bench_worker       import what the job needs; note the memory
        {"job": "pack", "count": ...}  ------>  run the job once, with the clock on
        {"seconds": ..., "peak_rss_mb": ...}    <------ written to the file that the parent named

Imports and the loading of the tokenizer are outside the clock. Lesson: notebook 04.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minituner.errors import MinitunerError
from minituner.plan.machine import peak_rss_mb

# Tokens of a record with its template: what data_scripts/make_alpaca_like.py gives with the embedded model's tokenizer.
TEMPLATE_TOKENS, MEDIAN_TOKENS, SIGMA_TOKENS = 35, 86, 0.8
UNIFORM_LONGEST = 8192
DISTRIBUTIONS = ("alpaca", "uniform")


@contextmanager
def clock(result: dict[str, Any]) -> Iterator[None]:
    """Enter seconds, processor seconds (of all threads) and memory before and at the peak into `result`."""
    result["rss_before_mb"] = round(peak_rss_mb(), 1)
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    result["seconds"] = round(time.perf_counter() - wall, 4)
    result["cpu_seconds"] = round(time.process_time() - cpu, 4)
    result["peak_rss_mb"] = round(peak_rss_mb(), 1)


def prepare_job(spec: dict[str, Any]) -> dict[str, Any]:
    """`prepare` from a JSON-lines file to packs: read, tokenise, mask, write Arrow, plan the packs; no cache."""
    import datasets  # noqa: F401 - `prepare` imports it when it is called; imports are outside the clock

    from minituner.data.prepare import prepare
    from minituner.model.loading import load_tokenizer
    from minituner.recipe import DataSection

    tokenizer = load_tokenizer(spec["tokenizer"])
    data = DataSection.model_validate(
        {
            "sources": [{"path": spec["path"], "format": "alpaca"}],
            "max_length": spec["max_length"],
            "packing": "best_fit",
            "cache": False,
        }
    )
    result: dict[str, Any] = {}
    with clock(result):
        prepared = prepare(data, tokenizer, say=lambda line: print(line, file=sys.stderr))
    ledger = prepared.ledger
    return result | {
        "records": ledger.records,
        "tokens": ledger.raw - ledger.truncated - sum(ledger.dropped.values()),
        "supervised_tokens": ledger.trained,
        "packs": len(prepared.packs),
        "fill": round(prepared.packs.fill, 5),
    }


def draw_lengths(distribution: str, count: int, max_length: int, seed: int) -> Any:
    """`count` record lengths as int32: "alpaca" is log-normal and cut at `max_length`, "uniform" is 1 to 8,192."""
    import numpy as np

    random = np.random.default_rng(seed)
    if distribution == "uniform":
        return random.integers(1, min(UNIFORM_LONGEST, max_length) + 1, count, dtype=np.int32)
    lengths = np.empty(count, dtype=np.int32)
    for start in range(0, count, 1_000_000):  # in parts, so that drawing costs less memory than packing
        part = random.lognormal(np.log(MEDIAN_TOKENS), SIGMA_TOKENS, min(1_000_000, count - start))
        lengths[start : start + len(part)] = np.minimum(part + TEMPLATE_TOKENS, max_length)
    return lengths


def pack_job(spec: dict[str, Any]) -> dict[str, Any]:
    """The best-fit plan for many drawn lengths."""
    from minituner.data.packing import pack

    lengths = draw_lengths(spec["distribution"], spec["count"], spec["max_length"], spec["seed"])
    result: dict[str, Any] = {}
    with clock(result):
        packs = pack(lengths, spec["max_length"], "best_fit")
    return result | {
        "records": len(lengths),
        "tokens": int(lengths.sum(dtype="int64")),
        "packs": len(packs),
        "fill": round(packs.fill, 5),
    }


def first_sample_job(spec: dict[str, Any]) -> dict[str, Any]:
    """From a file that nobody has opened to its first record as ids and labels, the way one looks at a sample."""
    from minituner.data.encoding import encode
    from minituner.data.formats import detect_format, to_conversation
    from minituner.data.records import read_records
    from minituner.model.loading import load_tokenizer

    tokenizer = load_tokenizer(spec["tokenizer"])
    result: dict[str, Any] = {}
    with clock(result):
        first = list(itertools.islice(read_records(spec["path"]), 20))
        layout, _ = detect_format(first)
        sample = encode(to_conversation(first[0], layout), tokenizer, max_length=spec["max_length"])
    return result | {
        "file_mb": round(Path(spec["path"]).stat().st_size / 1e6, 1),
        "records": 1,
        "tokens": len(sample["input_ids"]),
    }


def trl_job(spec: dict[str, Any]) -> dict[str, Any]:
    """The same records through TRL; see `bench_trl.py`."""
    from minituner.plan.bench_trl import prepare_with_trl

    return prepare_with_trl(spec, clock)


JOBS = {"prepare": prepare_job, "pack": pack_job, "first_sample": first_sample_job, "trl": trl_job}


def main() -> int:
    """Read the job from standard input, run it, and write its result to the file it names; 0 when that worked."""
    spec = json.load(sys.stdin)
    try:
        result = JOBS[spec["job"]](spec)
    except MinitunerError as error:
        print(error.text(), file=sys.stderr)
        return error.exit_code
    Path(spec["out"]).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
