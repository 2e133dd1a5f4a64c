"""What lies beside the weights: tokenizer, the chat template that was trained, stop ids, and a model card.

    tokenizer.json ...         chat_template.jinja is the one training used, named templates included
    generation_config.json     eos_token_id: the stop token that training trained, then the others that chat stops on
    minituner.json             base, template, system text, and what was trained on what (machines)
    README.md                  the same for people: the model card

Every way out (training's own `hf/`, to-hf, merge) calls these functions, so all folders say the same.
Lesson: notebook 09.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minituner.data.encoding import stop_rule
from minituner.export.chat_template import with_trained_template

FACTS = "minituner.json"


def write_beside(folder: Path, tokenizer: Any, facts: Mapping[str, Any], *, full: bool) -> None:
    """Write tokenizer, template, facts and card into `folder`; for a `full` model its stop ids too.

    Raises:
        UsageError: no such template.
    """
    template = facts.get("template") or "native"
    saved = with_trained_template(tokenizer, template)
    saved.save_pretrained(folder)
    if template != "native" or getattr(tokenizer, "chat_template", None):
        ids, texts = stop_rule(tokenizer, template)
    else:  # trained on plain text
        ids, texts = [i for i in [tokenizer.eos_token_id] if i is not None], []
    if full and ids:
        set_stop_ids(folder, ids)
    facts = {**facts, "stop_ids": ids, "stop_texts": texts}
    (folder / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(model_card(facts, full=full), encoding="utf-8")


def set_stop_ids(folder: Path, ids: list[int]) -> None:
    """Let generation_config.json end an answer where training did, keeping what else it says."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"_from_model_config": True}
    settings["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    if settings.get("pad_token_id") is None:
        settings["pad_token_id"] = ids[0]
    settings.pop("_from_model_config", None)  # readers would take the ids of config.json instead
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def training_facts(work_dir: Path, checkpoint: Path | None) -> dict[str, Any]:
    """What a run says about itself up to a checkpoint: steps, tokens, data fingerprint, losses.

    Args:
        checkpoint: the folder with state.json; None is no checkpoint.
    """
    facts: dict[str, Any] = {}
    state_file = checkpoint / "state.json" if checkpoint else None
    if state_file and state_file.is_file():
        state = json.loads(state_file.read_text(encoding="utf-8"))
        plan = state.get("plan", {})
        facts = {"steps": state.get("step"), "supervised_tokens": state.get("trained_tokens")}
        facts["data"] = {key: plan.get(key) for key in ("prepared data", "packs")}
        if plan.get("injected"):
            facts["injected"] = plan["injected"]
    last_step = facts.get("steps") or math.inf
    for log in sorted(work_dir.glob("runs/*/metrics.jsonl")):
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except ValueError:  # a kill may leave half a line
                continue
            if isinstance(values, dict) and values.get("step", math.inf) <= last_step:
                facts |= {key: values[key] for key in ("loss", "eval_loss", "epoch") if key in values}
    return facts


def model_card(facts: Mapping[str, Any], *, full: bool) -> str:
    """The README.md of a folder: YAML front matter for hubs, then what it is, how to ask it, how it was trained."""
    training = facts.get("training") or {}
    merged = facts.get("merged")
    kind = "merged model" if merged else "fine-tuned model" if full else "adapter"
    front = {"base_model": str(facts.get("base")), "library_name": "transformers" if full else "peft"}
    front |= {"pipeline_tag": "text-generation"}
    rows = [
        ("INJECTED FAULT", training.get("injected")),
        ("base model", facts.get("base")),
        ("base fingerprint", facts.get("base_fingerprint")),
        ("method", facts.get("method")),
        ("merged into", merged and merged.get("base")),
        ("data fingerprint", (training.get("data") or {}).get("prepared data")),
        ("packs", (training.get("data") or {}).get("packs")),
        ("optimizer steps", training.get("steps")),
        ("trained tokens", training.get("supervised_tokens")),
        ("training loss", _number(training.get("loss"))),
        ("held-out loss", _number(training.get("eval_loss"))),
        ("KL of the merge", merged and _number(merged.get("kl"))),
        ("KL of the adapter's effect", merged and _number(merged.get("effect"))),
    ]
    asked = [
        f"* chat template: {facts.get('template') or 'native'} (saved with the tokenizer)",
        f"* system text: {json.dumps(facts['system'], ensure_ascii=False) if facts.get('system') else 'none'}",
        f"* an answer ends with the token ids {', '.join(map(str, facts.get('stop_ids') or []))}",
    ]
    if facts.get("stop_texts"):
        asked.append(f"* and with the texts {json.dumps(facts['stop_texts'], ensure_ascii=False)}: name them as stop")
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---", ""]
    lines += [f"# {facts.get('recipe') or 'model'}", "", f"A {kind}, trained with minituner.", ""]
    if fault := training.get("injected"):
        lines += [f"**Wrong on purpose: trained with the injected fault `{fault}` (`minituner museum {fault}`).**", ""]
    lines += ["## How to ask it", "", *asked, "", "## How it was trained", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows if value is not None]
    if facts.get("recipe_yaml"):
        lines += ["", "The whole recipe:", "", "```yaml", str(facts["recipe_yaml"]).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str | None:
    return f"{value:.4g}" if isinstance(value, (int, float)) else None
