"""What each fault changes, and that it changes nothing else, on drawn data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.data.collate import collate
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import Encoded, encode_many
from minituner.data.packing import pack
from minituner.model import attention
from minituner.model.loss import loss_sum
from minituner.museum import injected
from minituner.museum.injection import part
from minituner.museum.packs import see_lost_tail
from tests.museum.conftest import recipe_for, silent
from tests.promises.common import documents
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
turn = st.tuples(st.text(min_size=1, max_size=12).map(str.strip).filter(bool), st.sampled_from(["Yes.", "是。", "a b"]))
chats = st.lists(turn, min_size=1, max_size=3).map(
    lambda turns: Conversation([m for q, a in turns for m in (Message("user", q), Message("assistant", a))])
)


def as_prepared(conversation: Conversation) -> Encoded:
    """The document as `prepare` encodes it now."""
    return part("data.prepare").encode_many([conversation], TOKENIZER, "native")[0]


@settings(max_examples=25, deadline=None)
@given(chats)
def test_label_faults_change_labels_and_nothing_else(chat: Conversation) -> None:
    clean = as_prepared(chat)
    wanted = {
        "pad-as-eos": clean.trained & (clean.input_ids != END),
        "mask-everything": np.zeros_like(clean.trained),
        "mask-nothing": np.ones_like(clean.trained),
    }
    for name, trained in wanted.items():
        with injected(name, silent) as injection:
            broken = as_prepared(chat)
        assert np.array_equal(broken.input_ids, clean.input_ids)
        assert np.array_equal(broken.trained, trained)
        assert injection.acted == int((trained != clean.trained).sum()) > 0
    assert np.array_equal(as_prepared(chat).trained, clean.trained)


@settings(max_examples=25, deadline=None)
@given(chats)
def test_double_bos_is_one_token_more_in_front(chat: Conversation) -> None:
    clean = as_prepared(chat)
    with injected("double-bos", silent):
        broken = as_prepared(chat)
    bos = TOKENIZER.bos_token_id
    assert broken.input_ids.tolist() == [bos, *clean.input_ids.tolist()]
    assert broken.input_ids[:2].tolist() == [bos, bos]
    assert broken.labels.tolist() == [-100, *clean.labels.tolist()]


def test_what_chat_sends_is_not_broken_by_a_label_fault() -> None:
    chat = Conversation([Message("user", "Hi"), Message("assistant", "Hello")])
    clean = encode_many([chat], TOKENIZER, "native")[0]
    with injected("mask-everything", silent):
        assert np.array_equal(encode_many([chat], TOKENIZER, "native")[0].trained, clean.trained)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6).map(tuple), st.booleans())
def test_shifted_labels_point_one_token_too_far(lengths: tuple[int, ...], isolate: bool) -> None:
    packed = documents(lengths)
    with injected("shifted-labels", silent):
        batch = part("train.feed").collate([packed], isolate=isolate)
    clean = collate([packed], isolate=isolate)
    wanted = np.concatenate([np.append(labels, [-100, -100])[2 : 2 + len(labels)] for _, labels in packed])
    assert batch.shift_labels[0].tolist() == wanted.tolist()
    assert torch.equal(batch.input_ids, clean.input_ids)
    assert torch.equal(batch.position_ids, clean.position_ids)
    assert batch.seq_lens == clean.seq_lens


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=20), st.sampled_from(["best_fit", "concat", "none"]))
def test_lost_tail_drops_the_last_short_pack_only(lengths: list[int], strategy: str) -> None:
    clean = pack(lengths, 16, strategy)
    with injected("lost-tail", silent) as injection:
        broken = part("data.prepare").pack(lengths, 16, strategy)
    lost = len(clean) > 1 and int(clean.lengths[-1]) < 16
    assert broken.to_list() == clean.to_list()[: len(clean) - lost]
    assert broken.lengths.tolist() == clean.lengths.tolist()[: len(clean) - lost]
    assert injection.acted == int(lost)


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_lost_tail_loses_what_the_last_pack_held(
    packing: str, model_folder: Path, fault_data: Path, own_home: Path, tmp_path: Path
) -> None:
    recipe = recipe_for("lost-tail", model_folder, fault_data, data={"packing": packing})
    clean = see_lost_tail(recipe, tmp_path)
    with injected("lost-tail", silent):
        broken = see_lost_tail(recipe, tmp_path)
    assert clean.facts["lost"] == 0 < broken.facts["lost"] < 128


def leak_of(implementation: str, packed: list[Any]) -> tuple[float, float]:
    """How far one document's loss moves when its neighbour is replaced, and (packed - apart) of the whole loss."""
    attention.register()
    model = tiny_model().eval()
    model.set_attn_implementation(implementation)
    first, second = packed
    other = (np.array((first[0] + 1) % 256), np.full_like(first[1], -100))
    hidden = (first[0], np.full_like(first[1], -100))
    with torch.no_grad():
        with_one, with_other = (
            float(loss_sum(model, collate([[neighbour, second]]), implementation)) for neighbour in (hidden, other)
        )
        together = float(loss_sum(model, collate([packed]), implementation))
        apart = sum(float(loss_sum(model, collate([[document]]), implementation)) for document in packed)
    return abs(with_one - with_other), abs(together - apart) / apart


@settings(max_examples=10, deadline=None)
@given(st.tuples(st.integers(6, 20), st.integers(6, 20)), st.integers(0, 99))
def test_packed_leak_lets_a_neighbour_in(lengths: tuple[int, int], seed: int) -> None:
    packed = documents(lengths, seed)
    moved, difference = leak_of(attention.PER_DOCUMENT_SDPA, packed)
    assert moved == 0.0
    assert difference < 1e-5
    with injected("packed-leak", silent) as injection:
        moved, _ = leak_of(attention.PER_DOCUMENT_SDPA, packed)
    assert moved > 1e-4  # without the fault exactly 0; a short neighbour after a long document moves little
    assert injection.acted == 3  # the three rows with two documents; a document alone has nobody to see


def test_packed_leak_changes_the_loss_of_the_pack() -> None:
    """Of some packs: one document may gain by chance what the other loses."""
    with injected("packed-leak", silent):
        differences = [leak_of(attention.PER_DOCUMENT_SDPA, documents((12, 9), seed))[1] for seed in range(4)]
    assert max(differences) > 1e-4
    assert min(differences) > 0
