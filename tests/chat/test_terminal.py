"""The terminal and the command: what is typed, what is printed, and with which exit status it ends."""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from minituner.chat.commands import HELP, Talk
from minituner.chat.loaded import LoadedModel
from minituner.chat.session import Session, open_session
from minituner.chat.settings import Settings
from minituner.chat.terminal import run, show
from minituner.cli import main
from minituner.errors import UsageError
from tests.chat.conftest import ANSWER, OTHER_ANSWER, QUESTION
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer


def silent(_: str) -> None:
    """Nobody listens."""


def small(**options: int) -> Session:
    """An untrained tiny model."""
    return Session(LoadedModel(tiny_model(), tiny_tokenizer()), settings=Settings(**{"max_new_tokens": 4} | options))


def typed(lines: Iterable[str], patch: pytest.MonkeyPatch) -> list[str]:
    """Let `input` give these lines and then end; what is left of them."""
    left = list(lines)

    def read(_: str = "") -> str:
        if not left:
            raise EOFError
        line = left.pop(0)
        if line == "^C":
            raise KeyboardInterrupt
        return line

    patch.setattr(builtins, "input", read)
    return left


def cli(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["minituner", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_it_answers_forgets_and_leaves(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = open_session(trained["native"], max_new_tokens=100, say=silent)
    left = typed([QUESTION, "", "/reset", "长" * 400, QUESTION, "RESET", QUESTION, "EXIT", "never asked"], monkeypatch)
    run(session)
    out = capsys.readouterr().out
    assert out.count(f"assistant: {ANSWER}\n") == 3
    assert out.count("(forgotten)") == 2
    assert "exceed 1024" in out, "an error is shown and the conversation goes on"
    assert left == ["never asked"]
    assert len(session.messages) == 2


def test_ctrl_c_stops_an_answer_or_nothing_and_the_end_of_the_input_leaves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import minituner.chat.terminal as terminal

    session = small(max_new_tokens=900)
    shown: list[str] = []

    def interrupt(text: str) -> None:
        shown.append(text)
        show(text)
        if len(shown) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "show", interrupt)
    typed(["Hi", "^C", "/system"], monkeypatch)
    run(session)
    out = capsys.readouterr().out
    assert "(stopped)" in out
    assert "Ctrl-D leaves" in out
    assert "(system: none)" in out, "the chat went on"
    assert len(shown) == 2
    assert session.messages[-1].text == "".join(shown)


@pytest.mark.slow
def test_a_real_interrupt_signal_stops_the_answer_while_the_model_computes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sent from inside a forward pass, when the terminal does nothing but wait for the next token."""
    session = small(max_new_tokens=900)
    passes = 0

    def interrupt(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 30:
            os.kill(os.getpid(), signal.SIGINT)

    session.model.register_forward_pre_hook(interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    typed(["Hi", "/again"], monkeypatch)
    run(session)
    out = capsys.readouterr().out
    assert "(stopped)" in out
    assert out.count("assistant: ") == 2, "the chat went on"
    assert len(session.messages) == 2
    assert 900 < passes < 1800, "the first answer ended early, the second did not"


def test_lines_are_joined_and_a_space_in_front_sends_a_slash(monkeypatch: pytest.MonkeyPatch) -> None:
    session = small()
    typed(["one\\", "two", " /etc is a folder", "/etc is no command"], monkeypatch)
    run(session)
    assert [m.text for m in session.messages if m.role == "user"] == ["one\ntwo", "/etc is a folder"]


def test_every_command_of_the_help_exists_and_an_unknown_one_names_the_nearest() -> None:
    said: list[str] = []
    talk = Talk(small(), said.append)
    assert talk.command("/help") is None
    assert all(command in said[0] for command in HELP)
    for command in HELP:
        assert hasattr(talk, "_" + command.split()[0][1:])
    with pytest.raises(UsageError, match="/reset"):
        talk.command("/rest")
    for word in ("/save", "/load", "/again", "/compare", "/label", "/adapter x"):
        with pytest.raises(UsageError):
            talk.command(word)
    talk.command("/QUIT")
    assert talk.over


def test_adapters_are_switched_and_compared(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [trained["native"], f"other={trained['other']}"]
    session = open_session(trained["base"], adapter=adapters, max_new_tokens=60, say=silent)
    lines = [QUESTION, "/adapter other", "/reset", QUESTION, "/reset", "/compare", QUESTION, "/compare", "/adapter"]
    typed(lines, monkeypatch)
    run(session)
    out = capsys.readouterr().out
    assert f"native: {ANSWER}\n" in out
    assert out.count(f"other: {OTHER_ANSWER}\n") == 2
    assert out.count("base: ") == 1
    assert "native  [other]  base" in out
    before, _, after = out.partition("base and other answer")
    assert "base: " not in before
    assert after.index("base: ") < after.index("other: ")


def test_a_saved_conversation_goes_on_and_is_a_training_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minituner.data.formats import detect_format, to_conversation
    from minituner.data.records import read_records

    session = small()
    said: list[str] = []
    talk = Talk(session, said.append)
    session.system = "Sei höflich. 你好"
    session.ask("Wer bist du? 😀")
    session.ask("Und?")
    for name in ("one.json", "many.jsonl", "many.jsonl"):
        talk.command(f"/save {tmp_path / name}")
    with pytest.raises(UsageError, match="exists"):
        talk.command(f"/save {tmp_path / 'one.json'}")
    kept = list(session.messages)
    for name, count in (("one.json", 1), ("many.jsonl", 2)):
        records = list(read_records(tmp_path / name))
        assert len(records) == count
        assert detect_format(records)[0] == "openai"
        assert to_conversation(records[0], "openai").messages[1:] == kept
        other = Talk(small(), said.append)
        other.command(f"/load {tmp_path / name}")
        assert (other.session.messages, other.session.system) == (kept, session.system)
        assert other.session.prompt_ids("x") == session.prompt_ids("x")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "Hi"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
        '{"role": "user", "content": "c"}]}',
        '{"messages": [{"role": "robot", "content": "Hi"}]}',
    ],
)
def test_a_file_that_is_no_conversation_is_refused_and_changes_nothing(text: str, tmp_path: Path) -> None:
    session = small()
    session.ask("Hi")
    kept = list(session.messages)
    file = tmp_path / "chat.json"
    file.write_text(text)
    for wrong in (file, tmp_path / "missing.json"):
        with pytest.raises(UsageError):
            Talk(session, silent).command(f"/load {wrong}")
    assert session.messages == kept


def test_what_a_model_prints_cannot_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show("a\x1b]0;title\x07\x9b2J\n\t你")
    assert capsys.readouterr().out == "a]0;title2J\n\t你"


def test_chat_prompt_prints_only_the_answer(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chat", str(trained["native"]), "--prompt", QUESTION, "--max-new-tokens", "100"]
    assert cli(arguments, monkeypatch) == 0
    assert capsys.readouterr().out == ANSWER + "\n"
    assert cli([*arguments, "--compare"], monkeypatch) == 0
    base, tuned = capsys.readouterr().out.split("native: ")
    assert base.startswith("base: ")
    assert tuned == ANSWER + "\n"


def test_the_options_reach_the_session(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Session] = []
    ask = Session.ask
    monkeypatch.setattr(Session, "ask", lambda self, *rest, **more: seen.append(self) or ask(self, *rest, **more))
    arguments = ["chat", str(trained["base"]), "--prompt", "Hi", "--prompt-template", "internlm_chat"]
    arguments += ["--system-template", "coder", "--max-new-tokens", "3", "--temperature", "0.5", "--top-p", "0.8"]
    arguments += ["--top-k", "9", "--repetition-penalty", "1.1", "--stop-words", "a", "--stop-words", "b"]
    arguments += ["--seed", "5", "--dtype", "bf16", "--adapter", str(trained["native"])]
    arguments += ["--adapter", f"x={trained['other']}"]
    assert cli(arguments, monkeypatch) == 0
    session = seen[0]
    assert session.settings == Settings(3, 0.5, 0.8, 9, 1.1, ("a", "b"), 5)
    assert session.template == "internlm_chat"
    assert session.system.startswith("You are a professional programer")
    assert session.loaded.names == ["native", "x", "base"]
    assert str(next(p for n, p in session.model.named_parameters() if "base_layer" in n).dtype) == "torch.bfloat16"
    capsys.readouterr()
    assert cli(["chat", "x", "--system", "a", "--system-template", "coder"], monkeypatch) == 2
    assert cli(["chat", "x", "--system-template", "codr"], monkeypatch) == 2
    assert "nearest: coder" in capsys.readouterr().err
    assert cli(["chat", "x", "--template", "internlm2_cha"], monkeypatch) == 2
    assert "internlm2_chat" in capsys.readouterr().err


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


def test_json_keeps_every_character_readable(tmp_path: Path) -> None:
    session = small()
    session.ask("你好 😀")
    Talk(session, silent).command(f"/save {tmp_path / 'a.jsonl'}")
    text = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert "你好 😀" in text
    assert json.loads(text)["messages"][0]["content"] == "你好 😀"
