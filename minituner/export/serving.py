"""What vLLM, LMDeploy and transformers read of a model folder, checked without installing them.

    config.json             architectures, model_type     which of their model classes; no code of the folder's own
    *.safetensors, index    every tensor there            no pickles, no left-over quantisation
    tokenizer.json ...      a fast tokenizer              and a chat template that renders a conversation
    generation_config.json  eos_token_id                  where an answer ends: the stop token that was trained

A folder that loads everywhere and never stops, or is asked in another template, is the usual way a good training seems
bad. Sources: vLLM's `--generation-config` (default: the folder's), LMDeploy's use of the Hugging Face chat template.
Lesson: notebook 09.
"""

from __future__ import annotations

import json
from pathlib import Path

from minituner.errors import MinitunerError
from minituner.export.weights import Weights, read_config, refuse_remote_code


def serving_problems(folder: str | Path) -> list[str]:
    """What would keep a full model's folder from being served as it was trained; empty if nothing would."""
    folder = Path(folder)
    problems: list[str] = []
    try:
        refuse_remote_code(folder)
        config = read_config(folder)
        names = Weights.of(folder).entries
    except MinitunerError as error:
        return [error.what]
    if not config.get("architectures"):
        problems.append("config.json names no architectures, by which vLLM and LMDeploy choose the model class")
    if any(entry.file.suffix != ".safetensors" for entry in names.values()):
        problems.append("the weights are pickles (.bin), not safetensors")
    if config.get("quantization_config"):
        problems.append("config.json still speaks of quantised weights")
    if not (folder / "tokenizer.json").is_file():
        problems.append("there is no tokenizer.json (the fast tokenizer)")
    return problems + _of_conversation(folder)


def _of_conversation(folder: Path) -> list[str]:
    """Problems with the template and the stop ids."""
    from minituner.data.encoding import stop_rule
    from minituner.export.beside import FACTS
    from minituner.model.loading import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except MinitunerError as error:
        return [error.what]
    if not tokenizer.chat_template:
        return ["there is no chat template, so a chat server cannot ask it"]
    facts_file = folder / FACTS
    facts = json.loads(facts_file.read_text(encoding="utf-8")) if facts_file.is_file() else {}
    trained = stop_rule(tokenizer, facts.get("template") or "native")[0]
    file = folder / "generation_config.json"
    if not file.is_file():
        return ["there is no generation_config.json, where servers read what ends an answer"]
    ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    known = ids if isinstance(ids, list) else [ids]
    if trained[0] not in known:
        return [f"generation_config.json ends answers with {known}, and training ended them with {trained[0]}"]
    return []
