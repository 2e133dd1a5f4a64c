"""Exercises of lesson 06: softmax in blocks, what is kept, kernel arguments, tiles, and a test that finds a leak.

    6.1 merge(a, b)                     two blocks: (m, z, acc), (m, z, acc) -> (m, z, acc)
    6.2 kept_bytes(layer)               what is kept for the backward: {"weights": ..., "logsumexp": ...}
    6.3 kernel_arguments(row, window)   what a kernel is given: {"cu_seq_q": ..., "max_q": ..., "window_size": ...}
    6.4 tiles(documents, block)         how many tiles are computed
    6.5 leaks(call)                     a test that tells calls apart, CALLS by the notebook

Every right value is computed with the functions that training uses, or by running the model. Lesson: notebook 06.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from minituner.camp.core import Exercise
from minituner.data.packing import cu_seqlens

if TYPE_CHECKING:
    import torch

LAYER = {"heads": 32, "tokens": 4096, "bytes_per_weight": 2, "bytes_per_logsumexp": 4}
CALLS = {
    "A": "sdpa, position_ids that restart, use_cache=False",
    "B": "sdpa, position_ids that restart, use_cache not mentioned",
    "C": "sdpa, position_ids that restart, use_cache=False, attention_mask of ones",
    "D": "sdpa, no position_ids, use_cache=False",
    "E": "per_document_sdpa, seq_lens, position_ids that run on, use_cache=False",
    "F": "eager, position_ids that restart, use_cache=False",
}
State = tuple[np.ndarray, np.ndarray, np.ndarray]
Call = Callable[[list[np.ndarray]], Any]  # documents -> logits (T, vocabulary), a tensor or an array
ROUNDING = 1e-4  # kernels may round otherwise when a neighbour changes; a leak moves these logits by tenths


def state(scores: np.ndarray, values: np.ndarray) -> State:
    """What is kept of a block: its maximum m, the sum z of exp(score - m), and acc, that sum weighted by values.

    scores: (keys,); values: (keys, d); m and z are single numbers, acc is (d,).
    """
    largest = scores.max()
    weights = np.exp(scores - largest)
    return largest, weights.sum(), weights @ values


@lru_cache(maxsize=1)
def tiny_llama() -> Any:
    """A random Llama with two layers, 300 tokens, and weights large enough for attention to matter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def call(model: Any, letter: str, documents: list[np.ndarray]) -> torch.Tensor:
    """The logits (T, vocabulary) of a packed row, by one of CALLS."""
    import torch

    from minituner.data.collate import collate
    from minituner.model import attention

    attention.register()
    row = collate([[(ids, ids) for ids in documents]])
    running_on = torch.arange(row.input_ids.shape[1])[None]
    arguments: dict[str, dict[str, Any]] = {
        "A": {"position_ids": row.position_ids, "use_cache": False},
        "B": {"position_ids": row.position_ids},
        "C": {"position_ids": row.position_ids, "use_cache": False, "attention_mask": torch.ones_like(row.input_ids)},
        "D": {"use_cache": False},
        "E": {"position_ids": running_on, "use_cache": False, "seq_lens": row.seq_lens},
        "F": {"position_ids": row.position_ids, "use_cache": False},
    }
    model.set_attn_implementation({"E": attention.PER_DOCUMENT_SDPA, "F": "eager"}.get(letter, "sdpa"))
    with torch.no_grad():
        return model(row.input_ids, **arguments[letter]).logits[0]


def movement(call_packed: Call) -> float:
    """How far a document's logits move when the other one is changed, in either direction; 0 if they are apart.

    call_packed: [first, second], ids each, -> logits (T, vocabulary) of the packed row.
    """
    first, second = np.arange(10, 17), np.arange(50, 59)
    before, border = call_packed([first, second]), len(first)
    behind = before[border:] - call_packed([first + 1, second])[border:]
    in_front = before[:border] - call_packed([first, second + 1])[:border]
    return max(float(behind.abs().max()), float(in_front.abs().max()))


def calls(model: Any) -> dict[str, Call]:
    """CALLS as functions, and one more: a made-up one in which the document in front hears of the one behind it."""

    def hears_what_comes(documents: list[np.ndarray]) -> torch.Tensor:
        logits = call(model, "E", documents)
        logits[: len(documents[0])] += float(documents[1].mean()) / 10
        return logits

    return {letter: partial(call, model, letter) for letter in CALLS} | {"the one that hears ahead": hears_what_comes}


def visible(length: int, window: int | None) -> np.ndarray:
    """Boolean (length, length): which tokens reach which through the attention that minituner trains with."""
    import torch

    from minituner.model.attention import per_document_sdpa

    nothing, values = torch.zeros(1, 1, length, length), torch.eye(length)[None, None]
    out, _ = per_document_sdpa(
        torch.nn.Identity(), nothing, nothing, values, seq_lens=[length], sliding_window=window
    )  # equal scores: each visible token gives an equal share of its own one-hot value
    return out[0, :, 0].numpy() > 0


