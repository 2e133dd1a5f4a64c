"""The grammar of recipe names: taking a name apart, and saying which part of a wrong one is wrong.

    internlm2_1_8b _ qlora _ alpaca _ e3 _ 32k_sp4
    `-- model ---'   method  data set epochs  suffixes

Keys contain underscores themselves (`qwen1_5_4b`, `alpaca_enzh`), so a name is read with the keys at hand, the longest
key first. A part that is no key is named together with the nearest keys, part by part: the nearest whole name would
be right in three parts and hide which one to change.

A length may also stand before the epochs (`alpaca_512_e3`), as in XTuner's names. Lesson: notebook 00.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

# What may follow the epochs; XTuner's names use all of these.
SUFFIXES = {
    "gpus": r"gpu([1-9]\d*)|([1-9]\d*)gpus",
    "sequence_parallel": r"sp([1-9]\d*)|sequence_parallel_([1-9]\d*)",
    "max_length": r"([1-9]\d*[kKmM]|[1-9]\d+)",
    "max_steps": r"([1-9]\d*)iters",
    "varlen": r"(varlen)",
    "other": r"(hf|openmind)",
}
_ANY_SUFFIX = "|".join(f"(?:{pattern})" for pattern in SUFFIXES.values())
_EPOCHS = r"_e(\d+(?:\.\d+)?)"
_TAIL = re.compile(rf"(?:_([1-9]\d+))?(?:{_EPOCHS})?((?:_(?:{_ANY_SUFFIX}))*)")


@dataclass(frozen=True, slots=True)
class RecipeName:
    """A recipe's name, taken apart; `epochs` is None where the name gives none."""

    model: str
    method: str
    dataset: str
    epochs: float | None
    suffixes: dict[str, str] = field(default_factory=dict)

    def text(self, default_epochs: float = 1) -> str:
        """The name in this catalog's spelling, with `default_epochs` where it has none."""
        epochs = default_epochs if self.epochs is None else self.epochs
        ends = [_spell(kind, value) for kind, value in self.suffixes.items()]
        return "_".join([self.model, self.method, self.dataset, f"e{epochs:g}", *ends])


def _spell(kind: str, value: str) -> str:
    return {"gpus": f"gpu{value}", "sequence_parallel": f"sp{value}", "max_steps": f"{value}iters"}.get(kind, value)


def parse(
    name: str, models: Mapping[str, str], methods: Collection[str], datasets: Mapping[str, str]
) -> RecipeName | None:
    """Take `name` apart, or return None.

    Args:
        models, datasets: spelling -> key.
        methods: keys.
    """
    for model in _starts(name, models):
        rest = name[len(model) + 1 :]
        for method in _starts(rest, methods):
            ending = rest[len(method) + 1 :]
            for dataset in _starts(ending, datasets):
                match = _TAIL.fullmatch(ending[len(dataset) :])
                if match is None or (match[2] and float(match[2]) == 0):
                    continue
                suffixes = _read_suffixes((f"_{match[1]}" if match[1] else "") + match[3])
                if suffixes is None:
                    continue
                epochs = _number(match[2]) if match[2] else None
                return RecipeName(models[model], method, datasets[dataset], epochs, suffixes)
    return None


def tokens(text: str) -> int:
    """The length a suffix means: `512` -> 512, `32k` -> 32768, `1M` -> 1048576."""
    factor = {"k": 1024, "m": 1024**2}.get(text[-1].lower())
    return int(text[:-1]) * factor if factor else int(text)


def _starts(text: str, keys: Collection[str]) -> Iterator[str]:
    """The keys that `text` starts with, the longest first."""
    yield from sorted((key for key in keys if text == key or text.startswith(key + "_")), key=len, reverse=True)


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _read_suffixes(text: str) -> dict[str, str] | None:
    """Kind -> value; None where one kind stands twice (which of the two counts would be a guess)."""
    found: dict[str, str] = {}
    # `sequence_parallel_4` contains underscores itself, so the text is matched piece by piece, not split.
    while text:
        for kind, pattern in SUFFIXES.items():
            if match := re.match(rf"_(?:{pattern})(?=_|$)", text):
                if kind in found:
                    return None
                found[kind] = next(group for group in match.groups() if group)
                text = text[match.end() :]
                break
    return found


def explain(
    name: str, models: Mapping[str, str], methods: Collection[str], datasets: Mapping[str, str]
) -> tuple[list[str], str, str]:
    """Say which parts of an unknown name are unknown.

    Returns:
        the problems, one sentence each; a corrected name (or the pattern of names); a pattern to list by.
    """
    problems: list[str] = []
    body, epochs = _cut_epochs(name, problems)
    model, method, dataset = _split(body, models, methods, datasets)
    parts = []
    for what, part, keys in (
        ("model", model, models),
        ("method", method, methods),
        ("data set", dataset, datasets),
    ):
        near = [part] if part in keys else get_close_matches(part, list(keys), n=3, cutoff=0.5)
        if part not in keys:
            hint = f"nearest: {', '.join(near)}" if near else f"there are {_some(keys)}"
            problems.append(f"{what} {part!r} is unknown ({hint})" if part else f"the {what} is missing ({hint})")
        parts.append(near[0] if near else "")
    if not problems:
        problems.append("every part is known, but an ending stands twice or there is an underscore too many")
    corrected = "_".join([*parts, epochs]) if all(parts) else "{model}_{method}_{dataset}_e{epochs}"
    return problems, corrected, parts[0] or (model.split("_")[0] if model else "")


def _cut_epochs(name: str, problems: list[str]) -> tuple[str, str]:
    """Cut `_e3` and what follows off `name`; say what is wrong with it."""
    if match := re.search(rf"{_EPOCHS}((?:_(?:{_ANY_SUFFIX}))*)$", name):
        if float(match[1]) == 0:
            problems.append(f"epochs 'e{match[1]}' must be above 0")
            return name[: match.start()], "e1"
        return name[: match.start()], f"e{match[1]}"
    if match := re.search(rf"{_EPOCHS}_(.+)$", name):
        problems.append(f"ending {match[2]!r} is unknown (there are gpu8, sp4, varlen, 32k, 400iters and the like)")
        return name[: match.start()], f"e{match[1]}"
    if match := re.search(r"_e([^_]*)$", name):
        problems.append(f"epochs 'e{match[1]}' is no number of epochs (e1, e3, e0.5)")
        return name[: match.start()], "e3"
    problems.append("the epochs are missing (e1, e3, e0.5)")
    return name, "e3"


def _split(
    body: str, models: Mapping[str, str], methods: Collection[str], datasets: Mapping[str, str]
) -> tuple[str, str, str]:
    """The best guess at where model, method and data set of a name without epochs begin and end."""
    for method in sorted(methods, key=len, reverse=True):
        if f"_{method}_" in f"_{body}_":
            model, _, dataset = f"_{body}_".partition(f"_{method}_")
            return model.strip("_"), method, dataset.strip("_")
    model = next(_starts(body, models), "")
    rest = body[len(model) :].strip("_")
    ends = sorted((key for key in datasets if rest == key or rest.endswith("_" + key)), key=len, reverse=True)
    if ends:
        rest, dataset = rest[: len(rest) - len(ends[0])].strip("_"), ends[0]
        if not model:
            model, _, rest = rest.rpartition("_")
        return model, rest, dataset
    if model:
        method, _, dataset = rest.partition("_")
        return model, method, dataset
    return body, "", ""


def _some(keys: Collection[str]) -> str:
    shown = list(keys)[:8]
    return ", ".join(shown) + (f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else "")
