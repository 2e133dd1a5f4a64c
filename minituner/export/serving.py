"""What transformers, `transformers serve`, vLLM and LMDeploy read of a model folder, checked without installing them.

    config.json             architectures, model_type     which of their model classes; no code of the folder's own
    *.safetensors, index    every tensor there            no pickles, no left-over quantisation
    tokenizer.json ...      a fast tokenizer              and a chat template that renders a conversation
    generation_config.json  eos_token_id                  where an answer ends: the stop token that was trained

A folder that loads everywhere and never stops, or is asked in another template, is the usual way a good training seems
bad. The programs differ in what ends an answer: transformers takes generation_config.json alone, vLLM and LMDeploy
add the tokenizer's own end token. Sources: vLLM's `SamplingParams.update_from_generation_config`, and its option
`--generation-config` (default: the folder's); LMDeploy's `GenerationConfig.update_from_hf_gen_cfg`, `HFChatTemplate`,
and its templates that are chosen by words in the folder's path. Lesson: notebook 09.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from minituner.errors import MinitunerError, UsageError
from minituner.export.weights import Weights, read_config, refuse_remote_code

PROGRAMS = ("transformers", "transformers serve", "vLLM", "LMDeploy")
ADDS_THE_TOKENIZERS_END = ("vLLM", "LMDeploy")


@dataclass(frozen=True, slots=True)
class Reading:
    """What one program reads in one place; `problem` is wrong with the folder, `note` is worth knowing."""

    program: str
    item: str
    found: str
    problem: str | None = None
    note: str | None = None


def serving_problems(folder: str | Path) -> list[str]:
    """What would keep a full model's folder from being served as it was trained; empty if nothing would."""
    return list(dict.fromkeys(r.problem for r in what_servers_read(folder) if r.problem))


def what_servers_read(folder: str | Path) -> list[Reading]:
    """What each program takes from a full model's folder: architecture, weights, tokenizer, template, stop ids."""
    folder = Path(folder)
    try:
        refuse_remote_code(folder)
        config = read_config(folder)
        weights = Weights.of(folder)
    except MinitunerError as error:
        return [Reading(program, "folder", "cannot be loaded", error.what) for program in PROGRAMS]
    try:
        conversation = [*_tokenizer(folder), *_of_conversation(folder)]
    except MinitunerError as error:
        conversation = [Reading(program, "tokenizer", "none", error.what) for program in PROGRAMS]
    readings = [*_architecture(config), *_weights(weights, config), *conversation]
    return sorted(readings, key=lambda reading: PROGRAMS.index(reading.program))


