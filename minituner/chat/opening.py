"""Opening a model for chat: what was asked for becomes weights, tokenizer, template and system text.

    open_model("work_dirs/ada/hf")                      an adapter: its base is found in minituner.json
    open_model("base", ["work_dirs/ada/hf", "b=other"]) one base, several adapters, each with a name
    open_model("tuned", compare=True)                   a fully fine-tuned model, and what it was made from

An adapter of another base is refused, code that comes with a model is not run unless asked for, and template and system
text are those of the training. Lesson: notebook 09.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minituner.chat.loaded import BASE, TUNED, LoadedModel, Voice
from minituner.errors import MinitunerError, UsageError, nearest
from minituner.recipe import SHORT_DTYPES

METHOD_OF_BITS = {None: "lora", 4: "qlora", 8: "int8_lora"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "qwen.tiktoken")


def open_model(
    model: str | Path,
    adapters: Sequence[str | Path] = (),
    *,
    dtype: str = "auto",
    bits: int | None = None,
    compare: bool = False,
    trust_remote_code: bool = False,
    other_base: bool = False,
    say: Callable[[str], None] = print,
) -> LoadedModel:
    """Load a model for one or many conversations.

    Args:
        model: a catalog name, a full model's folder, or an adapter's `hf/` folder (its base is found).
        adapters: folders, each with a name in front if wanted: `NAME=FOLDER`.
        dtype: auto, float32, bfloat16 or float16 (fp32, bf16, fp16).
        bits: 4 or 8 holds the base quantised.
        compare: refuse a model with nothing to compare, and load what a full fine-tuning started from.
        other_base: use an adapter although it was trained on a base with other weights (of the same shapes).

    Raises:
        UsageError: adapters that are none, or another model's; a dtype or number of bits that does not exist; code of
            the model's own without `trust_remote_code`. MinitunerError: the model cannot be loaded.
    """
    from minituner.export.merge import check_adapter
    from minituner.model.sources import fetch
    from minituner.train.hf_folder import base_of, facts_of, put_adapter_on

    folder = Path(model)
    if (folder / "adapter_config.json").is_file():
        if adapters:
            raise UsageError(
                f"{model} is an adapter itself; give its base, or leave --adapter out",
                fix=f"minituner chat {base_of(folder)} --adapter {model} --adapter {adapters[0]}",
            )
        adapters, model = [folder], base_of(folder)
    named = name_adapters(adapters)
    for place in named.values():
        check_adapter(place)
    base = fetch(str(model), say=say)
    if dtype == "auto" and bits is not None and named:  # only weights in this data type become the same bits again
        dtype = str(facts_of(next(iter(named.values()))).get("dtype") or dtype)
    load = Loader(dtype, bits, trust_remote_code)
    facts = facts_of(base)
    before = base_name = None
    if compare and not named:
        base_name = facts.get("base") if facts.get("method") == "full" else None
        if base_name is None:
            raise UsageError(
                f"{model} has nothing to be compared with: it is no fine-tuned model, and there is no --adapter",
                fix="give --adapter FOLDER, or the hf/ folder of a training",
            )
        before = load.model(fetch(base_name, say=say))
    loaded = load.model(base)
    if not named:
        voice = Voice(facts.get("template") or "native", facts.get("system"), load.tokenizer(base), base)
        return LoadedModel(
            loaded,
            voice.tokenizer,
            {TUNED: voice, BASE: voice} if before is not None else {BASE: voice},
            before=before,
            where=str(model),
        )
    from minituner.model.fingerprint import fingerprint

    mark, voices = fingerprint(loaded), {}
    for name, place in named.items():
        loaded = put_adapter_on(loaded, place, say, name=name, base_fingerprint=mark, other_base=other_base)
        facts = facts_of(place)
        if facts.get("method") in ("qlora", "int8_lora") and bits is None:
            number = 4 if facts["method"] == "qlora" else 8
            say(f"{name} was trained over a base in {number} bits; --bits {number} is exactly that base")
        tokenizer = load.tokenizer(place if has_tokenizer(place) else base)
        voices[name] = Voice(facts.get("template") or "native", facts.get("system"), tokenizer, place)
    loaded.set_adapter(next(iter(named)), inference_mode=True)
    loaded.eval()
    first = next(iter(voices.values()))
    return LoadedModel(loaded, first.tokenizer, {**voices, BASE: first}, where=str(model))


def name_adapters(adapters: Sequence[str | Path]) -> dict[str, Path]:
    """Name -> folder, in the order given: `NAME=FOLDER`, or a name made from the folder (`ada` for `ada/hf`).

    Raises:
        UsageError: a folder that is no adapter, or a name that is taken.
    """
    named: dict[str, Path] = {}
    for entry in adapters:
        given, _, place = str(entry).partition("=") if isinstance(entry, str) else ("", "", entry)
        if not place or "/" in given or Path(str(entry)).exists():
            given, place = "", entry
        folder = Path(place).expanduser()
        if not (folder / "adapter_config.json").is_file():
            raise UsageError(
                f"--adapter {entry} is not an adapter folder (it has no adapter_config.json)",
                fix="give the hf/ folder of a finished LoRA run",
            )
        whole = folder.resolve()
        # peft makes the name a part of parameter names, where a dot would begin a new module.
        stem = given or re.sub(r"\W+", "-", whole.parent.name if whole.name == "hf" else whole.name).strip("-")
        if given and not re.fullmatch(r"[\w-]+", given):
            raise UsageError(f"--adapter {entry}: {given!r} is no name", fix="use letters, digits, - and _")
        if given in (BASE, *named):
            raise UsageError(f"--adapter {entry}: the name {given!r} is taken", fix="give it another: NAME=FOLDER")
        taken, name, number = {BASE, *named}, stem or "adapter", 2
        while name in taken:
            name, number = f"{stem or 'adapter'}-{number}", number + 1
        named[name] = folder
    return named


class Loader:
    """Loads models alike: one data type, one number of bits, one answer to code of the model's own."""

    def __init__(self, dtype: str = "auto", bits: int | None = None, trust_remote_code: bool = False) -> None:
        self.dtype, self.bits, self.trust_remote_code = SHORT_DTYPES.get(dtype, dtype), bits, trust_remote_code
        known = ("auto", *SHORT_DTYPES.values())
        if self.dtype not in known:
            raise UsageError(
                f"--dtype {dtype} is unknown",
                fix=nearest(dtype, [*known, *SHORT_DTYPES]) or f"one of {', '.join(known)}",
            )
        if bits not in METHOD_OF_BITS:
            raise UsageError(f"--bits {bits}", why="a base is quantised to 4 or 8 bits", fix="--bits 4, or --bits 8")
        if bits is not None:
            import importlib.util

            if importlib.util.find_spec("bitsandbytes") is None:
                raise UsageError(
                    f"--bits {bits} needs the package bitsandbytes",
                    fix="install it, or leave --bits out",
                    next_command="pip install 'minituner[quantization]'",
                )

    def model(self, folder: Path) -> Any:
        """The weights of a folder, for answering."""
        from minituner.model.loading import load_model
        from minituner.recipe import MethodSection, ModelSection

        refuse_own_code(folder, self.trust_remote_code)
        section = ModelSection(
            name_or_path=str(folder),
            dtype=self.dtype,
            attention=self._attention(folder),
            trust_remote_code=self.trust_remote_code,
        )
        loaded, _, _ = load_model(
            folder, section, MethodSection(name=METHOD_OF_BITS[self.bits]), one_document_rows=True
        )
        return loaded.eval()

    def _attention(self, folder: Path) -> str:
        """transformers' own; written out where a model needs what its SDPA does not know."""
        from transformers import AutoConfig

        from minituner.model.attention import needs_of

        try:
            needs = needs_of(AutoConfig.from_pretrained(str(folder), trust_remote_code=self.trust_remote_code))
        except (OSError, ValueError, KeyError):
            return "sdpa"  # loading the model says what is wrong with the folder
        return "eager" if needs.softcap or needs.sinks or not needs.sdpa else "sdpa"

    def tokenizer(self, folder: Path) -> Any:
        """The tokenizer of a folder.

        Raises:
            MinitunerError: it has none. UsageError: it wants to run code of its own.
        """
        from minituner.model.loading import load_tokenizer

        refuse_own_code(folder, self.trust_remote_code)
        if not has_tokenizer(folder) and not self.trust_remote_code:
            raise MinitunerError(
                f"{folder} has no tokenizer",
                why=f"none of {', '.join(TOKENIZER_FILES[:3])} is there",
                fix="copy the tokenizer's files of the base model into it",
            )
        return load_tokenizer(folder, trust_remote_code=self.trust_remote_code)


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer's own files lie in a folder."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def refuse_own_code(folder: Path, trusted: bool) -> None:
    """Refuse a folder that can be loaded only by running Python code that lies in it.

    transformers itself would ask on the terminal, and wait for an answer.

    Raises:
        UsageError: naming the files that want to run, and the flag that lets them.
    """
    if trusted:
        return
    from transformers import CONFIG_MAPPING  # by its module's path, all folders of models would be listed first

    wanted: dict[str, str] = {}
    for file in ("config.json", "tokenizer_config.json"):
        try:
            values = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # loading says what is wrong with it
        own = values.get("auto_map")
        if own and not (file == "config.json" and values.get("model_type") in CONFIG_MAPPING):
            wanted[file] = ", ".join(str(v) for v in own.values()) if isinstance(own, dict) else str(own)
    if "config.json" in wanted or (wanted and not (folder / "tokenizer.json").is_file()):
        code = sorted(path.name for path in folder.glob("*.py"))
        raise UsageError(
            f"{folder} can be loaded only by running code of its own: {'; '.join(wanted.values())}",
            why="such code can do anything that you can; transformers has no class of its own for this model",
            fix=f"read {', '.join(code) if code else 'the code it refers to'}, then add --trust-remote-code",
        )