def _blocks(draw: Random) -> tuple[State, State]:
    """Two blocks of one row; in some rows the second one's scores are far above or below the first one's."""
    numbers = np.random.default_rng(draw.getrandbits(32))
    first, offset = draw.randint(1, 5), draw.choice([0.0, 3.0, -50.0, 50.0, 2000.0])
    scores, values = numbers.normal(size=first + draw.randint(1, 5)), numbers.normal(size=(12, 2))
    scores[first:] += offset
    return state(scores[:first], values[:first]), state(scores[first:], values[first : len(scores)])


def _merge(a: State, b: State) -> State:
    """The state of both blocks; `state` of all scores together gives the same (a test compares them)."""
    (m, z, acc), (n, y, other) = a, b
    largest = np.maximum(m, n)
    ours, theirs = np.exp(m - largest), np.exp(n - largest)
    return largest, z * ours + y * theirs, acc * ours + other * theirs


def _without_maximum(a: State, b: State) -> State:
    with np.errstate(all="ignore"):
        m, ours, theirs = np.maximum(a[0], b[0]), np.exp(a[0]), np.exp(b[0])
        return m, (a[1] * ours + b[1] * theirs) / np.exp(m), (a[2] * ours + b[2] * theirs) / np.exp(m)


def _wrong_sign(a: State, b: State) -> State:
    with np.errstate(all="ignore"):
        m = np.maximum(a[0], b[0])
        ours, theirs = np.exp(m - a[0]), np.exp(m - b[0])
        return m, a[1] * ours + b[1] * theirs, a[2] * ours + b[2] * theirs


def _layer(draw: Random) -> tuple[dict[str, int]]:
    sizes = {"heads": draw.choice([8, 9, 32]), "tokens": draw.choice([512, 1000, 4096])}
    return ({**sizes, "bytes_per_weight": draw.choice([2, 4]), "bytes_per_logsumexp": draw.choice([4, 8])},)


def _kept(layer: Mapping[str, int]) -> dict[str, int]:
    rows = layer["heads"] * layer["tokens"]
    weights = rows * layer["tokens"] * layer["bytes_per_weight"]
    return {"weights": weights, "logsumexp": rows * layer["bytes_per_logsumexp"]}


def _row(draw: Random) -> tuple[list[int], int]:
    return [draw.randint(1, 9) for _ in range(draw.randint(2, 5))], draw.randint(2, 8)


def _arguments(row: Sequence[int], window: int) -> dict[str, Any]:
    return {"cu_seq_q": cu_seqlens(row), "max_q": max(row), "window_size": [window - 1, 0]}


