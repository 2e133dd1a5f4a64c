"""Visitors: a conversation each, a line that is fair and bounded, and nothing sent that should not be."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from minituner.chat.line import Line, LineFull
from minituner.chat.loaded import LoadedModel, Voice
from minituner.chat.web_page import Handlers
from minituner.chat.web_visitor import Host, Visitor
from minituner.errors import UsageError
from tests.chat.web_site import PATIENCE, TOKENS, House, dialogue
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def house() -> House:
    return House()


def finish(visitor: Visitor) -> None:
    assert visitor.turn
    for _ in visitor.turn.updates():
        pass
    visitor.turn.join()


def test_a_line_serves_in_order_and_refuses_when_it_is_full() -> None:
    line, served = Line(3), []
    places = [line.enter() for _ in range(3)]
    with pytest.raises(LineFull, match="busy, please wait"):
        line.enter()
    assert [place.before for place in places] == [0, 1, 2]

    def use(number: int) -> None:
        assert places[number].wait()
        served.append(number)
        places[number].leave()

    threads = [threading.Thread(target=use, args=(number,)) for number in (2, 1)]
    for thread in threads:
        thread.start()
    use(0)
    for thread in threads:
        thread.join(PATIENCE)
    assert served == [0, 1, 2]
    assert len(line) == 0


def test_who_gives_up_leaves_the_line_to_the_others() -> None:
    line, told = Line(3), []
    first, second, third = (line.enter() for _ in range(3))
    assert not second.wait(given_up=lambda: bool(told), moved=told.append)
    assert told == [1]
    second.leave()
    second.leave()
    assert third.before == 1
    first.leave()
    assert third.wait()


def test_two_visitors_never_read_each_other(house: House) -> None:
    ada, bo = Visitor(house.host), Visitor(house.host)
    asked = {ada: ["I am Ada.", "Who am I?"], bo: ["I am Bo.", "Who am I?"]}
    for number in range(2):
        for visitor, messages in asked.items():
            visitor.send(messages[number])
        for visitor in asked:
            finish(visitor)
    for visitor, messages in asked.items():
        assert visitor.bubbles() == [dialogue(messages, house.alone(*messages))]
    assert ada.bubbles()[0][3] != bo.bubbles()[0][3], "the same question, another history"


def test_an_answer_is_seen_while_it_grows_and_can_be_stopped(house: House) -> None:
    visitor, (whole,) = Visitor(house.host), house.alone("Hi")
    house.gate.hold(5)
    turn = visitor.send("Hi")
    for _ in turn.updates():
        if len(turn.answers[0]) >= 4:
            break
    (user, growing), *_ = visitor.bubbles()
    assert user == {"role": "user", "content": "Hi"}
    assert whole.startswith(growing["content"])
    assert 4 <= len(growing["content"]) <= 5, "and the model is held"
    with pytest.raises(UsageError, match="under way"):
        visitor.send("More")
    visitor.stop()
    house.gate.open()
    turn.join()
    assert turn.stopped
    shown = visitor.bubbles()[0][1]["content"]
    assert whole.startswith(shown)
    assert len(shown) < TOKENS
    visitor.send("More")
    finish(visitor)
    assert len(visitor.bubbles()[0]) == 4


def test_a_reader_that_leaves_stops_the_answer_and_the_next_is_served(house: House) -> None:
    ada, bo = Visitor(house.host), Visitor(house.host)
    house.gate.hold(3)
    updates = ada.send("Hi").updates()
    next(updates)
    house.gate.wait_until_held()
    waiting = bo.send("Hello")
    assert waiting._place.before == 1
    updates.close()
    house.gate.open()
    finish(bo)
    assert bo.bubbles() == [dialogue(["Hello"], house.alone("Hello"))]
    assert len(ada.turn.answers[0]) < TOKENS
    assert len(house.host.line) == 0


def test_stopped_while_waiting_says_nothing(house: House) -> None:
    ada, bo = Visitor(house.host), Visitor(house.host)
    house.gate.hold()
    ada.send("Hi")
    house.gate.wait_until_held()
    turn = bo.send("Hello")
    bo.stop()
    turn.join()
    assert bo.bubbles() == [[]]
    house.gate.open()
    finish(ada)


def test_both_sides_answer_with_histories_of_their_own(house: House) -> None:
    visitor = Visitor(house.host)
    visitor.send("One")
    finish(visitor)
    for message in ("Two", "Three"):
        visitor.send(message, compare=True)
        finish(visitor)
    base, tuned = visitor.bubbles()
    messages = ["One", "Two", "Three"]
    assert tuned == dialogue(messages, house.alone(*messages))
    assert base[:2] == tuned[:2], "it goes on from where the conversation was"
    assert base[3] != tuned[3]
    visitor.send("Four", compare=True, adapter="base")
    finish(visitor)
    assert [side.adapter for side in visitor.talk.sides] == ["tuned", "base"], "never the same twice"
    visitor.send("Five")
    finish(visitor)
    assert len(visitor.bubbles()) == 1


def test_a_side_that_is_done_is_shown_once_while_the_other_answers(house: House) -> None:
    visitor = Visitor(house.host)
    house.gate.hold(TOKENS + 5)
    for _ in visitor.send("Hi", compare=True).updates():
        base, tuned = visitor.bubbles()
        if len(tuned) == 2:
            assert base == dialogue(["Hi"], [visitor.turn.answers[0]])
            assert len(base[1]["content"]) == TOKENS
            house.gate.open()
    assert visitor.bubbles() == [dialogue(["Hi"], house.alone("Hi", adapter=name)) for name in ("base", "tuned")]


def test_each_adapter_s_system_text_is_offered_unless_another_was_written(house: House) -> None:
    voice = Voice("native", None, house.loaded.tokenizer)
    house.loaded.voices = {"kind": replace(voice, system="Be kind."), "plain": voice, "base": voice}
    handlers = Handlers(None, house.host)
    assert handlers.system_of("plain", "Be kind.") == ""
    assert handlers.system_of("kind", "") == "Be kind."
    assert handlers.system_of("kind", "Mine.") == "Mine."
    for text in ("Be kind.", "", "Mine."):
        assert handlers.system_of("base", text) == text, "the base is asked as the adapter before it was"


def test_again_is_the_same_greedy_answer_and_new_chat_forgets(house: House) -> None:
    visitor = Visitor(house.host)
    with pytest.raises(UsageError, match="no answer yet"):
        visitor.again()
    visitor.send("Hi")
    finish(visitor)
    before = visitor.bubbles()
    visitor.send(visitor.again())
    finish(visitor)
    assert visitor.bubbles() == before
    visitor.send("More")
    visitor.forget()
    assert visitor.bubbles() == [[]]


@pytest.mark.parametrize(
    ("message", "settings", "said"),
    [
        ("", {}, "empty"),
        (" \n", {}, "empty"),
        ("x" * 101, {}, "101 characters"),
        (["x"], {}, "no text"),
        ("Hi", {"system": "x" * 101}, "101 characters"),
        ("Hi", {"max_new_tokens": 65}, "64 are the most"),
        ("Hi", {"max_new_tokens": 2.5}, "whole number"),
        ("Hi", {"max_new_tokens": None}, "no number"),
        ("Hi", {"temperature": float("nan")}, "temperature"),
        ("Hi", {"temperature": "hot"}, "no number"),
        ("Hi", {"seed": "x"}, "whole number"),
        ("Hi", {"adapter": "nobody"}, "nobody"),
    ],
)
def test_what_is_out_of_range_is_refused_and_nothing_is_said(message: Any, settings: Any, said: str) -> None:
    house = House(longest_message=100, longest_answer=64)
    visitor = Visitor(house.host)
    with pytest.raises(UsageError, match=said):
        visitor.send(message, **settings)
    assert visitor.bubbles() == [[]]
    assert len(house.host.line) == 0


def test_numbers_of_a_browser_are_settings() -> None:
    visitor = Visitor(House().host)
    turn = visitor.send("Hi", max_new_tokens=3.0, seed="7", top_k=2.0, temperature=1, system="Be kind.")
    assert (turn.settings.max_new_tokens, turn.settings.seed, turn.settings.top_k) == (3, 7, 2)
    assert visitor.talk.session.system == "Be kind."
    finish(visitor)
    assert visitor.send("Hi", max_new_tokens=3, seed=" ").settings.seed is None


def test_a_message_that_does_not_fit_and_an_error_of_the_model_reach_the_reader(house: House) -> None:
    visitor = Visitor(house.host)
    turn = visitor.send("x" * 1020)
    finish(visitor)
    assert "exceed 1024" in turn.refusal.text()
    hook = house.loaded.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(visitor.send("Hi").updates())
    hook.remove()
    visitor.send("Hi")
    finish(visitor)
    assert visitor.bubbles() == [dialogue(["Hi"], house.alone("Hi"))]


def test_a_host_with_limits_that_contradict_each_other_is_refused() -> None:
    loaded = LoadedModel(tiny_model(), tiny_tokenizer())
    with pytest.raises(UsageError, match="256"):
        Host(loaded, longest_answer=10)
    with pytest.raises(UsageError, match="1 or more"):
        Line(0)
