"""Streamed text: the pieces are the answer, none is half a character, and a long answer costs no more a token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner.chat.text_stream import TextStream
from minituner.model.generate import answer_text
from tests.tiny import tiny_tokenizer

BYTES = tiny_tokenizer()
CONTROL = [256, 257, 258]


def sentencepiece() -> Any:
    """A tokenizer that drops the space in front of the first word, and falls back to bytes, as Llama 2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁", "a", "b", "▁a", "▁b", "你", "<", "e", "o", ">", "\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[("▁", "a"), ("▁", "b")],
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)


SENTENCEPIECE = sentencepiece()
TEXT = st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n<eoa>你ab😀.")), max_size=40)
STOPS = st.sampled_from([[], ["<eoa>"], ["\n\n", "<eoa>"], ["。", "aa"]])


def streamed(tokenizer: Any, ids: list[int], stops: list[str]) -> tuple[list[str], str]:
    """The pieces, and the answer they should be."""
    stream, pieces = TextStream(tokenizer, stops), []
    for token in ids:
        pieces.append(stream.put(token))
    answer = answer_text(tokenizer, ids, ([258], stops))
    return [*pieces, stream.finish(answer)], answer


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([BYTES, SENTENCEPIECE]), TEXT, STOPS)
def test_the_streamed_pieces_are_the_answer(tokenizer: Any, text: str, stops: list[str]) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, answer = streamed(tokenizer, ids, stops)
    assert "".join(pieces) == answer
    assert not any(stop in answer for stop in stops)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 258), max_size=40), STOPS)
def test_whatever_ids_a_model_says_the_pieces_are_the_answer(ids: list[int], stops: list[str]) -> None:
    """Bytes that are no text, control tokens in the middle, an end in half a character."""
    pieces, answer = streamed(BYTES, ids, stops)
    assert "".join(pieces) == answer


def test_a_character_appears_when_its_last_byte_does_and_a_space_with_the_next_word() -> None:
    stream = TextStream(BYTES, ["<eoa>"])
    ids = BYTES.encode("你 😀<eo!", add_special_tokens=False)
    assert [stream.put(token) for token in ids] == ["", "", "你", "", "", "", "", " 😀", "", "", "", "<eo!"]


def test_a_long_answer_decodes_only_its_newest_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    import minituner.chat.text_stream as module

    lengths: list[int] = []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda tokenizer, ids: lengths.append(len(ids)) or decode(tokenizer, ids))
    pieces, answer = streamed(BYTES, BYTES.encode("你好 a" * 100, add_special_tokens=False), [])
    assert "".join(pieces) == answer == "你好 a" * 100
    assert max(lengths) <= 8
