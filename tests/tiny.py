"""The tests' model: a tiny Llama and a byte-level tokenizer with a ChatML template, built from code in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHATML) -> Any:
    """256 bytes and three control tokens: <|endoftext|> (256), <|im_start|> (257), <|im_end|> (258, end and pad)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(seed: int = 0, *, tie: bool = True, layers: int = 2) -> Any:
    """A Llama with 2 layers, width 32, 4 heads over 2 key-value heads, 259 tokens, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tie,
        initializer_range=0.2,  # large enough for attention to matter in tests of isolation
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=258,
    )
    model = LlamaForCausalLM(config)
    # transformers zeroes the pad token's row; here it is the stop token's too, which could then never be answered.
    torch.nn.init.normal_(model.model.embed_tokens.weight.data[258], std=0.2)
    return model


def tiny_folder(folder: Path, **options: Any) -> Path:
    """A model folder that `train` can be given."""
    tiny_model(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_chats(path: Path, count: int = 12) -> Path:
    """A JSON-lines file of small single- and two-turn chats of different lengths."""
    rows = []
    for i in range(count):
        turns = [("user", f"What is {i}?"), ("assistant", "It is " + "very " * (i % 5) + f"{i}.")]
        turns += [("user", "再说一遍"), ("assistant", f"是{i}。")] if i % 3 == 0 else []
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, data: Path, /, **sections: dict[str, Any]) -> Any:
    """A recipe over the tiny model: LoRA on everything, packs of 128, float32."""
    from minituner import Recipe

    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"name_or_path": str(folder), "dtype": "float32"},
        "method": {"name": "lora", "lora_rank": 4, "lora_alpha": 8},
        "data": {"sources": [{"path": str(data), "format": "openai"}], "max_length": 128},
        "train": {"num_epochs": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2},
        "evaluate": {"prompts": ["Hi"], "max_new_tokens": 4, "every_steps": None},
        "save": {"every_steps": None},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return Recipe.from_values(values)