def refuse_gguf(folder: str | Path, out: str | Path) -> NoReturn:
    """Say that no GGUF file is written here, and with what command llama.cpp writes it of this folder.

    Raises:
        UsageError: always; it names what has to be done first where the folder is no full model of safetensors.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"{folder} is an adapter, and a GGUF file holds a whole model",
            fix="merge it, then let llama.cpp convert the merged folder (minituner itself writes no GGUF)",
            next_command=f"minituner convert merge {folder} MERGED",
        )
    refuse_remote_code(folder)
    Weights.of(folder)
    raise UsageError(
        "minituner writes no GGUF files",
        why="the format changes with llama.cpp, and the gguf package reads and writes its container, no model",
        fix="llama.cpp's own script does it, from its sources: the steps are in notebooks/export.md",
        next_command=f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile {out} --outtype f16",
    )


def table(readings: list[Reading]) -> list[str]:
    """The readings as lines of text, a block for each program; problems and notes below what they are about."""
    lines: list[str] = []
    for program in PROGRAMS:
        own = [reading for reading in readings if reading.program == program]
        lines.append(program)
        for reading in own:
            lines.append(f"  {reading.item:14} {reading.found}")
            lines += [f"  {'':14} PROBLEM: {reading.problem}"] if reading.problem else []
            lines += [f"  {'':14} note: {reading.note}"] if reading.note else []
    return lines


def _architecture(config: dict[str, Any]) -> list[Reading]:
    from minituner.catalog.lookup import load

    names = config.get("architectures") or []
    if not names:
        why = "config.json names no architectures, by which vLLM and LMDeploy choose the model class"
        return [Reading(program, "architecture", "none", why) for program in PROGRAMS]
    lists = load("servers")
    readings = []
    for program in PROGRAMS:
        listed = names[0] in lists.get(program.lower(), names)
        found = names[0] if program not in ADDS_THE_TOKENIZERS_END else f"{names[0]} ({'' if listed else 'not '}listed)"
        note = None
        if not listed:
            other = "it would use transformers' implementation" if program == "vLLM" else "see its supported models"
            note = f"{program} had no class of its own for {names[0]} when the list was made; {other}"
        readings.append(Reading(program, "architecture", found, note=note))
    return readings


def _weights(weights: Weights, config: dict[str, Any]) -> list[Reading]:
    kinds = sorted({str(entry.dtype).removeprefix("torch.") for entry in weights.entries.values()})
    files = {entry.file for entry in weights.entries.values()}
    found = f"{len(weights.entries)} tensors, {len(files)} file{'s' if len(files) != 1 else ''}, {', '.join(kinds)}"
    problem = None
    if any(file.suffix != ".safetensors" for file in files):
        problem = "the weights are pickles (.bin), not safetensors"
    elif config.get("quantization_config"):
        problem = "config.json still speaks of quantised weights"
    rounded = "float32 is rounded to 16 bits there: convert with --dtype bf16 to see the same numbers here"
    notes = {"vLLM": f"{rounded}, or serve with --dtype float32", "LMDeploy": rounded} if kinds == ["float32"] else {}
    return [Reading(program, "weights", found, problem, notes.get(program)) for program in PROGRAMS]


def _tokenizer(folder: Path) -> list[Reading]:
    fast = (folder / "tokenizer.json").is_file()
    problem = None if fast else "there is no tokenizer.json (the fast tokenizer)"
    return [Reading(p, "tokenizer", "tokenizer.json" if fast else "no fast one", problem) for p in PROGRAMS]


def _of_conversation(folder: Path) -> list[Reading]:
    """The template and the stop ids.

    Raises:
        MinitunerError: the tokenizer cannot be read.
    """
    from minituner.data.encoding import stop_rule
    from minituner.export.beside import FACTS
    from minituner.model.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        why = "there is no chat template, so a chat server cannot ask it"
        return [Reading(program, "chat template", "none", why) for program in PROGRAMS]
    facts_file = folder / FACTS
    facts = json.loads(facts_file.read_text(encoding="utf-8")) if facts_file.is_file() else {}
    template = facts.get("template") or "native"
    trained = stop_rule(tokenizer, template)[0][0]
    own = "chat_template.jinja" if (folder / "chat_template.jinja").is_file() else "in tokenizer_config.json"
    by_path = "it picks templates of its own by words in the folder's path; --chat-template hf takes the folder's"
    readings = [
        Reading(p, "chat template", f"{own} ({template})", note=by_path if p == "LMDeploy" else None) for p in PROGRAMS
    ]
    texts = facts.get("stop_texts")
    note = f"training also ended answers with the texts {texts}: send them as `stop`" if texts else None
    return readings + [_stop_ids(folder, program, tokenizer.eos_token_id, trained, note) for program in PROGRAMS]


def ids_that_end(program: str, generation_config: Mapping[str, Any], tokenizers: int | None) -> list[int]:
    """The token ids that end an answer in `program`; `tokenizers` is the tokenizer's own end token."""
    ids = generation_config.get("eos_token_id")
    listed = {i for i in (ids if isinstance(ids, list) else [ids]) if i is not None}
    if program in ADDS_THE_TOKENIZERS_END and tokenizers is not None:
        listed.add(tokenizers)
    return sorted(listed)


def _stop_ids(folder: Path, program: str, tokenizers: int | None, trained: int, note: str | None) -> Reading:
    """What ends an answer in `program`, and whether the trained stop token does."""
    file = folder / "generation_config.json"
    if not file.is_file():
        why = "there is no generation_config.json, where servers read what ends an answer"
        return Reading(program, "stop ids", "none", why, note)
    settings = json.loads(file.read_text(encoding="utf-8"))
    ids, listed = (ids_that_end(p, settings, tokenizers) for p in (program, "transformers"))
    why = f"generation_config.json ends answers with {listed}, and training ended them with {trained}"
    return Reading(program, "stop ids", ", ".join(map(str, ids)) or "none", None if trained in ids else why, note)
