"""Reading the catalog's lists, and composing recipes from them.

Settings come from these places; a later one replaces single values of an earlier one:

    method (by size) < _defaults of all data sets < the data set's recipe < its tuned entry < the name's suffixes

    compose("internlm2_1_8b_qlora_alpaca_e3")
      -> {"name": ..., "notes": ..., "model": {"name_or_path": "internlm/internlm2-1_8b"},
          "method": {"name": "qlora", "lora_rank": 64, ...},
          "data": {"sources": [{"path": "tatsu-lab/alpaca", "format": "alpaca", ...}], "template": "default", ...},
          "train": {"num_epochs": 3, "learning_rate": 2e-4, ...}, "evaluate": {...}, "save": {...}}

The result is a plain mapping: `Recipe.from_values` checks it. XTuner's config names work too. Only PyYAML is imported
here, because `list-cfg` and shell completion have to answer at once. Lesson: notebook 00.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from minituner.catalog.names import RecipeName, explain, parse, tokens
from minituner.errors import UsageError

_FOLDER = Path(__file__).parent
# libyaml's parser is the same safe loader in C, about six times as fast; a PyYAML built without it still works.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load(list_name: str) -> dict[str, Any]:
    """One list of the catalog (`models`, `methods`, `datasets`, `templates`, ...) as key -> entry; yours to change.

    Raises:
        UsageError: there is no such list.
    """
    return {key: deepcopy(entry) for key, entry in _read(list_name).items() if not key.startswith("_")}


@cache
def _read(list_name: str) -> dict[str, Any]:
    """A list as it stands in its file, `_defaults` and `_families` included. Shared: callers must not change it."""
    known = sorted(path.stem for path in _FOLDER.glob("*.yaml"))
    if list_name not in known:
        raise UsageError(f"the catalog has no list {list_name!r}", fix=f"there are: {', '.join(known)}")
    text = (_FOLDER / f"{list_name}.yaml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=_Loader)  # noqa: S506  (a safe loader, see above)


@cache
def _keys(list_name: str) -> dict[str, str]:
    """Spelling -> key, for the keys of a list and its further spellings in recipe names."""
    entries = _read(list_name)
    spellings = {key: key for key in entries if not key.startswith("_")}
    if list_name == "models":
        spellings |= {alias: key for key in list(spellings) for alias in entries[key].get("aliases", ())}
    if list_name == "datasets":
        spellings |= _read("xtuner_names")["datasets"]
    return spellings


@cache
def _model_names() -> dict[str, str]:
    """Every name of every model, in lower case -> key."""
    names = {spelling.lower(): key for spelling, key in _keys("models").items()}
    for key in load("models"):
        entry = _read("models")[key]
        for field in ("embedded", "hub", "modelscope"):
            if entry.get(field):
                names.setdefault(entry[field].lower(), key)
    return names


def find_model(name: str) -> dict[str, Any] | None:
    """The entry of a model named by key, embedded name, hub id or ModelScope id, with its `key`; None if unknown."""
    key = _model_names().get(name.lower())
    return None if key is None else {"key": key, **deepcopy(_read("models")[key])}


def find_template(key: str) -> dict[str, Any]:
    """A prompt template's fields (SYSTEM, INSTRUCTION, SUFFIX, SUFFIX_AS_EOS, SEP, STOP_WORDS), absent ones left out.

    Raises:
        UsageError: there is no such template; the nearest keys are given.
    """
    fields = deepcopy(_entry("templates", key, "template", "minituner list-templates"))
    del fields["for"]
    return fields


def system_prompt(key: str) -> str:
    """A system text of the catalog.

    Raises:
        UsageError: there is no such text; the nearest keys are given.
    """
    return _entry("system_prompts", key, "system text", "minituner list-templates")


def _entry(list_name: str, key: str, what: str, next_command: str) -> Any:
    entries = _read(list_name)
    if key not in entries:
        near = get_close_matches(key, list(entries), n=3, cutoff=0.5)
        fix = f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(entries)}"
        raise UsageError(f"no {what} named {key!r}", fix=fix, next_command=next_command)
    return entries[key]


def list_recipes(pattern: str | None = None) -> list[str]:
    """The names of all shipped recipes that contain `pattern` (case does not matter), sorted."""
    wanted = (pattern or "").lower()
    return [name for name in _all_names() if wanted in name.lower()]


@cache
def _all_names() -> tuple[str, ...]:
    methods = [key for key in _read("methods") if not key.startswith("_")]
    data = [f"{key}_e{entry['epochs']:g}" for key, entry in _read("datasets").items() if not key.startswith("_")]
    models = [key for key in _read("models") if not key.startswith("_")]
    return tuple(sorted(f"{model}_{method}_{ending}" for model in models for method in methods for ending in data))


def xtuner_name(name: str) -> str | None:
    """This catalog's name for an XTuner config name (most are the same); None if it has none."""
    name = _read("xtuner_names")["names"].get(name, name)
    parts = _parse(name)
    # XTuner leaves the epochs out only where a length or a number of steps says what the config is for.
    if parts is None or (parts.epochs is None and not parts.suffixes):
        return None
    return parts.text(default_epochs=_read("datasets")[parts.dataset]["epochs"])


