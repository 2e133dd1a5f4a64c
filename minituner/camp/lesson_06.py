"""Exercises of lesson 06: softmax in blocks, what is kept, kernel arguments, tiles, and a test that finds a leak.

What an exercise gives is a constant here, so that notebook and check cannot fall out of step:

    STATE            ->  06.1 merge two blocks                (m, z, acc) + (m, z, acc) -> (m, z, acc)
    LAYER            ->  06.2 bytes kept for the backward     {"weights": ..., "logsumexp": ...}
    ROW, WINDOW      ->  06.3 what a kernel is given          {"cu_seq_q": ..., "max_q": ..., "window_size": ...}
    DOCUMENTS, BLOCK ->  06.4 tiles                           a number
    CALLS            ->  06.5 a test that tells them apart    a function

Every right answer is computed with the functions that training uses, or by running the model. Lesson: notebook 06.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from minituner.camp.core import Exercise, Wrong
from minituner.data.packing import cu_seqlens

if TYPE_CHECKING:
    import torch

LAYER = {"heads": 32, "tokens": 4096, "bytes_per_weight": 2, "bytes_per_logsumexp": 4}
ROW = (3, 5, 2)
WINDOW = 4
DOCUMENTS = (100, 300, 30)
BLOCK = 64
CALLS = {
    "A": "sdpa, position_ids that restart, use_cache=False",
    "B": "sdpa, position_ids that restart, use_cache not mentioned",
    "C": "sdpa, position_ids that restart, use_cache=False, attention_mask of ones",
    "D": "sdpa, no position_ids, use_cache=False",
    "E": "per_document_sdpa, seq_lens, position_ids that run on, use_cache=False",
    "F": "eager, position_ids that restart, use_cache=False",
}
State = tuple[np.ndarray, np.ndarray, np.ndarray]
Call = Callable[[list[np.ndarray]], "torch.Tensor"]
ROUNDING = 1e-4  # kernels may round otherwise when a neighbour changes; a leak moves these logits by tenths


def state(scores: np.ndarray, values: np.ndarray) -> State:
    """What is kept of a block: its maximum m, the sum z of exp(score - m), and acc, that sum weighted by values.

    scores: (keys,); values: (keys, d); m and z are single numbers, acc is (d,).
    """
    largest = scores.max()
    weights = np.exp(scores - largest)
    return largest, weights.sum(), weights @ values


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


def _check_merge(answer: Callable[[State, State], State]) -> None:
    if not callable(answer):
        raise Wrong("give the function itself: answer = merge (no brackets)")
    draw = np.random.default_rng(0)
    for first, second, offset in ((3, 4, 0.0), (5, 1, 50.0), (1, 5, -50.0), (4, 4, 2000.0)):
        scores, values = draw.normal(size=first + second), draw.normal(size=(first + second, 2))
        scores[first:] += offset
        with np.errstate(all="ignore"):
            got = answer(state(scores[:first], values[:first]), state(scores[first:], values[first:]))
        if not isinstance(got, tuple | list) or len(got) != 3:
            raise Wrong("merge returns three things: the maximum, the sum, the weighted sum")
        for name, mine, right in zip(("maximum", "sum", "weighted sum"), got, state(scores, values), strict=True):
            mine = np.asarray(mine, dtype=float)
            if mine.shape != np.shape(right):
                raise Wrong(f"the {name} has the shape {mine.shape}, it needs {np.shape(right)}")
            if not np.isfinite(mine).all():
                raise Wrong(f"the {name} is not finite for scores around {offset:g}: only exp of what is at most 0")
            if not np.allclose(mine, right, rtol=1e-9):
                raise Wrong(f"the {name} is not that of all scores together: is each part brought to the new maximum?")


def _check_bytes(answer: Any) -> None:
    if not isinstance(answer, dict) or not {"weights", "logsumexp"} <= set(answer):
        raise Wrong("answer with a dictionary: {'weights': bytes, 'logsumexp': bytes}")
    heads, tokens = LAYER["heads"], LAYER["tokens"]
    weights = heads * tokens**2 * LAYER["bytes_per_weight"]
    logsumexp = heads * tokens * LAYER["bytes_per_logsumexp"]
    if answer["weights"] * heads == weights:
        raise Wrong("weights: that is one head; every head has a table of its own")
    if answer["weights"] * LAYER["bytes_per_weight"] == weights:
        raise Wrong("weights: that is how many there are; asked are bytes")
    if answer["weights"] != weights:
        raise Wrong("weights: one number for each head and each pair of tokens, each of bytes_per_weight")
    if answer["logsumexp"] != logsumexp:
        raise Wrong("logsumexp: one number for each head and each token, each of bytes_per_logsumexp")


def _check_arguments(answer: Any) -> None:
    if not isinstance(answer, dict) or not {"cu_seq_q", "max_q", "window_size"} <= set(answer):
        raise Wrong("answer with a dictionary: {'cu_seq_q': [...], 'max_q': ..., 'window_size': (..., ...)}")
    borders = [int(border) for border in answer["cu_seq_q"]]
    if borders != (right := cu_seqlens(ROW).tolist()):
        raise Wrong(f"cu_seq_q: it begins with 0 and has {len(right)} entries, the running sum of the lengths")
    if answer["max_q"] == sum(ROW):
        raise Wrong("max_q: that is the whole row; the kernel asks for the longest document")
    if answer["max_q"] != max(ROW):
        raise Wrong("max_q: the tokens of the longest document")
    back, ahead = answer["window_size"]
    if ahead != 0:
        raise Wrong(f"window_size: {ahead} on the right is not causal; a token sees 0 tokens ahead")
    if back == -1:
        raise Wrong("window_size: -1 on the left sees everything back to the document's start")
    if back != WINDOW - 1:
        raise Wrong(f"window_size: {back} tokens back and the token itself are {back + 1}; it must see {WINDOW}")


def _check_tiles(answer: Any) -> None:
    value = int(answer)
    blocks = [-(-length // BLOCK) for length in DOCUMENTS]
    if value == sum(n * (n + 1) // 2 for n in blocks):
        return
    row = -(-sum(DOCUMENTS) // BLOCK)
    if value == row * (row + 1) // 2:
        raise Wrong("those are the tiles of one causal row, in which documents see each other")
    if value == sum(n * n for n in blocks):
        raise Wrong("tiles above the diagonal are never touched")
    raise Wrong(f"{value} is not right: count tiles for each document by itself, a begun tile is a tile")


def _check_leaks(answer: Callable[[Call], Any]) -> None:
    if not callable(answer):
        raise Wrong("give the function itself: answer = leaks (no brackets)")
    for name, call_packed in calls(tiny_llama()).items():
        right, mine = movement(call_packed) > ROUNDING, bool(answer(call_packed))
        what = (
            f"call {name} ({CALLS[name]})"
            if name in CALLS
            else "a call in which the first document hears of the second"
        )
        if right and not mine:
            raise Wrong(f"{what} leaks, and your test does not notice")
        if mine and not right:
            raise Wrong(f"{what} keeps documents apart, and your test says that it leaks")


EXERCISES: dict[str, Exercise] = {
    "1": Exercise(
        "Write merge(a, b): the (m, z, acc) of two blocks of scores becomes that of both together.",
        _check_merge,
        (
            "The new maximum is the larger of the two. What must an old sum be multiplied by to refer to it?",
            "exp(x - m_new) = exp(x - m_old) * exp(m_old - m_new); the same factor serves z and acc.",
            "m = max(a[0], b[0]); fa, fb = np.exp(a[0] - m), np.exp(b[0] - m); z = a[1] * fa + b[1] * fb; acc alike",
        ),
    ),
    "2": Exercise(
        "How many bytes does the layer of LAYER keep for the backward: all attention weights, or one logsumexp a row?",
        _check_bytes,
        (
            "Weights: each head compares every token with every token.",
            "The logsumexp is one number for each row of each head's table.",
            "heads * tokens ** 2 * bytes_per_weight, and heads * tokens * bytes_per_logsumexp",
        ),
    ),
    "3": Exercise(
        "What is a variable-length kernel given for documents of ROW tokens and a window of WINDOW tokens?",
        _check_arguments,
        (
            "cu_seq_q is the cu_seqlens of lesson 04. max_q lets the kernel know how many tiles a document can need.",
            "window_size counts tokens to the left and to the right of the token, without the token itself.",
            "A window of WINDOW tokens, itself included, reaches WINDOW - 1 back, and causal means 0 ahead.",
        ),
    ),
    "4": Exercise(
        "How many BLOCK x BLOCK tiles does causal attention compute for the packed documents of DOCUMENTS?",
        _check_tiles,
        (
            "Each document has its own tiles, which begin at its first token.",
            "A document of n blocks has a triangle of tiles: 1 + 2 + ... + n.",
            "n is the length divided by BLOCK, rounded up; add n * (n + 1) / 2 over the documents.",
        ),
    ),
    "5": Exercise(
        "Write leaks(call): run call([first, second]) as often as you like, and say whether a document sees the other.",
        _check_leaks,
        (
            "Change one document and look at the logits of the other. Which rows of the logits belong to which?",
            "Look in both directions, and allow for rounding: a difference of 1e-4 is not a leak.",
            "Run [a, b], [a + 1, b] and [a, b + 1]; compare rows len(a): of the first two, rows :len(a) of 1 and 3.",
        ),
    ),
}
