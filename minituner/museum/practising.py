"""A recipe to spoil in seconds: a small new model, sixty short chats, two epochs.

    tokenizer and template    the embedded model's own, so that texts look as they do elsewhere in the course
    model                     a Llama of two layers, 64 wide, drawn from the seed: it knows nothing, and learns quickly
    data                      the quickstart's, English and Chinese

What it learns is of no use; what goes wrong in it goes wrong in any size. Lessons: notebooks 03, 04, 05, 07 and 09.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from minituner.recipe import Recipe

TOKENIZER = "smollm2-135m-instruct"
WIDTH, LAYERS, RECORDS = 64, 2, 60


def practice(folder: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Write the model and the data into `folder` and return a recipe over them, with `key.path=value` overrides.

    Raises:
        UsageError: an override is wrong. SourceError: the tokenizer cannot be had.
    """
    folder = Path(folder)
    if not (folder / "model" / "config.json").is_file():
        _write_model(folder / "model")
    data = folder / "assistant.json"
    if not data.is_file():
        from minituner.quickstart import make_data

        make_data(data, "Xiaohai", "Ada", lang="both")
    values = {
        "name": "practice",
        "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
        "method": {"name": "full"},
        "data": {"sources": [{"path": str(data), "format": "openai", "limit": RECORDS}], "max_length": 256},
        "train": {"num_epochs": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "warmup_ratio": 0.1},
        "evaluate": {"every_steps": None, "prompts": []},
        "save": {"every_steps": None},
    }
    return Recipe.from_values(values, "the practice recipe", overrides)


def _write_model(folder: Path) -> None:
    """A new model of LAYERS layers under the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from minituner.model.loading import load_tokenizer, quiet
    from minituner.model.sources import fetch
    from minituner.train.zero import name_accelerator

    name_accelerator("cuda" if torch.cuda.is_available() else "cpu")  # accelerate imports DeepSpeed where one saves
    tokenizer = load_tokenizer(fetch(TOKENIZER, say=lambda line: None))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1,  # attention matters from the first step on
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