def _tiles(documents: Sequence[int], block: int) -> int:
    blocks = [-(-length // block) for length in documents]
    return sum(n * (n + 1) // 2 for n in blocks)


def _calls(draw: Random) -> tuple[Call]:
    """One of CALLS, or the one that hears ahead."""
    return (_as_array(draw.choice([*CALLS, "the one that hears ahead"])),)


def _as_array(name: str) -> Call:
    """The call of this name; the model is made when it is first called."""

    def call_packed(documents: Sequence[Sequence[int]]) -> np.ndarray:
        return _logits(name, tuple(tuple(np.asarray(ids).tolist()) for ids in documents)).copy()

    call_packed.__name__ = f"call {name}"
    return call_packed


@lru_cache(maxsize=64)
def _logits(name: str, documents: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """The logits of a call; kept, because the right function and every mistake ask for the same few rows."""
    return calls(tiny_llama())[name]([np.asarray(ids) for ids in documents]).numpy()


def _moves(call_packed: Call, behind: bool, in_front: bool) -> bool:
    first, second = np.arange(10, 17), np.arange(50, 59)
    before, border, moved = call_packed([first, second]), len(first), 0.0
    if behind:
        moved = abs(before[border:] - call_packed([first + 1, second])[border:]).max()
    if in_front:
        moved = max(moved, abs(before[:border] - call_packed([first, second + 1])[:border]).max())
    return bool(moved > ROUNDING)


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        name="merge",
        minutes=10,
        example=(
            state(np.array([1.0, 3.0]), np.array([[1.0, 0.0], [0.0, 1.0]])),
            state(np.array([2.0, 5.0]), np.array([[2.0, 0.0], [0.0, 2.0]])),
        ),
        draw=_blocks,
        right=_merge,
        mistakes={
            "Each sum was measured from its own maximum: bring it to the new one, exp(m_old - m_new), before you add": (
                lambda a, b: (np.maximum(a[0], b[0]), a[1] + b[1], a[2] + b[2])
            ),
            "The weighted sum must be brought to the new maximum too, not only the sum": (
                lambda a, b: (*_merge(a, b)[:2], a[2] + b[2])
            ),
            "That overflows for large scores: only exp of what is at most 0": _without_maximum,
            "The exponent has the wrong sign: a block with a smaller maximum counts for less": _wrong_sign,
        },
        hints=(
            "The new maximum is the larger of the two. What must an old sum be multiplied by to refer to it?",
            "exp(x - m_new) = exp(x - m_old) * exp(m_old - m_new); the same factor serves z and acc.",
            "m = max(a[0], b[0]); fa, fb = np.exp(a[0] - m), np.exp(b[0] - m); z = a[1] * fa + b[1] * fb; acc alike",
        ),
    ),
    "2": Exercise(
        name="kept_bytes",
        minutes=5,
        example=(LAYER,),
        draw=_layer,
        right=_kept,
        mistakes={
            "weights: that is one head; every head has a table of its own": (
                lambda layer: {**_kept(layer), "weights": _kept(layer)["weights"] // layer["heads"]}
            ),
            "weights: that is how many there are; asked are bytes": (
                lambda layer: {**_kept(layer), "weights": _kept(layer)["weights"] // layer["bytes_per_weight"]}
            ),
            "logsumexp: there is one for each row of each head's table, and each has bytes_per_logsumexp": (
                lambda layer: {**_kept(layer), "logsumexp": layer["tokens"] * layer["bytes_per_logsumexp"]}
            ),
        },
        hints=(
            "Weights: each head compares every token with every token.",
            "The logsumexp is one number for each row of each head's table.",
            "heads * tokens ** 2 * bytes_per_weight, and heads * tokens * bytes_per_logsumexp",
        ),
    ),
    "3": Exercise(
        name="kernel_arguments",
        minutes=5,
        example=([3, 5, 2], 4),
        draw=_row,
        right=_arguments,
        mistakes={
            "cu_seq_q begins with 0 and goes on with the running sum of the lengths": (
                lambda row, window: {**_arguments(row, window), "cu_seq_q": cu_seqlens(row)[1:]}
            ),
            "max_q: that is the whole row; the kernel asks for the longest document": (
                lambda row, window: {**_arguments(row, window), "max_q": sum(row)}
            ),
            "window_size: the token itself is one of the window, so it looks back one less": (
                lambda row, window: {**_arguments(row, window), "window_size": [window, 0]}
            ),
            "window_size: what is on the right of the token must not be seen": (
                lambda row, window: {**_arguments(row, window), "window_size": [window - 1, window - 1]}
            ),
            "window_size: -1 on the left sees everything back to the document's start": (
                lambda row, window: {**_arguments(row, window), "window_size": [-1, 0]}
            ),
        },
        hints=(
            "cu_seq_q is the cu_seqlens of lesson 04. max_q lets the kernel know how many tiles a document can need.",
            "window_size counts tokens to the left and to the right of the token, without the token itself.",
            "A window of `window` tokens, itself included, reaches window - 1 back, and causal means 0 ahead.",
        ),
    ),
    "4": Exercise(
        name="tiles",
        minutes=5,
        example=([100, 300, 30], 64),
        draw=lambda draw: ([draw.randint(1, 400) for _ in range(draw.randint(1, 5))], draw.choice([16, 64, 128])),
        right=_tiles,
        mistakes={
            "Those are the tiles of one causal row, in which documents see each other": (
                lambda documents, block: _tiles([sum(documents)], block)
            ),
            "Tiles above the diagonal are never touched": (
                lambda documents, block: sum((-(-length // block)) ** 2 for length in documents)
            ),
            "A begun tile is a tile: round up": (
                lambda documents, block: sum((n // block) * (n // block + 1) // 2 for n in documents)
            ),
        },
        hints=(
            "Each document has its own tiles, which begin at its first token.",
            "A document of n blocks has a triangle of tiles: 1 + 2 + ... + n.",
            "n is the length divided by the block, rounded up; add n * (n + 1) / 2 over the documents.",
        ),
    ),
    "5": Exercise(
        name="leaks",
        minutes=15,
        example=(_as_array("D"),),
        draw=_calls,
        right=lambda call_packed: _moves(call_packed, behind=True, in_front=True),
        mistakes={
            "The document in front may hear of the one behind it; you look in the other direction only": (
                lambda call_packed: _moves(call_packed, behind=True, in_front=False)
            ),
            "The document behind may hear of the one in front; you look in the other direction only": (
                lambda call_packed: _moves(call_packed, behind=False, in_front=True)
            ),
            "A document's own logits move when it is changed itself; look at the rows of the other one": (
                lambda call_packed: True
            ),
            "This call leaks, and your test does not notice": lambda call_packed: False,
        },
        hints=(
            "Change one document and look at the logits of the other. Which rows of the logits belong to which?",
            "Look in both directions, and allow for rounding: a difference of 1e-4 is not a leak.",
            "Run [a, b], [a + 1, b] and [a, b + 1]; compare rows len(a): of the first two, rows :len(a) of 1 and 3.",
        ),
        cases=7,
    ),
}
