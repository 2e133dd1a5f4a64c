"""Training speed on a GPU: shapes of 1B and 7B parameters with random weights, LoRA, QLoRA and full, packed or not.

    python tests/benchmarks/gpu_training.py --shapes embedded 1b 7b > assets/benchmarks/gpu.json
    python tests/benchmarks/gpu_training.py --shapes tiny --methods lora            anywhere, to see that it runs

Speed does not depend on what the weights are, so a model of any size is made from its shape. For each shape, method and
attention: tokens/s, the share of the measured matrix rate (MFU against what this card does, not against its data
sheet), peak memory; and packs of `--max-length` against one record a step (`unpacked`), the comparison that XTuner
reports on Alpaca. What does not fit or is not installed is in the JSON with its error. It has been run on CPUs with the
tiny shape only, and never on a GPU so far. It is not a test.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from minituner.errors import MinitunerError
from minituner.model.loading import load_tokenizer
from minituner.model.sources import fetch
from minituner.plan.bench_data import make_records
from minituner.plan.bench_train import benchmark_recipe, own_worker, settings_of, summary
from minituner.plan.machine import machine_facts
from minituner.recipe import Recipe

# Llama shapes: width, intermediate width, layers, heads, key-value heads.
SHAPES = {
    "tiny": (64, 128, 2, 4, 2),
    "1b": (2048, 8192, 16, 32, 8),
    "7b": (4096, 11008, 32, 32, 32),
}
METHODS = ("lora", "qlora", "full")
PACKED = {"packed": {}, "unpacked": {"data.packing": "none", "train.per_device_batch_size": 1}}


def random_model(shape: str, tokenizer: Any, dtype: str, folder: Path) -> Path:
    """A Llama of this shape with random weights, saved with the tokenizer.

    The vocabulary is the tokenizer's, so the head is smaller than the original's; it is counted as it is.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width, intermediate, layers, heads, key_value_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=32768,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    kept = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(kept)
    tokenizer.save_pretrained(folder)
    return folder


def measured(recipe: Recipe, steps: int) -> dict[str, Any]:
    """The figures of one recipe, or the error that kept it from running."""
    try:
        with own_worker(recipe) as worker:
            before = worker.ask("gemm")["gemm_flops_per_second"]
            rows = [worker.ask("step") for _ in range(steps)]
            after = worker.ask("gemm")["gemm_flops_per_second"]
        return summary(worker.facts, rows, [before, after])
    except MinitunerError as error:
        return {"error": f"{error} ({error.why})" if getattr(error, "why", "") else str(error)}


def main() -> None:
    """Measure every combination, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["embedded", "1b", "7b"], choices=["embedded", *SHAPES])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tokenizer", default="smollm2-135m-instruct", help="a catalog name or a folder")
    parser.add_argument("--attention", nargs="*", default=["auto"], help="varlen flash_attention_2 flash_attention_3")
    parser.add_argument("--dtype", default="auto", help="of weights and computation; auto is bfloat16 on such a card")
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--records", type=int, default=20_000)
    options = parser.parse_args()
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="minituner-gpu-") as name:
        folder = Path(name)
        plain = benchmark_recipe(make_records(folder / "alpaca.jsonl", options.records, seed=42))
        tokenizer = load_tokenizer(fetch(options.tokenizer))
        saved = "float32" if options.dtype in ("auto", "float32") else options.dtype
        for shape in options.shapes:
            model = plain.model.name_or_path
            if shape != "embedded":
                model = str(random_model(shape, tokenizer, "bfloat16" if shape == "7b" else saved, folder / shape))
            for method in options.methods:
                for attention in options.attention:
                    for kind, changes in PACKED.items():
                        settings = {
                            "model.name_or_path": model,
                            "model.dtype": options.dtype,
                            "model.attention": attention,
                            "method.name": method,
                            "data.max_length": options.max_length,
                            **changes,
                        }
                        recipe = Recipe.from_values(plain.model_dump(mode="json"), overrides=settings)
                        key = f"{shape} {method} {attention} {kind}"
                        print(key, file=sys.stderr, flush=True)
                        runs[key] = measured(recipe, options.steps) | {"settings": settings_of(recipe, options.steps)}
    packed = {key: run for key, run in runs.items() if key.endswith(" packed") and "error" not in run}
    speed_up = {
        key.removesuffix(" packed"): round(run["tokens_per_second"] / other["tokens_per_second"], 2)
        for key, run in packed.items()
        if "error" not in (other := runs[key.removesuffix("packed") + "unpacked"])
    }
    print(json.dumps({"machine": machine_facts(), "packed_by_unpacked": speed_up, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
