"""Token ids as data: what the file says is what is trained, and nothing is added to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minituner.data.encoding import IGNORE, encode_many
from minituner.data.formats import detect_format, to_conversation
from minituner.data.prepare import prepare
from minituner.data.tokenized import load_tokenized, write_tokenized
from minituner.errors import DataError
from minituner.recipe import DataSection
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = st.lists(st.tuples(st.integers(0, len(TOKENIZER) - 1), st.booleans()), max_size=40)


def row_of(pairs: list[tuple[int, bool]]) -> dict[str, list[int]]:
    return {"input_ids": [i for i, _ in pairs], "labels": [i if trained else IGNORE for i, trained in pairs]}


@given(ROWS, st.sampled_from(["native", "qwen_chat"]), st.sampled_from(["once", "xtuner"]))
def test_ids_and_labels_come_back_as_they_are(pairs: list[tuple[int, bool]], template: str, bos: Any) -> None:
    row = row_of(pairs)
    document = encode_many([to_conversation(row, "tokenized")], TOKENIZER, template, bos)[0] if pairs else None
    if document is not None:
        assert document.input_ids.tolist() == row["input_ids"]
        assert document.labels.tolist() == row["labels"]
    else:
        assert not to_conversation(row, "tokenized").messages


@given(ROWS)
def test_signed_ids_say_the_same(pairs: list[tuple[int, bool]]) -> None:
    row = row_of(pairs)
    signed = [i if trained else -i for i, trained in pairs]
    zeros = [at for at, (i, trained) in enumerate(pairs) if trained and not i]
    assert to_conversation({"tokens": signed, "zero_trained": zeros}, "tokenized") == to_conversation(row, "tokenized")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [5, 6, 7], "labels": [6, 7, IGNORE]}, "shifted by one, and training shifts them again"),
        ({"input_ids": [5, 6], "labels": [5, 9]}, r"labels\[1\]: 9, and input_ids\[1\] is 6"),
        ({"input_ids": [5, 6], "labels": [5]}, "labels: 1 for 2 input_ids"),
        ({"input_ids": [5, -6]}, "-6 is no token"),
        ({"input_ids": [5, 6.5]}, "whole numbers"),
        ({"input_ids": ["5"]}, "whole numbers"),
        ({"input_ids": [[5]]}, "whole numbers"),
        ({"input_ids": "5 6"}, "expected a list of token ids, found str"),
        ({"text": "5 6"}, "input_ids: expected a list of token ids, found NoneType"),
        ({"input_ids": [5, 0], "attention_mask": [1, 0]}, "this row is padded"),
        ({"input_ids": [5, 0], "attention_mask": "11"}, "attention_mask: expected a list"),
        ({"input_ids": [[5], [6, 7]]}, "whole numbers"),
        ({"input_ids": [2**31]}, "is no token id"),
        ({"tokens": [-(2**63)]}, "is no token id"),
        ({"tokens": [5, 0], "zero_trained": [2]}, "zero_trained: 2 is not the place of a token 0"),
        ({"tokens": [5, 0], "zero_trained": [0]}, "zero_trained: 0 is not the place of a token 0"),
        ({"tokens": [5, 0], "zero_trained": True}, "zero_trained: expected a list"),
        ({"tokens": [], "zero_trained": "0"}, "zero_trained: expected a list"),
    ],
)
def test_what_would_train_something_else_is_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        to_conversation(row, "tokenized")
    import re

    assert re.search(said, caught.value.text())


def test_ids_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(DataError, match=f"token id {len(TOKENIZER)}, and this model's tokenizer has"):
        encode_many([to_conversation({"input_ids": [1, len(TOKENIZER)]}, "tokenized")], TOKENIZER)


def test_it_is_recognised_by_its_columns() -> None:
    assert detect_format([{"input_ids": [1, 2], "labels": [1, 2]}])[0] == "tokenized"


def section(path: Path, **values: Any) -> DataSection:
    return DataSection(sources=[{"path": str(path), "format": "tokenized"}], max_length=16, **values)


def documents(data: DataSection) -> list[tuple[list[int], list[int]]]:
    prepared = prepare(data, TOKENIZER, say=lambda line: None)
    packs = [prepared.documents(number) for number in range(len(prepared.packs))]
    return sorted((ids.tolist(), labels.tolist()) for pack in packs for ids, labels in pack)


def test_a_folder_of_bin_files_is_a_source(tmp_path: Path, own_home: Path) -> None:
    rows = [row_of([(i, i % 3 > 0) for i in range(n, n + 9)]) for n in (0, 20, 40)]
    samples = [{k: np.array(v) for k, v in row.items()} for row in rows]
    write_tokenized(tmp_path / "bin" / "a.bin", samples[:2])
    write_tokenized(tmp_path / "bin" / "deep" / "b.bin", samples[2:])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = sorted((row["input_ids"], row["labels"]) for row in rows)
    assert documents(section(tmp_path / "bin")) == wanted
    assert documents(section(tmp_path / "rows.jsonl")) == wanted
    assert documents(section(tmp_path / "bin" / "a.bin")) == wanted[:2]
    assert len(load_tokenized(tmp_path / "bin")) == 3


def test_a_long_document_is_cut_or_split_like_text(tmp_path: Path, own_home: Path) -> None:
    ids = list(range(40))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": ids}))
    assert [found for found, _ in documents(section(tmp_path / "rows.jsonl", packing="none"))] == [ids[:16]]
    split = documents(section(tmp_path / "rows.jsonl", packing="none", too_long="split"))
    assert [found for found, _ in split] == [ids[:16], ids[16:32], ids[32:]]
