"""Pictures: the data each figure returns is what was asked for, and it can be drawn without a warning."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pictures need the notebooks extra")

from minituner import viz
from minituner.data.collate import collate
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import Encoded, encode_many
from minituner.data.ledger import Ledger
from minituner.data.packing import pack
from minituner.errors import UsageError
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def document(tokenizer: Any, question: str = "Hi $x$ <b>", answer: str = "你好 🎉!") -> Encoded:
    return encode_many([Conversation([Message("user", question), Message("assistant", answer)])], tokenizer)[0]


def png(picture: viz.Picture) -> bytes:
    """Draw it; any warning (a missing glyph, a layout that fails) is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = picture._repr_png_()
    assert data.startswith(b"\x89PNG")
    return data


def test_a_picture_is_never_known_to_pyplot(tokenizer: Any) -> None:
    picture = viz.attention_mask([2, 1])
    png(picture)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums(), "pyplot would show it a second time"
    assert repr(picture).startswith("Picture(packed, isolated: 2 documents")


def test_token_strip_gives_texts_ids_roles(tokenizer: Any) -> None:
    shown = document(tokenizer)
    picture = viz.token_strip(shown, tokenizer, width=40)
    png(picture)
    data = picture.data
    assert data["ids"].tolist() == shown.input_ids.tolist()
    assert data["trained"].tolist() == shown.trained.tolist()
    assert data["roles"].count("stop") == 1
    assert data["roles"][0] == "bos"
    assert {"你", "好", "🎉", "$"} <= set(data["texts"]), "the data holds characters that the figure may lack"
    png(viz.token_strip(shown, tokenizer, show_ids=True))
    assert viz.token_strip(shown, tokenizer, limit=5).data["hidden"] == len(shown) - 5


@pytest.mark.slow
def test_token_strip_takes_anything(tokenizer: Any) -> None:
    for text in ("", " ", "\u202e\x1b[31m", "x" * 300, "กำ \U000e0041 ا", "$\\frac{1}{2}$ _^{"):
        png(viz.token_strip(document(tokenizer, text, text or "a"), tokenizer))
        png(viz.label_strip(document(tokenizer, text, text or "a"), tokenizer))
    empty = document(tokenizer)[:0]
    png(viz.token_strip(empty, tokenizer))
    png(viz.label_strip(empty, tokenizer))
    assert "0 tokens" in repr(viz.token_html(empty, tokenizer))
    with pytest.raises(UsageError, match="width"):
        viz.token_strip(document(tokenizer), tokenizer, width=3)


def test_token_html_escapes_and_keeps_roles_apart_without_colour(tokenizer: Any) -> None:
    html = viz.token_html(document(tokenizer, "<script>alert('1')</script>&\"", "\u202eno"), tokenizer, show_ids=True)
    text = html._repr_html_()
    assert "<script" not in text
    assert "&lt;" in text
    assert "&quot;" in text
    assert "\u202e" not in text
    assert "⟨U+202E⟩" in text
    assert "border-bottom:2px solid #00694e" in text, "trained is underlined"
    assert "border:2px solid #000000" in text, "stop is boxed"
    assert html.data["roles"].count("stop") == 1
    assert "<sub" in text


