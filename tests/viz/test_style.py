"""One style: colours that colour-blind readers and grey printers can tell apart, text big enough for print, words.

Every public figure is drawn once here, and what it drew is looked at, not what it meant to draw.
"""

from __future__ import annotations

import base64
import re
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pictures need the notebooks extra")

from matplotlib import colors, rcParams
from matplotlib.lines import Line2D
from matplotlib.text import Text

from minituner import viz
from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import encode_many
from minituner.data.ledger import Ledger
from minituner.viz import attention, cost, lengths, museum, style
from tests.tiny import tiny_tokenizer

# Machado, Oliveira, Fernandes (2009): what is left of linear RGB for those who lack one kind of cone.
EYES = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
APART = 15  # CIELAB units (delta E 1976); 2.3 can just be seen side by side, a legend is read from further away
LIGHTER = 10  # units of L*, of 100 between ink and paper: two greys in one print
SETS = {
    "palette": style.PALETTE,
    "tokens": (lengths.TRAINED, lengths.MASKED, lengths.LOST, lengths.PADDING, lengths.HELD_OUT),
    "mask": (style.EMPTY, attention.ALLOWED, attention.LEAK),
    "tiles": (cost.SKIPPED, cost.PARTLY, cost.WHOLE),
    "museum": (museum.CLEAN, museum.BROKEN),
}


def lab(colour: Any, eye: str = "all cones") -> np.ndarray:
    """CIELAB (L*, a*, b*) of a colour as that eye sees it; D65."""
    rgb = np.array(colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    ratio = XYZ @ np.clip(EYES[eye] @ linear, 0, 1) / (XYZ @ np.ones(3))
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def closest(several: Any, eye: str) -> float:
    """The smallest difference between any two of the colours."""
    return min(float(np.linalg.norm(lab(a, eye) - lab(b, eye))) for a, b in combinations(several, 2))


def test_the_measure_is_right_and_finds_the_classic_fault() -> None:
    assert lab("white") == pytest.approx([100, 0, 0], abs=1e-6)
    assert lab("red") == pytest.approx([53.24, 80.09, 67.20], abs=0.01)
    for name, eye in EYES.items():
        assert eye.sum(axis=1) == pytest.approx(1, abs=1e-5), f"{name} keeps greys grey"
    red_and_green = ("tab:red", "tab:green")
    assert closest(red_and_green, "all cones") > 100
    assert closest(red_and_green, "deuteranopia") < APART / 2, "matplotlib's own would not pass"


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("name", SETS)
def test_colours_drawn_together_stay_apart(name: str, eye: str) -> None:
    assert closest(SETS[name], eye) >= APART


def test_numbered_marks_differ_as_long_as_the_colours_do() -> None:
    count = len(style.PALETTE)
    assert len({(look["linestyle"], look["marker"]) for look in map(style.line, range(count))}) == count
    assert len({style.bar(number)["hatch"] for number in range(count)}) == count
    first = [lab(colour)[0] for colour in style.PALETTE[:3]]
    assert min(abs(a - b) for a, b in combinations(first, 2)) >= LIGHTER, "most figures need three"


@cache
def gallery() -> dict[str, Any]:
    """One of everything that `viz` draws, as full as it gets."""
    tokenizer = tiny_tokenizer()
    chat = Conversation([Message("user", "Hi 你好"), Message("assistant", "Hello!")])
    document = encode_many([chat], tokenizer)[0]
    ledger = Ledger()
    ledger.keep(document)
    ledger.cut(9)
    ledger.drop("too long", 11)
    ledger.drop("empty", 4)
    steps = [
        {"step": n, "loss": 2 / n, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_second": 9.0} for n in (1, 2, 3)
    ]
    parts = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "logits", "buffers", "rest"), 1e9)
    points = [{"step": n, "identity_rate": n / 3, "retention_kl": n / 9} for n in (0, 1, 3)]
    names = [f"way {number}" for number in range(7)]
    return {
        "token_strip": viz.token_strip(document, tokenizer),
        "token_html": viz.token_html(document, tokenizer),
        "label_strip": viz.label_strip(document, tokenizer),
        "attention_mask": viz.attention_mask([3, 2], "full"),
        "packing_bins": viz.packing_bins([[0, 1, 2], [3]], [5, 3, 2, 7], 12),
        "length_histogram": viz.length_histogram([3, 5, 8, 20], max_length=16),
        "ledger_bar": viz.ledger_bar(ledger),
        "memory_bars": viz.memory_bars({"full": parts}, {"full": parts}),
        "shard_map": viz.shard_map(4),
        "sequence_split": viz.sequence_split([5, 3], heads=4, world_size=4),
        "tiles": viz.tiles([5, 3], 2, 3),
        "cost_curves": viz.cost_curves([64, 128], {name: [1, 2] for name in names}, ylabel="ms"),
        "loss_curve": viz.loss_curve(steps),
        "museum_curves": viz.museum_curves(steps, {"packed-leak": steps}),
        "tradeoff": viz.tradeoff(dict.fromkeys(names, points), beside={"known before": points}),
    }


