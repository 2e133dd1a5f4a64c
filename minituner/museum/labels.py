"""The faults of labels: too few, none, too many, one place too far.

    input_ids         <s>   user: Hi   assistant:   Hello   !      </s>
    right              -       -           -        Hello   !      </s>
    pad-as-eos         -       -           -        Hello   !       -        never taught to stop
    mask-everything    -       -           -          -     -       -        taught nothing
    mask-nothing      <s>   user: Hi   assistant:   Hello   !      </s>      taught to be the user too
    shifted-labels     -       -         Hello        !    </s>     -        then shifted again: t learns t + 2

The first three are put in where documents are encoded, the last where batches are made. Lesson: notebook 03.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minituner.errors import DataError
from minituner.museum.injection import Injection, own_cache, part, replaced
from minituner.museum.seen import Seen, as_file, in_float32, ready
from minituner.recipe import Recipe

if TYPE_CHECKING:
    from minituner.data.collate import Batch, Document
    from minituner.data.encoding import Encoded
    from minituner.data.ledger import Ledger
    from minituner.data.prepare import Prepared

CLOSE = 1e-4  # relative: how far two float32 losses over the same tokens may lie apart


@contextmanager
def _labels_changed(injection: Injection, trained: Callable[[Encoded, Any], np.ndarray]) -> Iterator[None]:
    """Within: `trained(document, tokenizer)` says which tokens of a training document have a label, (n,) bool."""
    encoding = part("data.encoding")
    encode_many = encoding.encode_many

    def relabelled(conversations: Sequence[Any], tokenizer: Any, *arguments: Any, **options: Any) -> list[Encoded]:
        documents = []
        for document in encode_many(conversations, tokenizer, *arguments, **options):
            mask = trained(document, tokenizer)
            injection.acted += int((mask != document.trained).sum())
            documents.append(encoding.Encoded(document.input_ids, mask, document.kinds))
        return documents

    # Not in data.encoding itself: there chat reads off what ends an answer, and chat is not what is broken.
    with (
        own_cache(injection),
        replaced(part("data.prepare"), encode_many=relabelled),
        replaced(part("data.walk"), encode_many=relabelled),
    ):
        yield


@contextmanager
def pad_as_eos(injection: Injection) -> Iterator[None]:
    """Within: no token with the id of the end token has a label, as if pad were eos and masked by id."""

    def all_but_eos(document: Encoded, tokenizer: Any) -> np.ndarray:
        return document.trained & ~np.isin(document.input_ids, np.atleast_1d(tokenizer.eos_token_id or []))

    with _labels_changed(injection, all_but_eos):
        yield


@contextmanager
def mask_nothing(injection: Injection) -> Iterator[None]:
    """Within: every token has a label."""
    with _labels_changed(injection, lambda document, tokenizer: np.ones_like(document.trained)):
        yield


@contextmanager
def mask_everything(injection: Injection) -> Iterator[None]:
    """Within: no token has a label, and data without a trained token are not refused."""
    prepare, run = part("data.prepare"), part("train.run")
    prepare_data = run.prepare

    def keep(document: Encoded, data: Any, is_text: bool, ledger: Ledger) -> list[Encoded]:
        kept = document[: data.max_length]
        if len(document) > len(kept):
            ledger.cut(len(document) - len(kept))
        ledger.keep(kept)
        return [kept]

    def anyway(*arguments: Any, **options: Any) -> Prepared:
        try:
            return prepare_data(*arguments, **options)
        except DataError as refusal:
            injection.refused("data/prepare.py, before the model is loaded,", refusal)
        name = prepare.fingerprint  # under another name: the first try has left an empty folder under its own
        off = {"fit": keep, "refuse_untrained": lambda ledger, data: None}
        with replaced(prepare, fingerprint=lambda *given: f"{name(*given)}-kept", **off):
            return prepare_data(*arguments, **options)

    nothing = _labels_changed(injection, lambda document, tokenizer: np.zeros_like(document.trained))
    with nothing, replaced(run, prepare=anyway):
        yield


@contextmanager
def shifted_labels(injection: Injection) -> Iterator[None]:
    """Within: labels come to the batch shifted already, and are shifted there once more."""
    feed, ignore = part("train.feed"), part("data.encoding").IGNORE
    collate = feed.collate

    def shifted(document: Document) -> Document:
        ids, labels = document
        injection.acted += int((labels != ignore).sum())
        return ids, np.concatenate([labels[1:], np.full_like(labels[:1], ignore)])

    def twice(packs: Sequence[Sequence[Document]], *, isolate: bool = True) -> Batch:
        return collate([[shifted(document) for document in pack] for pack in packs], isolate=isolate)

    with replaced(feed, collate=twice):
        yield


def see_pad_as_eos(recipe: Recipe, scratch: Path) -> Seen:
    """`minituner inspect`: do the samples' answers end with a token of the role stop?"""
    from minituner.data.look import look

    found = look(as_file(recipe, scratch), n=8, say=lambda line: None)
    stops = [sum(token.role == "stop" for token in sample.tokens) for sample in found.samples]
    masked = dict(found.survey.ledger.masked) if found.survey else {}
    says = f"{sum(n > 0 for n in stops)} of {len(stops)} samples have a trained stop token"
    return Seen(bool(stops) and all(stops), says, {"stops": stops, "masked": masked})