def _parse(name: str) -> RecipeName | None:
    return parse(name, _keys("models"), _keys("methods"), _keys("datasets"))


def compose(name: str) -> dict[str, Any]:
    """The recipe of that name as a plain mapping of sections, for `Recipe.from_values`.

    Raises:
        UsageError: a part of the name is unknown (which one, and the nearest keys), or it is an XTuner config for
            something that minituner does not do.
    """
    ours = xtuner_name(name)
    parts = _parse(ours) if ours else None
    if parts is None:
        raise _unknown(name)
    model = _read("models")[parts.model]
    method = _read("methods")[parts.method]
    dataset = _read("datasets")[parts.dataset]
    tuned = next((t for t in dataset.get("tuned", ()) if (t["model"], t["method"]) == (parts.model, parts.method)), {})

    values: dict[str, Any] = {"name": name, "notes": ""}
    _merge(values, {"model": {"name_or_path": model.get("embedded") or model["hub"]}})
    _merge(values, {"method": method["method"], "data": {"sources": _sources(dataset), "template": model["template"]}})
    _merge(values, {"train": {"num_epochs": parts.epochs} | method["train"]})
    for step in method.get("by_size", ()):
        if step.get("at_least", 0) <= model["size"] < step.get("below", float("inf")):
            _merge(values, {section: step[section] for section in ("method", "train") if section in step})
    if "target_modules" in model and parts.method != "full":
        _merge(values, {"method": {"target_modules": model["target_modules"]}})
    _merge(values, _read("datasets")["_defaults"])
    if system := _sample_system(model, dataset):
        values["evaluate"]["system"] = system
    _merge(values, dataset.get("recipe", {}))
    _merge(values, tuned.get("recipe", {}))
    remarks = _apply_suffixes(values, parts, model)
    values["notes"] = "\n".join(_notes(ours, name, model, method, dataset, tuned) + remarks)
    return values


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Put `values` into nested mappings, replacing single values; copies, because the lists are shared."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _merge(into.setdefault(key, {}), value)
        else:
            into[key] = deepcopy(value)


