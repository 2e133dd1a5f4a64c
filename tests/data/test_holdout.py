"""Held out means never trained: by content, to the token, the same everywhere, whatever the packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minituner.data.prepare import Prepared, prepare
from minituner.errors import UsageError
from minituner.recipe import DataSection
from tests.tiny import tiny_tokenizer, write_chats

pytestmark = pytest.mark.usefixtures("own_home")
TOKENIZER = tiny_tokenizer()


def prepared(*paths: Path | dict[str, Any], seed: int = 42, **settings_: Any) -> Prepared:
    sources = [p if isinstance(p, dict) else {"path": str(p)} for p in paths]
    data = DataSection(sources=sources, **{"max_length": 128, "holdout": 0.25, **settings_})
    return prepare(data, TOKENIZER, seed=seed, say=lambda line: None)


def rows_of(side: Prepared) -> set[int]:
    return set(side.rows.tolist())


def tokens_of(side: Prepared) -> int:
    return sum(len(ids) for number in range(len(side.packs)) for ids, _ in side.documents(number))


def texts(side: Prepared) -> set[bytes]:
    return {np.asarray(side.dataset[row]["input_ids"], np.int32).tobytes() for row in rows_of(side)}


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    answers=st.lists(st.integers(0, 9), min_size=2, max_size=40).filter(lambda a: len(set(a)) > 1),
    share=st.floats(0.01, 0.5),
    seed=st.integers(0, 3),
    weight=st.sampled_from([1.0, 2.0]),
)
def test_no_held_out_record_is_trained_and_every_token_has_one_place(
    packing: str, answers: list[int], share: float, seed: int, weight: float, tmp_path: Path
) -> None:
    """Records repeat here: a copy of a held-out one must not be trained either."""
    path = tmp_path / f"{abs(hash(tuple(answers)))}.jsonl"
    rows = [chat("问" * n, "答案" * (n + 1)) for n in answers]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    source = {"path": str(path), "weight": weight}
    whole = prepared(source, holdout=0.0, packing=packing, seed=seed)
    train = prepared(source, holdout=share, packing=packing, seed=seed)
    held = train.held_out
    assert whole.held_out is None
    assert held is not None
    assert texts(train).isdisjoint(texts(held))
    assert texts(train) | texts(held) == texts(whole)
    assert len(texts(held)) == min(max(round(share * len(set(answers))), 1), len(set(answers)) - 1)

    ledger = train.ledger
    ledger.check()
    assert ledger.held_out == tokens_of(held)
    assert ledger.held_out_documents == len(held.rows)
    assert ledger.documents + ledger.held_out_documents == whole.ledger.documents
    assert tokens_of(train) == weight * (ledger.trained + sum(ledger.masked.values()))
    assert ledger.raw == whole.ledger.raw
    again = prepared(source, holdout=share, packing=packing, seed=seed)
    assert again.rows.tolist() == train.rows.tolist()
    assert again.held_out is not None
    assert again.held_out.rows.tolist() == held.rows.tolist()


def test_nothing_is_tokenised_again_for_another_share(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "c.jsonl", 20)
    assert not prepared(chats, holdout=0.0).from_cache
    assert prepared(chats, holdout=0.2).from_cache


def test_another_seed_draws_others_and_more_records_move_few(tmp_path: Path) -> None:
    few = prepared(write_chats(tmp_path / "few.jsonl", 80), holdout=0.3)
    other = prepared(write_chats(tmp_path / "few.jsonl", 80), holdout=0.3, seed=7)
    more = prepared(write_chats(tmp_path / "more.jsonl", 88), holdout=0.3)
    assert few.held_out is not None
    assert other.held_out is not None
    assert more.held_out is not None
    assert len(few.held_out.rows) == 24
    assert rows_of(few.held_out) != rows_of(other.held_out)
    stayed = len(texts(few.held_out) & texts(more.held_out))
    assert stayed >= 20, "most of the 24 are still held out although the data has grown by a tenth"


def test_the_parts_of_a_split_text_stay_on_one_side(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " * 60}) + "\n" for i in range(10)), encoding="utf-8")
    side = prepared({"path": str(path), "format": "pretrain"}, too_long="split", max_length=32, holdout=0.3)
    assert side.held_out is not None
    where = np.array(side.dataset.with_format(None)["where"])
    assert len(where) > 20, "texts were split"
    assert set(where[side.rows]).isdisjoint(where[side.held_out.rows])
    assert len(set(where[side.held_out.rows])) == 3


@pytest.mark.slow
def test_several_chunks_and_processes_give_the_same_choice(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "c.jsonl", 2_100)  # three Arrow chunks
    one = prepared(chats, {"path": str(write_chats(tmp_path / "d.jsonl", 5))})
    two = prepared(chats, {"path": str(tmp_path / "d.jsonl")}, num_proc=2, cache=False)
    assert one.held_out is not None
    assert two.held_out is not None
    assert one.held_out.rows.tolist() == two.held_out.rows.tolist()
    assert one.ledger == two.ledger
    assert texts(one).isdisjoint(texts(one.held_out)), "the second file repeats records of the first"


def test_data_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text((json.dumps(chat("Hi", "Hello")) + "\n") * 5, encoding="utf-8")
    with pytest.raises(UsageError, match="1 different record") as caught:
        prepared(path)
    assert "holdout=0" in caught.value.fix


def test_the_table_and_the_picture_show_what_is_held_out(tmp_path: Path) -> None:
    from minituner.viz import ledger_bar

    ledger = prepared(write_chats(tmp_path / "c.jsonl", 20)).ledger
    assert "documents held out" in ledger.lines()[0]
    assert any(line.endswith("held out for evaluation") for line in ledger.lines())
    bar = ledger_bar(ledger)
    assert bar.data["parts"]["held out for evaluation"] == ledger.held_out
    assert sum(bar.data["parts"].values()) == ledger.raw
