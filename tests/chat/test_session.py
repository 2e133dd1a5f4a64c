"""A chat session: it stops where training stopped, streams what it answers, and refuses what does not fit."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minituner import chat
from minituner.chat.session import ChatSession, _TextStream, open_session
from minituner.chat.terminal import run as talk
from minituner.cli import main
from minituner.data.conversation import Message
from minituner.errors import UsageError
from minituner.model.generate import answer_text
from minituner.train.loop import train
from tests.tiny import tiny_folder, tiny_model, tiny_recipe, tiny_tokenizer

QUESTION, ANSWER = "你是谁？", "我是小图，你的助手！😀"
TOKENIZER = tiny_tokenizer()


def memorised(place: Path, model: Path, template: str) -> Path:
    """The `hf/` folder of a model that has learned one answer by heart."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    data = place / "one.jsonl"
    data.write_text(json.dumps({"messages": turns}, ensure_ascii=False) + "\n", encoding="utf-8")
    recipe = tiny_recipe(
        model,
        data,
        method={"name": "lora", "lora_rank": 16, "lora_alpha": 32},
        data={"template": template, "max_length": 512},
        train={"max_steps": 120, "gradient_accumulation_steps": 1, "learning_rate": 1e-2},
        evaluate={"prompts": []},
    )
    return train(recipe, place / f"w-{template}", say=lambda line: None).hf


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Template -> hf folder; `internlm_chat` ends its answers with a text of several tokens here, `native` with one."""
    place = tmp_path_factory.mktemp("chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITUNER_HOME", str(place / "home"))
        base = tiny_folder(place / "base")
        folders = {name: memorised(place, base, name) for name in ("native", "internlm_chat")}
        yield {"base": base, **folders}


@pytest.mark.parametrize("template", ["native", "internlm_chat"])
def test_it_stops_on_the_trained_stop_and_streams_what_it_answers(template: str, trained: dict[str, Path]) -> None:
    session = open_session(trained[template], max_new_tokens=100, say=lambda line: None)
    assert session.template == template, "read from the folder"
    pieces: list[str] = []
    assert session.ask(QUESTION, stream=pieces.append) == ANSWER
    assert "".join(pieces) == ANSWER
    assert len(pieces) >= 8, "it came bit by bit"
    assert not any("\ufffd" in piece for piece in pieces), "never half a character"
    assert session.messages == [Message("user", QUESTION), Message("assistant", ANSWER)]
    assert chat(trained[template], QUESTION, max_new_tokens=100, say=lambda line: None) == ANSWER


def test_an_answer_cut_in_the_middle_of_a_character_is_streamed_to_its_end(trained: dict[str, Path]) -> None:
    session = open_session(trained["native"], max_new_tokens=4, say=lambda line: None)
    pieces: list[str] = []
    answer = session.ask(QUESTION, stream=pieces.append)
    assert "".join(pieces) == answer
    assert answer.startswith("我")


def test_the_history_grows_and_can_be_forgotten() -> None:
    session = ChatSession(tiny_model(), TOKENIZER, system="Be kind.", max_new_tokens=3)
    empty = session.prompt_ids("b")
    session.ask("a")
    assert [m.role for m in session.messages] == ["user", "assistant"]
    longer = TOKENIZER.decode(session.prompt_ids("b"))
    assert longer.count("<|im_start|>") == 5, "system, a, its answer, b, the answer to come"
    session.reset()
    assert session.prompt_ids("b") == empty
    assert "Be kind." in TOKENIZER.decode(empty), "the system text stays"


def test_a_conversation_that_no_longer_fits_is_refused_and_not_kept() -> None:
    session = ChatSession(tiny_model(), TOKENIZER, max_new_tokens=10)
    with pytest.raises(UsageError, match="exceed 1024"):
        session.ask("长" * 400)
    assert session.messages == []


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n<eoa>你")), max_size=40),
    st.sampled_from([[], ["<eoa>"], ["\n\n", "<eoa>"]]),
)
def test_the_streamed_pieces_are_the_answer(text: str, stops: list[str]) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    pieces: list[str] = []
    stream = _TextStream(TOKENIZER, ([258], stops), pieces.append)
    for token in ids:
        stream.put(token)
    answer = answer_text(TOKENIZER, ids, ([258], stops))
    stream.finish(answer)
    assert "".join(pieces) == answer
    assert not any(stop in answer for stop in stops)


def cli(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["minituner", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_chat_prompt_prints_only_the_answer(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chat", str(trained["native"]), "--prompt", QUESTION, "--max-new-tokens", "100"]
    assert cli(arguments, monkeypatch) == 0
    assert capsys.readouterr().out == ANSWER + "\n"


def test_a_base_and_its_adapter_can_be_given_apart(trained: dict[str, Path]) -> None:
    session = open_session(trained["base"], adapter=trained["native"], max_new_tokens=100, say=lambda line: None)
    assert session.ask(QUESTION) == ANSWER
    with pytest.raises(UsageError, match="is an adapter itself"):
        open_session(trained["native"], adapter=trained["native"])
    with pytest.raises(UsageError, match="not an adapter folder"):
        open_session(trained["base"], adapter=trained["base"])


@pytest.mark.parametrize("layers", [1, 4], ids=["fewer layers", "more layers"])
def test_an_adapter_of_a_model_of_another_shape_is_refused(
    layers: int,
    trained: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    other = tiny_folder(tmp_path / "other", layers=layers)
    arguments = ["chat", str(other), "--adapter", str(trained["native"]), "--prompt", "Hi"]
    assert cli(arguments, monkeypatch) == 2
    said = capsys.readouterr()
    assert "does not fit this model" in said.err
    assert str(trained["base"]) in said.err, "the base it belongs to is named"
    assert said.out == ""


def test_an_adapter_of_another_base_of_the_same_shape_is_said_aloud(trained: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    other = tiny_folder(tmp_path / "other", seed=5)
    open_session(other, adapter=trained["native"], say=said.append)
    assert any("other weights" in line and str(trained["base"]) in line for line in said)
    said.clear()
    open_session(trained["native"], say=said.append, dtype="bfloat16")
    assert not any("other weights" in line for line in said), "the same base in another data type is the same base"


def test_a_damaged_adapter_is_a_message(trained: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from minituner.errors import MinitunerError

    broken = shutil.copytree(trained["native"], tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(MinitunerError, match="cannot read the adapter"):
        open_session(broken, say=lambda line: None)
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(MinitunerError, match="cannot read the adapter"):
        open_session(broken, say=lambda line: None)


def test_the_terminal_answers_forgets_and_leaves(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = open_session(trained["native"], max_new_tokens=100, say=lambda line: None)
    typed = iter([QUESTION, "", "/reset", "长" * 400, QUESTION, "/exit", "never asked"])
    monkeypatch.setattr(builtins, "input", lambda _: next(typed))
    talk(session)
    out = capsys.readouterr().out
    assert out.count(f"assistant: {ANSWER}\n") == 2
    assert "(forgotten)" in out
    assert "exceed 1024" in out, "an error is shown and the conversation goes on"
    assert next(typed) == "never asked"
    assert len(session.messages) == 2


def test_the_terminal_survives_ctrl_c_in_an_answer_and_ends_with_the_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(tiny_model(), TOKENIZER)

    def interrupted(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "ask", interrupted)
    typed = iter(["Hi"])

    def read(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)
    talk(session)
    assert "(stopped)" in capsys.readouterr().out