def _sources(dataset: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The recipe's data.sources: the data set itself, or the places and data sets it is made of."""
    if "sources" not in dataset:
        return [{field: dataset[field] for field in ("path", "format", "split")}]
    found: list[dict[str, Any]] = []
    for source in dataset["sources"]:
        found += _sources(_read("datasets")[source]) if isinstance(source, str) else [dict(source)]
    return found


def _sample_system(model: Mapping[str, Any], dataset: Mapping[str, Any]) -> str | None:
    """The system text for sample chats: the one the format puts in front in training, if the template has a place."""
    key = dataset.get("system_prompt")
    if key is None or (model["template"] != "native" and "SYSTEM" not in find_template(model["template"])):
        return None
    return system_prompt(key)


def _apply_suffixes(values: dict[str, Any], parts: RecipeName, model: Mapping[str, Any]) -> list[str]:
    """Let the name's suffixes change the recipe; returns remarks for the notes."""
    data, train, given = values["data"], values["train"], parts.suffixes
    remarks = []
    if "max_length" in given:
        data["max_length"] = tokens(given["max_length"])
        if data["max_length"] > model["context"]:
            remarks.append(f"Rows of {data['max_length']} tokens, as named; the model was made for {model['context']}.")
    elif data["max_length"] > model["context"]:
        remarks.append(f"max_length is cut from {data['max_length']} to the model's {model['context']}.")
        data["max_length"] = model["context"]
    if "sequence_parallel" in given:
        size = int(given["sequence_parallel"])
        # As in XTuner: with as many micro-batches as ranks share a sequence, a step sees one sequence for each rank.
        train["gradient_accumulation_steps"] = size
        # Shared sequences need DeepSpeed's engine; a quantised base cannot be cut up by stage 3.
        zero = "zero2" if parts.method in {"qlora", "int8_lora"} else "zero3"
        values["distributed"] = {"sequence_parallel_size": size} | ({"zero": zero} if size > 1 else {})
    if "gpus" in given:
        count = int(given["gpus"])
        train["gradient_accumulation_steps"] = max(1, train.get("gradient_accumulation_steps", 4) // max(1, count))
        remarks.append(f"For {count} GPUs: NPROC_PER_NODE={count} keeps the batch of one GPU with accumulation.")
    if "max_steps" in given:
        train["max_steps"] = int(given["max_steps"])
    if "varlen" in given:
        data["isolate_documents"] = True
    return remarks


def _notes(
    ours: str,
    name: str,
    model: Mapping[str, Any],
    method: Mapping[str, Any],
    dataset: Mapping[str, Any],
    tuned: Mapping[str, Any],
) -> list[str]:
    size = f"{model['size'] / 1e9:.3g}e9"
    lines = [f"{model['family']}, {size} parameters, {model['licence']}. {model.get('notes') or ''}".rstrip()]
    if not model["native"]:
        lines.append(f"Needs {model['needs']}. Read that code first, then set model.trust_remote_code=true.")
    if model["kind"] == "base" and dataset.get("format") not in {"pretrain", "tokenized"}:
        lines.append(f"A base model: it learns the template {model['template']!r} here, so chat with that one.")
    if "target_modules" in model and method["method"]["name"] != "full":
        lines.append("Adapters on attention only: on experts they would make a copy of all their weights in each step.")
    lines += [method["for"], dataset["for"], f"Data licence: {dataset.get('licence') or 'none named'}."]
    if ours != name:
        lines.append(f"The same recipe as {ours}.")
    if tuned.get("notes"):
        lines.append(tuned["notes"].rstrip())
    return lines


def _unknown(name: str) -> UsageError:
    """The error for a name that composes nothing."""
    for kind in _read("xtuner_names")["not_here"]:
        if re.search(kind["pattern"], name, re.IGNORECASE):
            return UsageError(f"{name!r} is {kind['what']}", fix=kind["instead"], next_command="minituner list-cfg")
    problems, corrected, pattern = explain(name, _keys("models"), _keys("methods"), _keys("datasets"))
    return UsageError(
        f"no recipe named {name!r}",
        why="; ".join(problems),
        fix=f"a name is {{model}}_{{method}}_{{dataset}}_e{{epochs}}, e.g. {corrected}"
        if "{" not in corrected
        else "a name is {model}_{method}_{dataset}_e{epochs}, e.g. smollm2_135m_instruct_lora_personal_assistant_e3",
        next_command=f"minituner list-cfg -p {pattern}" if pattern else "minituner list-cfg",
    )
