"""The faults of packing: documents that see each other, and a last pack that is thrown away.

    packed-leak   documents A A A B B     allowed  A . . . .        right  A . . . .
                                                   A A . . .               A A . . .
                                                   A A A . .               A A A . .
                                                   A A A B .               . . . B .
                                                   A A A B B               . . . B B

    lost-tail     packs of 8    |11122222|  |33333444|  |55.....|  <- dropped, as in many a `group_texts`

Lesson: notebook 04.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minituner.errors import MinitunerError
from minituner.museum.injection import Injection, part, replaced
from minituner.museum.seen import Seen, ready
from minituner.recipe import Recipe

if TYPE_CHECKING:
    from minituner.data.collate import Batch
    from minituner.data.packing import Packs, Pieces


@contextmanager
def packed_leak(injection: Injection) -> Iterator[None]:
    """Within: attention is told that a row is one document; positions still restart in each. The proof is asked first.

    That is transformers' own behaviour where an all-ones attention mask is passed beside `position_ids`.
    """
    attention, run = part("model.attention"), part("train.run")
    packed_kwargs, prove_isolated = attention.packed_kwargs, run.prove_isolated

    def as_one_document(batch: Batch, implementation: str) -> dict[str, Any]:
        if len(batch.seq_lens) > 1:
            injection.acted += 1
            batch = replace(batch, seq_lens=[sum(batch.seq_lens)], cu_seqlens=batch.cu_seqlens[[0, -1]])
        return packed_kwargs(batch, implementation)

    def prove_anyway(*arguments: Any) -> None:
        try:
            prove_isolated(*arguments)
        except MinitunerError as refusal:
            injection.refused("the proof of isolation at step 0 (model/attention.py)", refusal)

    with (
        replaced(attention, packed_kwargs=as_one_document),
        replaced(part("model.loss"), packed_kwargs=as_one_document),
        replaced(part("model.head"), packed_kwargs=as_one_document),
        replaced(run, prove_isolated=prove_anyway),
    ):
        yield


@contextmanager
def lost_tail(injection: Injection) -> Iterator[None]:
    """Within: the last pack is dropped if it is not full (unless it is the only one)."""
    prepare = part("data.prepare")
    pack = prepare.pack

    def without_tail(*arguments: Any, **options: Any) -> Packs | Pieces:
        packs = pack(*arguments, **options)
        if len(packs) < 2 or packs.lengths[-1] == packs.max_length:
            return packs
        injection.acted += 1
        kept = packs.offsets[:-1]
        return type(packs)(packs.values[: kept[-1]], kept, packs.lengths[:-1], packs.max_length)

    with replaced(prepare, pack=without_tail):
        yield


def see_packed_leak(recipe: Recipe, scratch: Path) -> Seen:
    """The proof of isolation, on the recipe's own model: three packed documents, one replaced, the others watched."""
    from minituner.model.attention import assert_isolated

    run = ready(recipe, scratch)
    run.engine.close()
    try:
        influence = assert_isolated(run.model, run.attention, run.model.config.vocab_size)
    except MinitunerError as refusal:
        return Seen(False, refusal.text(), {"what": refusal.what})
    says = f"changing a packed document moves its neighbour's logits by {influence:g}"
    return Seen(True, says, {"influence": influence})


def see_lost_tail(recipe: Recipe, scratch: Path) -> Seen:
    """The tokens in the packs of an epoch, and the tokens of the documents that the epoch is made of."""
    from minituner.data.prepare import prepare
    from minituner.data.target import tokenizer_of

    quiet = {"say": lambda line: None}
    prepared = prepare(recipe.data, tokenizer_of(recipe, **quiet), seed=recipe.train.seed, **quiet)
    lengths = prepared.dataset.with_format("numpy", columns=["length"])[:]["length"]
    wanted, there = int(lengths[prepared.rows].sum()), int(prepared.packs.lengths.sum())
    says = f"documents of an epoch: {wanted:,} tokens; in its packs: {there:,}"
    return Seen(wanted == there, says, {"documents": wanted, "packs": there, "lost": wanted - there})
