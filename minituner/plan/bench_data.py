"""`minituner bench data`: how fast, how full and how small the data's side is on this machine, as JSON.

    prepare       records.jsonl -> tokenise, mask, best-fit packs         records/s, tokens/s, peak memory
                  the same with one thread
                  the same through TRL (--against trl)                    A B C  A B C  A B C, then medians
    pack          a plan for 1 and 10 million lengths, two distributions  seconds, fill, peak memory
    first_sample  the first record of a big file, as ids; and on the      seconds
                  screen, by `minituner inspect` from its very start

Every figure comes from a fresh process of its own (`bench_worker.py`): its peak memory is that job's, and nothing is
warm. Rivals take turns, so that a machine that slows down slows both. Nothing is read from or left in the cache.
Lesson: notebook 04.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minituner.errors import MinitunerError, UsageError, nearest

PARTS = ("prepare", "pack", "first_sample")
RIVALS = ("trl",)
PACK_AT = {"alpaca": 4096, "uniform": 8192}  # distribution of lengths -> max_length
ONE_GB = 1000  # MB
Say = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. `file_mb` is in MB (10^6 bytes); `runs` is how often `prepare` and `pack` are repeated."""

    records: int = 50_000
    runs: int = 3
    against: str | None = None
    parts: Sequence[str] = PARTS
    pack_lengths: Sequence[int] = (1_000_000, 10_000_000)
    file_mb: int = 200
    max_length: int = 2048
    model: str = "smollm2-135m-instruct"
    seed: int = 42

    def check(self) -> None:
        """Raise UsageError for options that cannot be measured; before anything slow is begun."""
        for part in self.parts:
            if part not in PARTS:
                raise UsageError(f"--only {part!r} is unknown", why=nearest(part, PARTS), fix=f"one of {PARTS}")
        for name in ("records", "runs", "file_mb"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: there is nothing to measure", fix="give 1 or more")
        if self.against is not None and self.against not in RIVALS:
            raise UsageError(f"--against {self.against!r} is unknown", fix=f"one of {', '.join(RIVALS)}")
        if self.against and importlib.util.find_spec(self.against) is None:
            raise UsageError(
                f"--against {self.against}: the package {self.against} is not installed",
                why="minituner does not need it, so it is not among its dependencies",
                fix="install it (with --no-deps it changes nothing else), then run the same command again",
                next_command=f"pip install --no-deps {self.against}",
            )


def bench_data(options: BenchOptions | None = None, *, say: Say = print) -> dict[str, Any]:
    """Measure what `options` name and return machine, settings and figures, ready for JSON.

    Raises:
        UsageError: impossible options, or a rival that is not installed.
        MinitunerError: a measured process failed; its last words are in the message.
    """
    from minituner.model.sources import fetch
    from minituner.plan.machine import machine_facts

    options = options or BenchOptions()
    options.check()
    figures: dict[str, Any] = {"machine": machine_facts(), "settings": asdict(options)}
    with tempfile.TemporaryDirectory(prefix="minituner-bench-") as name:
        folder = Path(name)
        common = {"max_length": options.max_length, "seed": options.seed}
        if {"prepare", "first_sample"} & set(options.parts):
            common["tokenizer"] = str(Path(fetch(options.model, say=say)).resolve())
            common["path"] = str(make_records(folder / "records.jsonl", options.records, options.seed))
        if "prepare" in options.parts:
            figures["prepare"] = bench_prepare(options, common, folder, say)
        if "pack" in options.parts:
            figures["pack"] = bench_pack(options, folder, say)
        if "first_sample" in options.parts:
            say(f"first sample of a file of {options.file_mb} MB")
            big = make_big_file(Path(common["path"]), folder / "big.jsonl", options.file_mb)
            figures["first_sample"] = measure({**common, "job": "first_sample", "path": str(big)}, folder)
            shown = [time_inspect(big, common["tokenizer"], folder) for _ in range(options.runs)]
            figures["first_sample"]["inspect_seconds"] = round(statistics.median(shown), 4)
    return figures


def bench_prepare(options: BenchOptions, common: dict[str, Any], folder: Path, say: Say) -> dict[str, Any]:
    """`prepare`, with all threads and with one, and its rival, in turns; medians and their ratios."""
    sides = {"minituner": {"job": "prepare"}, "minituner_one_thread": {"job": "prepare", "threads": 1}}
    if options.against:
        sides[options.against] = {"job": options.against}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(options.runs):
        for side, job in sides.items():
            runs[side].append(measure(common | job, folder))
            last = runs[side][-1]
            say(f"prepare {turn + 1} of {options.runs}: {side} {last['seconds']:.1f} s, {last['peak_rss_mb']:.0f} MB")
    result: dict[str, Any] = {side: median_run(many) for side, many in runs.items()}
    if options.against:
        rival = result[options.against]
        result["ratios"] = {side: ratios(result[side], rival) for side in sides if side != options.against}
    return result


def ratios(ours: dict[str, Any], rival: dict[str, Any]) -> dict[str, float]:
    """How many times the rival's speed (by the wall's clock and by processor time), and what share of its memory."""
    return {
        "speed": round(ours["records_per_second"] / rival["records_per_second"], 2),
        "speed_by_cpu_seconds": round(rival["cpu_seconds"] / max(ours["cpu_seconds"], 1e-9), 2),
        "peak_rss": round(ours["peak_rss_mb"] / rival["peak_rss_mb"], 2),
    }


def bench_pack(options: BenchOptions, folder: Path, say: Say) -> list[dict[str, Any]]:
    """The best-fit plan for each number of lengths and each distribution."""
    rows = []
    for distribution, max_length in PACK_AT.items():
        for count in options.pack_lengths:
            spec = {"distribution": distribution, "max_length": max_length, "count": count, "seed": options.seed}
            row = median_run([measure({"job": "pack", **spec}, folder) for _ in range(options.runs)])
            rows.append({"distribution": distribution, "max_length": max_length, **row})
            say(f"pack {count:,} {distribution} lengths: {row['seconds']:.2f} s, {row['fill']:.2%} full")
    return rows


def median_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs as one: the median of what is measured, speeds from it, the highest peak; counts must agree.

    Raises:
        MinitunerError: two runs of the same job counted differently, so the job is not deterministic.
    """
    counts = [{key: value for key, value in run.items() if isinstance(value, int) or key == "fill"} for run in runs]
    if any(count != counts[0] for count in counts):
        raise MinitunerError("the same job gave different counts", why="; ".join(map(str, counts)))
    measured = {key for run in runs for key in run} - set(counts[0])
    result: dict[str, Any] = dict(counts[0])
    for key in sorted(measured):
        values = [run[key] for run in runs]
        result[key] = max(values) if key == "peak_rss_mb" else round(statistics.median(values), 4)
    for what in ("records", "tokens"):
        result[f"{what}_per_second"] = round(result[what] / max(result["seconds"], 1e-9))
    return result | {"seconds_of_each_run": [run["seconds"] for run in runs]}


def measure(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one job of `bench_worker.py` in a fresh process with caches of its own, and return its figures.

    Raises:
        MinitunerError: the process failed.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        out = Path(name) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", "minituner.plan.bench_worker"],
            input=json.dumps({**spec, "out": str(out)}),
            env=own_environment(Path(name), one_thread=spec.get("threads") == 1),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode or not out.is_file():
            raise MinitunerError(
                f"the measured process ({spec['job']}) failed with exit status {done.returncode}",
                why=" | ".join(done.stderr.strip().splitlines()[-4:]),
                fix="with exit status -9 the memory was not enough: measure fewer records or lengths",
            )
        return json.loads(out.read_text(encoding="utf-8"))


def own_environment(folder: Path, *, one_thread: bool = False) -> dict[str, str]:
    """This process's environment, with empty caches in `folder`, no network, and tokenizers on one thread or all."""
    caches = {"MINITUNER_HOME": str(folder / "home"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    threads = {"TOKENIZERS_PARALLELISM": "false" if one_thread else "true"}
    return {**os.environ, **caches, **threads, "HF_HUB_OFFLINE": "1"}


def time_inspect(path: Path, tokenizer: str, folder: Path) -> float:
    """Seconds from starting `minituner inspect` to the first line of the first sample; the rest is not waited for.

    Raises:
        MinitunerError: it ended without showing a sample.
    """
    command = [sys.executable, "-u", "-m", "minituner", "inspect", str(path), "--n", "1", "--model", tokenizer]
    with tempfile.TemporaryDirectory(dir=folder) as name, (Path(name) / "errors.txt").open("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=own_environment(Path(name)), stdout=subprocess.PIPE, stderr=errors)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip():
                    return time.perf_counter() - start
            errors.seek(0)
            raise MinitunerError(
                f"minituner inspect showed no sample of {path.name}",
                why=" | ".join(errors.read().strip().splitlines()[-4:]),
            )
        finally:
            process.kill()
            process.communicate()


def make_records(out: Path, count: int, seed: int) -> Path:
    """Write `count` alpaca-like records with data_scripts/make_alpaca_like.py.

    Raises:
        MinitunerError: the script failed (a full disk).
    """
    from minituner.home import data_script

    script = data_script("make_alpaca_like.py")
    arguments = ["--records", str(count), "--out", str(out), "--seed", str(seed)]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MinitunerError(done.stderr.strip() or f"{script.name} failed with exit status {done.returncode}")
    return out


def make_big_file(block: Path, out: Path, megabytes: int) -> Path:
    """Repeat the lines of `block` until the file has `megabytes` MB; only its first record is going to be read.

    Raises:
        MinitunerError: the disk is full.
    """
    lines = block.read_bytes()
    try:
        with out.open("wb") as stream:
            while stream.tell() < megabytes * 1_000_000:
                stream.write(lines)
    except OSError as error:
        raise MinitunerError(
            f"cannot write the test file of {megabytes} MB in {out.parent}: {error.strerror}",
            fix="measure with a smaller --file-mb, or let TMPDIR name a folder with space",
        ) from None
    return out
