"""Parity: one conversation through every door, and the token ids that come out of each.

    training            encode(...)                     the ids in front of the last answer
    chat and web        Session.prompt_ids              what a conversation sends (the web page asks the same session)
    chat template       apply_chat_template             the saved folder, through transformers alone
    exported            the same of another folder      merged, split, or written once more and read again

They are equal, or the first difference is shown. Only tokenizers are loaded. The conversation has a system text (if the
training had one), two turns and Chinese, so that borders between answers and prompts count. Lesson: notebook 09.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minituner.errors import UsageError
from minituner.export.chat_template import with_trained_template

TURNS = ("Who are you?", "I am a model. 我是一个模型。", "请再说一遍，再快一点！")


@dataclass(frozen=True, slots=True)
class Door:
    """The ids that one way of asking gives, and whether the trained stop token ends an answer there (None: unasked)."""

    name: str
    ids: list[int]
    stops: bool | None = None


@dataclass(frozen=True, slots=True)
class Parity:
    """All doors of a model, training first."""

    model: str
    template: str
    doors: list[Door]
    tokens: dict[int, str]
    stop_id: int

    @property
    def equal(self) -> bool:
        """True if every door gives training's ids, and stops where training did."""
        return all(door.ids == self.doors[0].ids and door.stops is not False for door in self.doors)

    def lines(self) -> list[str]:
        """The result as text, one line a door."""
        first = self.doors[0]
        width = max(len(door.name) for door in self.doors)
        lines = [f"{self.model}, template {self.template}: one conversation of two turns"]
        lines.append(f"  {first.name:{width}}  {len(first.ids)} ids: {self._shown(first.ids[:8])} ...")
        for door in self.doors[1:]:
            text = "equal" if door.ids == first.ids else self._difference(first.ids, door.ids)
            if door.stops is not None:
                text += "; stops on" if door.stops else "; DOES NOT stop on"
                text += f" {self.tokens.get(self.stop_id, '')!r} ({self.stop_id})"
            lines.append(f"  {door.name:{width}}  {text}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The result for programs."""
        doors = [
            {"name": d.name, "ids": d.ids, "equal": d.ids == self.doors[0].ids, "stops": d.stops} for d in self.doors
        ]
        facts = {"model": self.model, "template": self.template, "equal": self.equal, "stop_id": self.stop_id}
        return {**facts, "doors": doors}

    def _difference(self, ours: list[int], theirs: list[int]) -> str:
        pairs = enumerate(zip(ours, theirs, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        return (
            f"DIFFERENT from token {at} on: {self._shown(theirs[at : at + 4]) or 'the end'}"
            f" instead of {self._shown(ours[at : at + 4]) or 'the end'}"
        )

    def _shown(self, ids: Sequence[int]) -> str:
        return " ".join(f"{i}:{self.tokens.get(i, '')!r}" for i in ids)


def parity(
    model: str | Path,
    exported: Sequence[str | Path] = (),
    *,
    template: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Parity:
    """The ids of one conversation through every door of `model` (an hf/ folder, a run, a merged model, a name).

    Args:
        exported: further folders that must ask in the same way.
        template: instead of the one that the folder says it was trained with.

    Raises:
        UsageError: no such model or template, or no tokenizer there.
    """
    from minituner.chat.loaded import LoadedModel, Voice
    from minituner.chat.opening import has_tokenizer
    from minituner.chat.session import Session
    from minituner.data.conversation import Conversation, Message
    from minituner.data.encoding import encode_many, stop_rule
    from minituner.export.beside import FACTS
    from minituner.model.loading import load_tokenizer
    from minituner.model.sources import fetch
    from minituner.train.hf_folder import base_of, facts_of

    given = Path(model)
    folder = given / "hf" if (given / "hf").is_dir() else given if given.is_dir() else fetch(str(model), say=say)
    facts = facts_of(folder)
    if not has_tokenizer(folder) and (folder / "adapter_config.json").is_file():
        folder = fetch(base_of(folder), say=say)  # other programs' adapters often come without one
    if not has_tokenizer(folder):
        raise UsageError(
            f"{folder} has no tokenizer", fix="copy tokenizer.json and tokenizer_config.json of the base into it"
        )
    key = template or facts.get("template") or "native"
    tokenizer = load_tokenizer(folder)
    system = facts.get("system")
    head = [Message("system", system)] if system else []
    messages = [*head, Message("user", TURNS[0]), Message("assistant", TURNS[1]), Message("user", TURNS[2])]
    whole = encode_many([Conversation([*messages, Message("assistant", "!")])], tokenizer, key)[0]
    trained = [int(i) for i in whole.trained.nonzero()[0]]
    start = next(i for i in reversed(trained) if i - 1 not in trained)
    stop_id = stop_rule(tokenizer, key)[0][0]
    session = Session(LoadedModel(None, tokenizer, {"model": Voice(key, system, tokenizer, folder)}))
    session.messages = messages[len(head) : -1]
    doors = [
        Door("training", whole.input_ids[:start].tolist()),
        Door("chat and web", session.prompt_ids(TURNS[2])),
    ]
    plain = [message.to_dict() for message in messages]
    if facts or not template:
        doors.append(_through_transformers("saved chat template", folder, plain, stop_id))
    with tempfile.TemporaryDirectory() as place:
        with_trained_template(tokenizer, key).save_pretrained(place)
        again = _through_transformers("exported again", Path(place), plain, stop_id)
        doors.append(again)
    for other in map(Path, exported):
        if not has_tokenizer(other):
            raise UsageError(f"{other} has no tokenizer", fix=f"give an exported folder ({FACTS} and tokenizer.json)")
        doors.append(_through_transformers(str(other), other, plain, stop_id))
    ids = {i for door in doors for i in door.ids} | {stop_id}
    return Parity(str(model), key, doors, {i: tokenizer.decode([i]) for i in ids}, stop_id)


def _through_transformers(name: str, folder: Path, messages: list[dict[str, Any]], stop_id: int) -> Door:
    """The ids that transformers alone makes of the folder's own chat template, and its stop ids."""
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if not tokenizer.chat_template:
        raise UsageError(f"{folder} has no chat template", fix="export it with minituner convert, or name --template")
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    file, stops = folder / "generation_config.json", None
    if file.is_file():
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        stops = stop_id in (eos if isinstance(eos, list) else [eos])
    return Door(name, list(found), stops)
