"""A chat session: it stops where training stopped, streams, can be interrupted, and shares its model with others."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from minituner import chat
from minituner.chat.loaded import LoadedModel
from minituner.chat.session import Session, open_session
from minituner.chat.settings import Settings
from minituner.data.conversation import Message
from minituner.errors import UsageError
from minituner.model.generate import answer_text, generate
from tests.chat.conftest import ANSWER, OTHER_ANSWER, QUESTION
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def silent(_: str) -> None:
    """Nobody listens."""


def small(**options: Any) -> Session:
    """A session over an untrained tiny model, which never stops by itself before its 40 tokens."""
    settings = options.pop("settings", Settings(max_new_tokens=40))
    return Session(LoadedModel(tiny_model(), TOKENIZER), settings=settings, **options)


@pytest.mark.parametrize("template", ["native", "internlm_chat"])
def test_it_stops_on_the_trained_stop_and_streams_what_it_answers(template: str, trained: dict[str, Path]) -> None:
    session = open_session(trained[template], max_new_tokens=100, say=silent)
    assert session.template == template, "read from the folder"
    pieces: list[str] = []
    assert session.ask(QUESTION, stream=pieces.append) == ANSWER
    assert "".join(pieces) == ANSWER
    assert len(pieces) >= 8, "it came bit by bit"
    assert not any("\ufffd" in piece for piece in pieces), "never half a character"
    assert session.messages == [Message("user", QUESTION), Message("assistant", ANSWER)]
    assert chat(trained[template], QUESTION, max_new_tokens=100, say=silent) == ANSWER


def test_an_answer_cut_in_the_middle_of_a_character_is_streamed_to_its_end(trained: dict[str, Path]) -> None:
    session = open_session(trained["native"], max_new_tokens=4, say=silent)
    pieces: list[str] = []
    answer = session.ask(QUESTION, stream=pieces.append)
    assert "".join(pieces) == answer
    assert answer.startswith("我")


def test_a_piece_is_shown_before_the_next_token_is_computed() -> None:
    session = small()
    computed = 0

    def count(*_: Any) -> None:
        nonlocal computed
        computed += 1

    session.model.register_forward_pre_hook(count)
    shown = threading.Event()

    def hold(*_: Any) -> None:
        if computed >= 12:
            assert shown.wait(60), "a dozen tokens were computed, and nothing was shown"

    session.model.register_forward_pre_hook(hold)
    reply = session.reply("Hi")
    assert next(reply)
    assert computed <= 12
    shown.set()
    assert "".join(reply)


def test_the_history_grows_and_can_be_forgotten() -> None:
    session = small(system="Be kind.", settings=Settings(max_new_tokens=3))
    empty = session.prompt_ids("b")
    session.ask("a")
    assert [m.role for m in session.messages] == ["user", "assistant"]
    longer = TOKENIZER.decode(session.prompt_ids("b"))
    assert longer.count("<|im_start|>") == 5, "system, a, its answer, b, the answer to come"
    assert session.undo() == "a"
    assert session.prompt_ids("b") == empty
    assert session.undo() is None
    session.ask("a")
    session.reset()
    assert session.prompt_ids("b") == empty
    assert "Be kind." in TOKENIZER.decode(empty), "the system text stays"
    session.system = None
    assert "Be kind." not in TOKENIZER.decode(session.prompt_ids("b"))


def test_a_message_that_does_not_fit_is_refused_and_not_kept() -> None:
    session = small()
    session.ask("a")
    with pytest.raises(UsageError, match="exceed 1024"):
        session.ask("长" * 400)
    assert len(session.messages) == 2
    assert session.first == 0, "nothing is dropped for a message that is not sent"


@pytest.mark.parametrize("way", ["event", "callable", "close", "keyboard"])
def test_an_interrupted_answer_ends_early_and_what_was_shown_is_kept(way: str) -> None:
    session = small(settings=Settings(max_new_tokens=900))
    whole = small(settings=Settings(max_new_tokens=60)).ask("Hi")
    pieces: list[str] = []
    event = threading.Event()

    def seen(piece: str) -> None:
        pieces.append(piece)
        event.set()
        if way == "keyboard":
            raise KeyboardInterrupt

    if way == "keyboard":
        with pytest.raises(KeyboardInterrupt):
            session.ask("Hi", stream=seen)
    elif way == "close":
        reply = session.reply("Hi")
        seen(next(reply))
        reply.close()
    else:
        session.ask("Hi", stream=seen, stop=event if way == "event" else event.is_set)
    assert session.messages == [Message("user", "Hi"), Message("assistant", "".join(pieces))]
    assert whole.startswith(pieces[0])
    assert len("".join(pieces)) < 800
    assert not any(thread.name == "answer" for thread in threading.enumerate()), "the weights are free again"
    assert session.ask("And?", settings=Settings(max_new_tokens=2)) is not None


def test_an_answer_stopped_before_it_began_leaves_nothing() -> None:
    session = small()
    assert session.ask("Hi", stop=lambda: True) == ""
    assert session.messages == []


def test_an_error_of_the_model_is_raised_where_the_answer_is_read_and_keeps_nothing() -> None:
    session = small()

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = session.model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.ask("Hi")
    hook.remove()
    assert session.messages == []
    assert session.ask("Hi")


def test_one_session_answers_one_at_a_time() -> None:
    session = small()
    reply = session.reply("Hi")
    next(reply)
    with pytest.raises(UsageError, match="answering already"):
        session.ask("And?")
    reply.close()
    assert session.ask("And?")


@pytest.mark.slow
def test_sessions_over_one_model_answer_at_once_and_never_mix(trained: dict[str, Path]) -> None:
    """Different adapters, different histories, threads: each answer is what it is when alone."""
    one = open_session(trained["base"], adapter=[trained["native"], trained["other"]], max_new_tokens=60, say=silent)
    names = one.loaded.names
    assert names == ["native", "other", "base"]
    questions = [QUESTION, "Hi", QUESTION]

    def talk(name: str) -> list[str]:
        session = Session(one.loaded, adapter=name, settings=one.settings)
        return [session.ask(question) for question in questions]

    alone = {name: talk(name) for name in names}
    assert (alone["native"][0], alone["other"][0]) == (ANSWER, OTHER_ANSWER)
    assert alone["base"][0] not in (ANSWER, OTHER_ANSWER)
    together: list[tuple[str, list[str]]] = []
    threads = [threading.Thread(target=lambda n=name: together.append((n, talk(n)))) for name in names * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == 6
    assert all(answers == alone[name] for name, answers in together)


def test_the_base_beside_an_adapter_is_the_base_itself_and_has_the_same_prompt(trained: dict[str, Path]) -> None:
    session = open_session(trained["internlm_chat"], max_new_tokens=60, say=silent)
    other = session.fork("base")
    assert other.prompt_ids(QUESTION) == session.prompt_ids(QUESTION)
    alone = open_session(trained["base"], template="internlm_chat", max_new_tokens=60, say=silent)
    assert other.ask(QUESTION) == alone.ask(QUESTION)
    assert session.messages == [], "a history of its own"
    assert session.ask(QUESTION) == ANSWER, "the adapter is on again"
    session.use("base")
    assert session.template == "internlm_chat"
    assert session.ask(QUESTION) != ANSWER
    with pytest.raises(UsageError, match="no adapter 'bass'"):
        session.use("bass")


def test_draws_depend_on_the_seed_alone_and_without_one_on_nothing() -> None:
    drawn = Settings(max_new_tokens=20, temperature=1.5, seed=7)
    first = small(settings=drawn).ask("Hi")
    again = small(settings=drawn)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert again.ask("Hi") == first
    assert torch.equal(torch.random.get_rng_state(), state), "nobody else's random numbers change"
    assert small(settings=drawn.changed(seed=8)).ask("Hi") != first
    free = drawn.changed(seed=None)
    once = small(settings=free).ask("Hi")  # the tiny model sets torch's seed to 0 each time
    assert small(settings=free).ask("Hi") != once
    greedy = drawn.changed(temperature=0.0)
    assert small(settings=greedy).ask("Hi") == small(settings=greedy.changed(seed=1)).ask("Hi")
    assert small(settings=drawn.changed(top_k=1)).ask("Hi") == small(settings=greedy).ask("Hi")
    assert small(settings=greedy.changed(repetition_penalty=50.0)).ask("Hi") != small(settings=greedy).ask("Hi")


def test_stop_words_end_an_answer_and_are_not_part_of_it(trained: dict[str, Path]) -> None:
    session = open_session(trained["native"], max_new_tokens=100, stop_words=("你的", "never"), say=silent)
    pieces: list[str] = []
    assert session.ask(QUESTION, stream=pieces.append) == ANSWER.split("你的")[0]
    assert "".join(pieces) == ANSWER.split("你的")[0]
    whole = open_session(trained["native"], max_new_tokens=100, stop_words=("😀!",), say=silent)
    assert whole.ask(QUESTION) == ANSWER, "the beginning of a stop word is text after all"


def test_stop_texts_end_generation_as_transformers_own_do() -> None:
    """Row by row of a batch, against transformers' stop_strings, which is exact and slow to set up."""
    from transformers import GenerationConfig

    model = tiny_model()
    model.config.use_cache = True
    prompts = [TOKENIZER.encode(text) for text in ("Hi", "Who are you", "你好")]
    free = generate(model, TOKENIZER, prompts, stop=([258], []), max_new_tokens=30)
    text = answer_text(TOKENIZER, free[1], ([258], []))
    word = next(text[i : i + 2] for i in range(4, len(text)) if "\ufffd" not in text[i : i + 2])
    ours = generate(model, TOKENIZER, prompts, stop=([258], [word]), max_new_tokens=30)
    assert len(ours[1]) < len(free[1])
    for ids, mine in zip(prompts, ours, strict=True):
        config = GenerationConfig(max_new_tokens=30, eos_token_id=258, pad_token_id=258, stop_strings=[word])
        theirs = model.generate(torch.tensor([ids]), generation_config=config, tokenizer=TOKENIZER, do_sample=False)
        wanted = answer_text(TOKENIZER, theirs[0, len(ids) :].tolist(), ([258], [word]))
        assert answer_text(TOKENIZER, mine, ([258], [word])) == wanted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("stop_words", ("",)),
    ],
)
def test_a_setting_out_of_range_is_refused_before_anything_is_loaded(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name.removesuffix("s").replace("_", ".")):
        open_session("/nowhere", **{name: value})


def test_a_setting_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="temperature"):
        open_session("/nowhere", temprature=1.0)
