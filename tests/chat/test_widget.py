"""The chat in a notebook's cell, its buttons pressed."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from minituner.chat.widget import chat_widget
from minituner.errors import UsageError
from tests.chat.web_site import House, dialogue


def shown(widget: object) -> str:
    """What a person reads."""
    return html.unescape(re.sub(r"<[^>]*>", "|", widget.history.value))


def test_send_again_and_new_chat() -> None:
    house = House()
    widget = chat_widget(house.loaded, max_new_tokens=8)
    widget.text.value = "Hi"
    widget.send.click()
    widget.wait()
    (answer,) = house.alone("Hi", tokens=8)
    assert answer in shown(widget)
    assert widget.text.value == ""
    assert widget.stop.disabled
    assert not widget.send.disabled
    widget.again.click()
    widget.wait()
    assert widget.visitor.bubbles() == [dialogue(["Hi"], [answer])]
    widget.clear.click()
    assert answer not in shown(widget)
    widget.again.click()
    assert "no answer yet" in widget.note.value


def test_the_answer_grows_and_stop_ends_it() -> None:
    house = House()
    widget = chat_widget(house.loaded, max_new_tokens=24)
    (whole,) = house.alone("Hi")
    seen: list[str] = []
    house.gate.hold(4)

    def look(_: object) -> None:
        seen.append(shown(widget))
        if not widget.stop.disabled and whole[:3] in seen[-1]:
            widget.stop.click()
            house.gate.open()

    widget.history.observe(look, "value")
    widget.text.value = "Hi"
    widget.send.click()
    widget.wait()
    assert len(seen) > 1, "it was drawn more than once"
    kept = widget.visitor.bubbles()[0][1]["content"]
    assert whole.startswith(kept)
    assert len(kept) < 24
    assert not widget.send.disabled


def test_what_is_written_stays_text_and_an_empty_message_is_refused() -> None:
    widget = chat_widget(House().loaded, max_new_tokens=2)
    widget.text.value = "<script>alert(1)</script>"
    widget.send.click()
    widget.wait()
    assert "<script>" not in widget.history.value
    assert "<script>alert(1)</script>" in html.unescape(widget.history.value)
    widget.send.click()
    assert "empty" in widget.note.value


def test_compare_shows_both_and_a_message_that_does_not_fit_comes_back() -> None:
    house = House()
    widget = chat_widget(house.loaded, max_new_tokens=8, compare=True)
    widget.text.value = "Hi"
    widget.send.click()
    widget.wait()
    text = shown(widget)
    for name in ("base", "tuned"):
        assert name in text
        assert house.alone("Hi", adapter=name, tokens=8)[0] in text
    widget.text.value = "x" * 1020
    widget.send.click()
    widget.wait()
    assert widget.text.value == "x" * 1020
    assert "exceed 1024" in widget.note.value


def test_a_folder_is_opened_and_one_model_has_nothing_to_choose(model_folder: Path) -> None:
    widget = chat_widget(model_folder, max_new_tokens=2, say=lambda line: None)
    assert len(widget.children) == 4
    with pytest.raises(UsageError, match="nothing to compare"):
        chat_widget(widget.visitor.host.loaded, compare=True)
    with pytest.raises(UsageError, match="open already"):
        chat_widget(widget.visitor.host.loaded, adapter="x")
    with pytest.raises(UsageError, match="temperature"):
        chat_widget(model_folder, temprature=1)