def see_mask_everything(recipe: Recipe, scratch: Path) -> Seen:
    """`minituner check`: would training refuse the data?"""
    from minituner.data.check import check

    found = check(as_file(recipe, scratch), say=lambda line: None)
    says = f"training would refuse: {found.refusal}" if found.refusal else "training would accept this data"
    return Seen(not found.refusal, f"{says}; {found.ledger.trained:,} trained tokens", found.to_dict())


def see_mask_nothing(recipe: Recipe, scratch: Path) -> Seen:
    """`minituner inspect`: the ledger's share of trained tokens, and what is masked."""
    from minituner.data.look import look

    found = look(as_file(recipe, scratch), n=1, say=lambda line: None)
    ledger = found.survey.ledger if found.survey else part("data.ledger").Ledger()
    prompt = ledger.masked[part("data.ledger").MASKED["prompt"]]
    says = f"{ledger.trained:,} of {ledger.raw:,} tokens are trained, {prompt:,} tokens of prompts are masked"
    return Seen(prompt > 0 or recipe.data.loss_on == "all", says, ledger.to_dict())


def see_shifted_labels(recipe: Recipe, scratch: Path) -> Seen:
    """The loss of the first window, and transformers' own loss of the same documents, each alone."""
    import torch

    from minituner.model.attention import for_generation
    from minituner.model.loss import loss_sum

    run = ready(in_float32(recipe), scratch)
    model, device = run.model.eval(), run.engine.device
    ours = theirs = 0.0
    tokens = 0
    with torch.no_grad():
        for batch in run.feed.window(0, lambda batch: batch.to(device)):
            ours += float(loss_sum(run.engine.model, batch, run.attention, run.head))
        documents = [d for numbers in run.feed.packs(0) for number in numbers for d in run.prepared.documents(number)]
        with for_generation(model):
            for ids, labels in documents:
                row, wanted = (
                    torch.as_tensor(np.asarray(a, dtype=np.int64), device=device)[None] for a in (ids, labels)
                )
                if count := int((wanted[:, 1:] >= 0).sum()):
                    theirs += float(model(input_ids=row, labels=wanted, use_cache=False).loss) * count
                    tokens += count
    run.engine.close()
    ours, theirs = ours / max(tokens, 1), theirs / max(tokens, 1)
    equal = abs(ours - theirs) <= CLOSE * abs(theirs)
    says = f"loss of the first window {ours:.6f}, by transformers' own loss {theirs:.6f}"
    return Seen(equal, says, {"ours": ours, "transformers": theirs, "tokens": tokens})
