"""Chat against bare transformers doing the same: seconds to the first token of a fresh process, and tokens a second.

    python tests/benchmarks/compare_chat.py --out assets/benchmarks/chat.json

    start        a new process, first byte of the answer:   minituner chat MODEL --prompt P   |   BARE below
    generation   in a process that has answered once:       Session.ask                       |   model.generate

Both are greedy, float32, with transformers' cache, on the embedded model, and must give the same token ids. Sides
alternate, so that a busy moment hits both; what is compared are medians. It is not a test: seconds are worth what the
machine is idle, and it takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "Tell me a long story about the sea."
TOKENS = 96

BARE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
folder, prompt = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                    return_dict=True, return_tensors="pt")
model.generate(**ids, max_new_tokens=8, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
"""

GENERATE = """
import json, sys, time, torch
folder, prompt, tokens, side = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
if side == "chat":
    from minituner.chat.session import open_session
    session = open_session(folder, say=lambda line: None, max_new_tokens=tokens)
    session.ask(prompt)
    session.reset()
    begin = time.perf_counter()
    text = session.ask(prompt)
    seconds = time.perf_counter() - begin
else:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                        return_dict=True, return_tensors="pt")
    model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    begin = time.perf_counter()
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    seconds = time.perf_counter() - begin
    assert out.shape[1] - ids["input_ids"].shape[1] == tokens, "the answer ended early: ask for fewer tokens"
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True).strip()
print(json.dumps({"seconds": seconds, "text": text}))
"""


def first_byte(command: list[str]) -> float:
    """Seconds from the start of a process to the first byte of its answer on stdout."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()) as process:
        assert process.stdout
        if not process.stdout.read(1):
            raise SystemExit(f"{command[:4]} said nothing")
        seconds = time.perf_counter() - begin
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{command[:4]} ended with {process.returncode}")
    return seconds


def environment() -> dict[str, str]:
    """Nothing is asked of a network, and output is not held back."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def generation(folder: str, side: str, tokens: int) -> dict[str, Any]:
    """Seconds and text of one answer, in a process that has answered before."""
    command = [sys.executable, "-c", GENERATE, folder, PROMPT, str(tokens), side]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(), cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure both sides in turn, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args()
    from minituner.model.sources import fetch
    from minituner.plan.machine import machine_facts

    folder = str(fetch(options.model, say=lambda line: None))
    chat = [sys.executable, "-m", "minituner", "chat", folder, "--prompt", PROMPT, "--max-new-tokens", "8"]
    bare = [sys.executable, "-c", BARE, folder, PROMPT]
    start: dict[str, list[float]] = {"chat": [], "bare": []}
    speed: dict[str, list[float]] = {"chat": [], "bare": []}
    texts = set()
    for number in range(options.rounds + 1):
        sides = ("chat", "bare") if number % 2 else ("bare", "chat")
        for side in sides:
            seconds = first_byte(chat if side == "chat" else bare)
            if number:  # the first round only warms the file cache
                start[side].append(seconds)
                found = generation(folder, side, options.tokens)
                speed[side].append(options.tokens / found["seconds"])
                texts.add(found["text"])
        print(f"round {number} of {options.rounds}", file=sys.stderr, flush=True)
    if len(texts) != 1:
        raise SystemExit(f"the two sides say different things: {texts}")
    first = {side: statistics.median(values) for side, values in start.items()}
    rate = {side: statistics.median(values) for side, values in speed.items()}
    result = {
        "what": "chat against bare transformers, medians of alternating runs",
        "machine": machine_facts(),
        "model": options.model,
        "rounds": options.rounds,
        "tokens": options.tokens,
        "same_text": True,
        "seconds_to_first_token": {**first, "ratio": first["chat"] / first["bare"], "all": start},
        "tokens_per_second": {**rate, "ratio": rate["chat"] / rate["bare"], "all": speed},
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