NOT_DRAWN_HERE = {"Picture", "TokenHtml", "LiveLoss", "use_style"}  # kinds, and what draws with loss_curve


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The gallery, with the curves of a run that was resumed."""
    work_dir = tmp_path_factory.mktemp("run")
    for stamp, first in (("20261121-101500", 1), ("20261121-111500", 3)):
        folder = work_dir / "runs" / stamp
        folder.mkdir(parents=True)
        line = '{"step": %d, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1, "tokens_per_second": 5}\n'
        held_out = '{"step": %d, "eval_loss": 2.5}\n'
        text = "".join((line + held_out) % (step, step) for step in (first, first + 1))
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return {**gallery(), "run_curves": viz.run_curves(work_dir)}


def test_everything_public_is_in_the_gallery(drawn: dict[str, Any]) -> None:
    assert set(drawn) == set(viz.__all__) - NOT_DRAWN_HERE


def test_every_figure_has_words_for_those_who_do_not_see_it(drawn: dict[str, Any]) -> None:
    for name, picture in drawn.items():
        assert len(picture.summary.split()) >= 3, f"{name}: {picture.summary!r}"
        if not isinstance(picture, viz.Picture):
            assert "<span" in picture.html, "text, as a screen reader reads it"


def test_jupyter_shows_them_as_the_image_s_alt_text(drawn: dict[str, Any]) -> None:
    picture = drawn["attention_mask"]
    formatter = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    data, metadata = formatter.format(picture)
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert picture.summary in data["text/plain"]
    assert metadata["image/png"] == {"alt": picture.summary}


def looks(picture: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Label -> (colour, marks that need no colour) of every entry of a figure's legends."""
    legends = [*picture.figure.legends, *(axes.legend_ for axes in picture.figure.axes if axes.legend_)]
    found = {}
    for legend in legends:
        for text, handle in zip(legend.texts, legend.legend_handles, strict=True):
            if isinstance(handle, Line2D):
                look = handle.get_color(), (handle.get_linestyle(), handle.get_marker(), handle.get_linewidth())
            else:
                edge = colors.to_hex(handle.get_edgecolor())
                underlined = "(underlined)" in text.get_text()  # the legend says so where a box cannot show it
                look = handle.get_facecolor(), (handle.get_hatch() or "", edge == "#000000", underlined)
            found[text.get_text()] = look
    return found


def test_no_two_entries_of_a_legend_need_colour_to_be_told_apart(drawn: dict[str, Any]) -> None:
    with_legend = 0
    for name, picture in drawn.items():
        entries = looks(picture) if isinstance(picture, viz.Picture) else {}
        with_legend += bool(entries)
        for (a, (colour, marks)), (b, (other, other_marks)) in combinations(entries.items(), 2):
            if marks != other_marks:
                continue
            assert abs(lab(colour)[0] - lab(other)[0]) >= LIGHTER, f"{name}: {a} and {b} are one grey"
            for eye in EYES:
                assert np.linalg.norm(lab(colour, eye) - lab(other, eye)) >= APART, f"{name}: {a}, {b}: {eye}"
    assert with_legend >= 9


def test_no_text_is_too_small_for_print(drawn: dict[str, Any]) -> None:
    for name, picture in drawn.items():
        if isinstance(picture, viz.Picture):
            texts = [text for text in picture.figure.findobj(Text) if text.get_text().strip()]
            assert texts, name
            small = [(text.get_text(), text.get_fontsize()) for text in texts if text.get_fontsize() < style.SMALL]
            assert not small, f"{name}: {small[:3]}"


def test_the_look_is_the_same_whatever_the_caller_has_set() -> None:
    before = dict(rcParams)
    try:
        rcParams.update({"font.size": 30, "axes.spines.top": True, "axes.titlesize": 40})
        axes = viz.loss_curve([{"step": 1, "loss": 2.0}]).figure.axes[0]
        assert axes.title.get_fontsize() == style.TITLE
        assert not axes.spines["top"].get_visible()
        assert rcParams["font.size"] == 30, "and the caller's settings come back"
    finally:
        rcParams.update(before)


def test_a_notebook_that_draws_by_itself_can_have_the_look() -> None:
    from matplotlib.figure import Figure

    before = dict(rcParams)
    try:
        viz.use_style()
        axes = Figure().add_subplot()
        lines = [axes.plot([0, 1])[0] for _ in style.PALETTE]
        assert [line.get_color() for line in lines] == list(style.PALETTE)
        assert lines[0].get_linestyle() != lines[1].get_linestyle()
        assert axes.xaxis.label.get_fontsize() == style.LABEL
    finally:
        rcParams.update(before)


def test_colours_are_written_down_in_one_file() -> None:
    folder, colour = Path(style.__file__).parent, re.compile(r"#[0-9a-fA-F]{6}\b")
    assert {file.name for file in folder.glob("*.py") if colour.search(file.read_text("utf-8"))} == {"style.py"}