def test_label_strip_is_what_collate_trains_on(tokenizer: Any) -> None:
    shown = document(tokenizer)
    picture = viz.label_strip(shown, tokenizer, limit=1000)
    png(picture)
    batch = collate([[(shown.input_ids.astype(np.int64), shown.labels.astype(np.int64))]])
    assert picture.data["targets"].tolist() == batch.shift_labels[0].tolist()
    assert picture.data["supervised"] == batch.supervised_tokens
    part = viz.label_strip(shown, tokenizer, limit=10).data
    assert part["targets"].tolist() == batch.shift_labels[0, :10].tolist()
    assert part["hidden"] == len(shown) - 10
    underlines = [line for line in picture.figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert {line.get_linestyle() for line in underlines} == {"-"}, "a dotted line would mean something else"


def test_block_diagonal_mask_is_the_definition() -> None:
    lengths = [3, 1, 2]
    picture = viz.attention_mask(lengths)
    png(picture)
    owner = np.repeat(np.arange(3), lengths)
    i, j = np.indices((6, 6))
    assert (picture.data["mask"] == ((i >= j) & (owner[i] == owner[j]))).all()
    assert picture.data["leaks"] == 0
    assert picture.data["allowed"] == sum(n * (n + 1) // 2 for n in lengths)


def test_full_mask_counts_what_leaks() -> None:
    picture = viz.attention_mask([3, 2], "full", max_length=8)
    png(picture)
    mask = picture.data["mask"]
    assert mask.shape == (8, 8)
    assert (mask[:5, :5] == np.tri(5, dtype=bool)).all()
    assert not mask[5:].any()
    assert not mask[:, 5:].any()
    assert picture.data["leaks"] == 6
    assert picture.data["waste"] == pytest.approx(3 / 8)


def test_padded_masks_have_a_row_for_each_document() -> None:
    picture = viz.attention_mask([3, 1], "padded", max_length=4)
    png(picture)
    mask = picture.data["mask"]
    assert mask.shape == (2, 4, 4)
    assert mask.sum(axis=(1, 2)).tolist() == [6, 1]
    assert picture.data["waste"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("lengths", "kind", "size"),
    [([], "full", None), ([0], "full", None), ([3], "block", None), ([3], "full", 2), ([9999], "full", None)],
)
def test_masks_that_cannot_be(lengths: list[int], kind: Any, size: int | None) -> None:
    with pytest.raises(UsageError):
        viz.attention_mask(lengths, kind, size)


@pytest.mark.parametrize("strategy", ["best_fit", "concat", "none"])
def test_packing_bins_draws_the_plan(strategy: str) -> None:
    lengths = [5, 3, 8, 2, 6]
    packs = pack(lengths, 8, strategy)
    picture = viz.packing_bins(packs, lengths, 8)
    png(picture)
    assert picture.data["fill"] == pytest.approx(packs.fill)
    assert picture.data["count"] == len(packs)
    assert sum(tokens for row in picture.data["packs"] for _, tokens in row) == sum(lengths)
    if strategy != "concat":
        assert [[record for record, _ in row] for row in picture.data["packs"]] == packs.to_list()


def test_packing_bins_limits_and_refuses() -> None:
    many = viz.packing_bins([[0]] * 100, [4], 8, limit=7)
    png(many)
    assert len(many.data["packs"]) == 7
    assert many.data["hidden"] == 93
    assert viz.packing_bins([], [], 8).data["fill"] == 0
    png(viz.packing_bins([], [], 8))
    with pytest.raises(UsageError, match="pack 0 holds 9"):
        viz.packing_bins([[0]], [9], 8)


def test_length_histogram_counts_every_record() -> None:
    picture = viz.length_histogram([1, 5, 5, 9, 100], max_length=9)
    png(picture)
    assert picture.data["counts"].sum() == 5
    assert picture.data["longer"] == 1
    assert picture.data["median"] == 5
    png(viz.length_histogram([7]))
    with pytest.raises(UsageError):
        viz.length_histogram([])


def test_ledger_bar_adds_up(tokenizer: Any) -> None:
    ledger = Ledger()
    ledger.keep(document(tokenizer))
    ledger.cut(7)
    ledger.drop("too long", 5)
    picture = viz.ledger_bar(ledger)
    png(picture)
    assert sum(picture.data["parts"].values()) == picture.data["raw"] == ledger.raw
    assert viz.ledger_bar(ledger.to_dict()).data == picture.data
    png(viz.ledger_bar(Ledger()))


def steps(count: int) -> list[dict[str, Any]]:
    return [{"step": i + 1, "loss": 2.0 / (i + 1), "learning_rate": 1e-4} for i in range(count)]


def test_loss_curve_and_its_running_mean() -> None:
    constant = [{"step": i, "loss": 3.0, "learning_rate": 0.1} for i in range(5)]
    assert viz.loss_curve(constant).data["smoothed"] == pytest.approx([3.0] * 5), "no pull towards zero"
    gap = viz.loss_curve([*steps(3), {"step": 4, "loss": "nan", "learning_rate": 1e-4}])
    png(gap)
    assert gap.data["not_finite"] == 1
    assert np.isfinite(gap.data["smoothed"]).all()
    assert viz.loss_curve(steps(120)).data["steps"].tolist() == list(range(1, 121))
    with pytest.raises(UsageError):
        viz.loss_curve([])


def test_live_loss_renews_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    from minituner.viz import loss

    IPython_display = pytest.importorskip("IPython.display")
    shown: list[Any] = []
    updated: list[Any] = []

    def display(picture: Any, display_id: bool) -> Any:
        assert display_id
        shown.append(picture)
        return SimpleNamespace(update=updated.append)

    monkeypatch.setattr(IPython_display, "display", display)
    monkeypatch.setattr(loss, "in_notebook", lambda: True)
    live = viz.LiveLoss(every_seconds=0)
    live.on_start(None)
    for line in steps(3):
        live.on_step(None, line)
    live.on_end(None)
    assert len(shown) == 1
    assert updated[-1] is live.picture
    assert live.picture is not None
    assert live.picture.data["steps"].tolist() == [1, 2, 3]


def test_live_loss_is_quiet_outside_a_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    live = viz.LiveLoss()
    live.on_start(None)
    live.on_step(None, steps(1)[0])
    assert live.picture is None, "drawing costs time that training should have"
    live.on_end(None)
    assert live.picture is not None
    assert capsys.readouterr().out == ""


def test_pictures_can_be_saved(tmp_path: Any) -> None:
    viz.attention_mask([2, 2]).save(str(tmp_path / "mask.svg"))
    assert (tmp_path / "mask.svg").read_text().startswith("<?xml")


def test_a_chinese_font_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from minituner.viz import picture

    families, points = picture.fonts()
    assert families[0] == picture.LATIN
    monkeypatch.setattr(picture, "fonts", lambda: (families, points | {ord("你")}))
    assert picture.drawable("你$") == "你\\$"
    monkeypatch.setattr(picture, "fonts", lambda: (families, points - {ord("你")}))
    assert picture.drawable("a你") == "a·"
    assert picture.lacks_a_font("你")
