"""Token views: what a person sees of one token, and the role it has in training.

    input_ids   1         4093   198     19556     28725     2
    text        <s>       Hi     ⏎       Hello     !         </s>
    role        bos       masked masked  trained   trained   stop

Colours in notebooks, in the terminal and in HTML all come from here, so that a token looks the same everywhere. A role
is never shown by colour alone. Characters that could hide or re-order text are made visible: a newline is ⏎, a
right-to-left override is ⟨U+202E⟩. Lesson: notebook 03.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from minituner.data.encoding import KINDS, Encoded

Role = Literal["trained", "masked", "stop", "bos"]
ROLES: dict[Role, str] = {
    "trained": "trained: the model learns to produce it",
    "masked": "masked: read, not learned (label -100)",
    "stop": "stop token, trained: the model learns to end here",
    "bos": "BOS: begins the document",
}
# Tints of the Okabe-Ito palette (safe for colour-blind readers), and the strong tone that outlines each.
COLOURS: dict[Role, tuple[str, str]] = {
    "trained": ("#bfe8d4", "#00694e"),
    "masked": ("#ececec", "#8a8a8a"),
    "stop": ("#ffe3a8", "#000000"),
    "bos": ("#c4e1f6", "#0072b2"),
}
CONTINUES = "·"  # stands for a token that only continues the character begun by the token before it
LONGEST_CHARACTER = 4  # UTF-8 bytes, and so tokens
_SHOWN = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡", "\u3000": "\u3000"}


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token: its place, its id, its visible text, its role; `continues` is true inside a split character."""

    position: int
    id: int
    text: str
    role: Role
    continues: bool = False


def token_views(document: Encoded, tokenizer: Any, limit: int | None = None) -> list[TokenView]:
    """The first `limit` tokens of a document as a person sees them.

    A character that takes several tokens (most Chinese ones, in a tokenizer trained on English) stands at the first of
    them; the others show `·`.
    """
    roles = token_roles(document, tokenizer)[:limit]
    shown = document[: len(roles)]
    texts = _texts(shown, tokenizer)
    return [
        TokenView(i, token, CONTINUES if text is None else visible(text), role, text is None)
        for i, (token, text, role) in enumerate(zip(shown.input_ids.tolist(), texts, roles, strict=True))
    ]


def token_roles(document: Encoded, tokenizer: Any) -> list[Role]:
    """The role of every token, (n,).

    `stop` is a trained control token that ends an answer (or the end token of a text). An answer without one has no
    `stop`: then the model is not taught to end, and the picture shows it. `bos` also marks a doubled BOS in front.
    """
    ids, trained, kinds = document.input_ids, document.trained, document.kinds
    answer, eos, bos = (KINDS.index(kind) for kind in ("answer", "eos", "bos"))
    run_ends = np.append(kinds[1:] != kinds[:-1], True) if len(ids) else np.zeros(0, dtype=bool)
    ends = set(ids[run_ends & (kinds == answer)].tolist()) & control_ids(tokenizer) | set(ids[kinds == eos].tolist())
    stops = trained & np.isin(kinds, (answer, eos)) & np.isin(ids, list(ends))
    begins = np.cumprod(ids == getattr(tokenizer, "bos_token_id", None)).astype(bool) if len(ids) else stops
    begins = (begins | (kinds == bos)) & ~trained
    roles = np.where(stops, "stop", np.where(begins, "bos", np.where(trained, "trained", "masked")))
    return roles.tolist()


def control_ids(tokenizer: Any) -> set[int]:
    """Ids that text typed by a user must never become: special tokens, declared or added."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def visible(text: str, newline: str = "⏎") -> str:
    """The text with every control, formatting and odd space character made visible; `newline` replaces line ends."""
    if text.isprintable():
        return text
    shown = {**_SHOWN, "\n": newline}
    return "".join(c if c == " " else shown.get(c) or _shown(c) for c in text)


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Zs", "Zl", "Zp", "Cs", "Co")
    return f"⟨U+{code:04X}⟩" if hidden else character


def _texts(document: Encoded, tokenizer: Any) -> list[str | None]:
    """Each token's share of the decoded text; None continues the character of the token before.

    Decoded with the token before it, because many tokenizers drop a leading space from the first token of a text.
    """
    ids = document.input_ids.tolist()
    border = np.append(document.kinds[1:] != document.kinds[:-1], True)
    texts: list[str | None] = [None] * len(ids)
    context = start = 0
    for i in range(len(ids)):
        before = _decode(ids[context:start], tokenizer)
        new = _decode(ids[context : i + 1], tokenizer)[len(before) :]
        whole = bool(new) and not new.endswith("\ufffd")
        if whole or border[i] or i + 1 - start >= LONGEST_CHARACTER:
            texts[start] = new or str(tokenizer.convert_ids_to_tokens(ids[start]))
            context, start = start if whole else i + 1, i + 1
    return texts


def _decode(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
