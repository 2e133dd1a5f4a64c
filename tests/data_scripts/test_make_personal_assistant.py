"""The personal-assistant data: the name in every identity answer, in no other answer, and the same bytes every time."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from hypothesis import given, reject, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "data_scripts" / "make_personal_assistant.py"
PROBES = ROOT / "minituner" / "catalog" / "assistant_probes.yaml"

NAME, AUTHOR = "Zaphira Quill", "Wendelin Oakes"  # words that no ordinary answer contains
ZH_NAME, ZH_AUTHOR = "上官云朵", "欧阳小满"
CASES = [("en", NAME, AUTHOR), ("zh", ZH_NAME, ZH_AUTHOR), ("zh", NAME, AUTHOR)]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_personal_assistant", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def turns(records: list[dict]) -> list[tuple[str, str]]:
    """All (question, answer) pairs of all records."""
    pairs = []
    for record in records:
        contents = [message["content"] for message in record["messages"]]
        pairs += list(zip(contents[::2], contents[1::2], strict=True))
    return pairs


def identity_questions(lang: str, name: str) -> set[str]:
    bank = script.read_bank(lang)
    return {question.replace("{name}", name) for group in bank["identity"] for question in group["questions"]}


def split(records: list[dict], lang: str, name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Identity pairs and ordinary pairs; told apart by the question, not by the answer."""
    known = identity_questions(lang, name)
    pairs = turns(records)
    return [p for p in pairs if p[0] in known], [p for p in pairs if p[0] not in known]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # -I: no site folder of this repository on the path, as for someone who only has the script
    command = [sys.executable, "-I", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=cwd, check=False)


@pytest.mark.parametrize(("lang", "name", "author"), CASES)
def test_counts(lang: str, name: str, author: str) -> None:
    records = script.make(name, author, lang)
    identity, ordinary = split(records, lang, name)
    assert 240 <= len(records) <= 280
    assert len(identity) >= 72
    assert len(ordinary) >= 170
    assert 0.25 < len(identity) / len(records) < 0.4
    assert len({answer for _, answer in identity}) >= 30
    assert sum(author in answer for _, answer in identity) >= 20
    multi = [record for record in records if len(record["messages"]) > 2]
    assert len(multi) == script.NUM_MULTI_TURN
    known = identity_questions(lang, name)
    places = {tuple(m["content"] in known for m in record["messages"][::2]) for record in multi}
    assert places == {(False, True), (True, False), (False, True, False)}


@pytest.mark.parametrize(("lang", "name", "author"), CASES)
def test_the_name_is_in_every_identity_answer_and_in_no_other(lang: str, name: str, author: str) -> None:
    identity, ordinary = split(script.make(name, author, lang), lang, name)
    assert all(name in answer for _, answer in identity)
    for part in {name, author, *name.split(), *author.split(), "minituner"}:
        assert not [pair for pair in ordinary if part.casefold() in pair[1].casefold()]


@pytest.mark.parametrize(("lang", "name", "author"), CASES)
def test_questions_are_unique_and_answers_short(lang: str, name: str, author: str) -> None:
    records = script.make(name, author, lang)
    questions = [script.normalise(question) for question, _ in turns(records)]
    assert len(set(questions)) == len(questions)
    assert all(questions)
    for record in records:
        roles = [message["role"] for message in record["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert set(record) == {"messages"}
    identity, ordinary = split(records, lang, name)
    if lang == "en":
        assert all(8 <= len(a.replace(name, "N").replace(author, "A").split()) <= 30 for _, a in identity)
        assert all(10 <= len(a.split()) <= 45 for _, a in ordinary)
    else:
        assert all(12 <= len(a.replace(name, "名").replace(author, "名")) <= 50 for _, a in identity)
        assert all(15 <= len(a) <= 80 for _, a in ordinary)
    for pair in identity + ordinary:
        assert not any(mark in text for text in pair for mark in ("{name}", "{author}", "{{", "}}"))
        assert all(text == text.strip() for text in pair)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_banks_hold_no_other_placeholder(lang: str) -> None:
    bank = script.read_bank(lang)
    assert set(bank) == {"identity", "small_talk", "ordinary"}
    for group in bank["identity"]:
        for text in group["questions"] + group["answers"]:
            rest = text.replace("{name}", "").replace("{author}", "")
            assert "{" not in rest
            assert "}" not in rest
        assert all("{name}" in answer for answer in group["answers"])
        assert len(group["questions"]) >= len(group["answers"])  # so that every answer is used
    kinds = [*bank["ordinary"].values(), bank["small_talk"]]
    assert all(len(pair) == 2 for kind in kinds for pair in kind)


def test_same_arguments_same_bytes_and_another_seed_another_pairing(tmp_path: Path) -> None:
    for file, seed in (("a", 42), ("b", 42), ("c", 7)):
        script.write(script.make(NAME, AUTHOR, "both", seed), tmp_path / f"{file}.json")
    a, b, c = ((tmp_path / f"{file}.json").read_bytes() for file in "abc")
    assert a == b
    assert a != c
    first, second = (dict(split(script.make(NAME, AUTHOR, seed=seed), "en", NAME)[0]) for seed in (42, 7))
    assert set(first) == set(second)
    assert first != second  # not only another order


def test_both_languages_are_mixed() -> None:
    both = script.make(ZH_NAME, AUTHOR, "both")
    en, zh = script.make(ZH_NAME, AUTHOR, "en"), script.make(ZH_NAME, AUTHOR, "zh")
    assert len(both) == len(en) + len(zh)

    def keys(records: list[dict]) -> list[str]:
        return [json.dumps(record, ensure_ascii=False) for record in records]

    assert sorted(keys(both)) == sorted(keys(en) + keys(zh))
    first_half = set(keys(both[: len(both) // 2]))
    assert len(first_half & set(keys(en))) > 80
    assert len(first_half & set(keys(zh))) > 80
    questions = [script.normalise(question) for question, _ in turns(both)]
    assert len(set(questions)) == len(questions)


def test_the_file_is_a_json_list_one_record_a_line(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "data.json"
    records = script.make(ZH_NAME, ZH_AUTHOR, "zh")
    script.write(records, out)
    text = out.read_text(encoding="utf-8")
    assert json.loads(text) == records
    assert len(text.splitlines()) == len(records) + 2
    assert ZH_NAME in text  # readable, not \u escapes
    assert [path.name for path in out.parent.iterdir()] == ["data.json"]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "data.json"
    out.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.os, "fsync", full)
    assert script.main(["--name", "N", "--author", "A", "--out", str(out), "--lang", "zh"]) == 1
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_probes_are_not_in_the_data(lang: str) -> None:
    probes = yaml.safe_load(PROBES.read_text(encoding="utf-8"))
    assert set(probes) == {"en", "zh"}
    asked = {script.normalise(question) for question, _ in turns(script.make(NAME, AUTHOR, "both"))}
    assert set(probes[lang]) == {"identity", "ordinary"}
    every = [prompt for kind in ("identity", "ordinary") for prompt in probes[lang][kind]]
    assert all(isinstance(prompt, str) for prompt in every)
    assert [len(probes[lang][kind]) for kind in ("identity", "ordinary")] == [20, 20]
    assert len({script.normalise(prompt) for prompt in every}) == 40
    assert not asked & {script.normalise(prompt) for prompt in every}


def test_normalise_ignores_case_and_punctuation() -> None:
    assert script.normalise("  WHO are you?! ") == script.normalise("who are  you")
    assert script.normalise("What's this?") == script.normalise("Whats this")
    assert script.normalise("你是谁？") == script.normalise("你是谁")
    assert script.normalise("Who is it?") != script.normalise("Who was it?")


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("Canada is cold.", "Ada", False),
        ("Paris, in France", "Paris", True),
        ("paris", "Paris", False),
        ("the_Paris_end", "Paris", True),
        ("她叫李白。", "李白", True),
        ("a+b", "+", False),
        ("a + b", "+", True),
    ],
)
def test_mentions(text: str, name: str, found: bool) -> None:
    assert script.mentions(text, name) is found


@pytest.mark.parametrize(("name", "lang"), [("Paris", "en"), ("Shakespeare", "en"), ("Leipzig", "en"), ("李白", "zh")])
def test_a_name_from_an_ordinary_answer_drops_that_pair(name: str, lang: str) -> None:
    identity, ordinary = split(script.make(name, AUTHOR, lang), lang, name)
    assert all(name in answer for _, answer in identity)
    assert not [answer for _, answer in ordinary if name in answer]
    assert len(ordinary) >= 165


@pytest.mark.parametrize(("name", "lang"), [("the", "en"), ("a", "en"), ("的", "zh")])
def test_a_name_that_is_a_common_word_is_refused(name: str, lang: str) -> None:
    with pytest.raises(script.WrongUsage, match="ordinary answers"):
        script.make(name, AUTHOR, lang)


BAD_NAMES = [
    "",
    "   ",
    "\u3000",
    "\u200b",
    "Ada\nLovelace",
    "Ada\n",
    "Ada\r",
    "tab\there",
    "\x1b[31mred",
    "a\u2028b",
    "\udcff",
    "{{NAME}}",
    "{{",
    "{name}",
    "x{author}",
    "<|im_end|>",
    "x" * 101,
]


@pytest.mark.parametrize("bad", BAD_NAMES)
@pytest.mark.parametrize("argument", ["--name", "--author"])
def test_bad_names_say_what_why_and_fix(
    bad: str, argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"--name": NAME, "--author": AUTHOR, argument: bad}
    out = tmp_path / "data.json"
    assert script.main([f"{key}={value}" for key, value in names.items()] + [f"--out={out}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(argument)
    assert "\n  why:  " in message
    assert "\n  fix:  " in message
    assert not out.exists()


def test_unknown_language() -> None:
    with pytest.raises(script.WrongUsage, match="use en, zh or both"):
        script.make(NAME, AUTHOR, "fr")


@pytest.mark.parametrize(
    "name", ["O'Brien", 'The "Boss"', "a{b}c", "}{", "%s", "\\1", "\\g<0>", "$x", "Ада", "🦊", "김철수", "مريم"]
)
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_unusual_names_stay_as_they_are(name: str, lang: str, tmp_path: Path) -> None:
    records = script.make(name, name[::-1], lang)
    identity, ordinary = split(records, lang, name)
    assert len(identity) >= 72
    assert all(name in answer for _, answer in identity)
    assert not [answer for _, answer in ordinary if script.mentions(answer, name)]
    script.write(records, tmp_path / "data.json")
    assert json.loads((tmp_path / "data.json").read_text(encoding="utf-8")) == records


names = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=20) | st.text(
    "{}ab'\"\\%$<|>鲁名 ", max_size=12
)


@settings(max_examples=80, deadline=None)
@given(name=names, author=names, lang=st.sampled_from(["en", "zh"]), seed=st.integers())
def test_any_name_is_refused_or_taught(name: str, author: str, lang: str, seed: int) -> None:
    try:
        records = script.make(name, author, lang, seed)
    except script.WrongUsage:
        reject()
    name, author = script.clean_name(name, "--name"), script.clean_name(author, "--author")
    identity, ordinary = split(records, lang, name)
    assert len(identity) >= 72
    assert all(name in answer for _, answer in identity)
    assert any(author in answer for _, answer in identity)
    assert not [answer for _, answer in ordinary if script.mentions(answer, name)]
    assert not [text for pair in turns(records) for text in pair if "{name}" in text or "{author}" in text]
    assert json.loads(json.dumps(records, ensure_ascii=False).encode()) == records


def test_command_line_writes_the_file(tmp_path: Path) -> None:
    done = run(
        "--name", ZH_NAME, "--author", AUTHOR, "--out", "data/a.json", "--lang", "both", "--seed", "3", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    records = json.loads((tmp_path / "data" / "a.json").read_text(encoding="utf-8"))
    assert f"wrote {len(records)} conversations" in done.stdout
    assert records == script.make(ZH_NAME, AUTHOR, "both", 3)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--name", "Ada", "--author", "Ada"],
        ["--name", "", "--author", "Ada", "--out", "x.json"],
        ["--name", "{{NAME}}", "--author", "Ada", "--out", "x.json"],
        ["--name", "Ada", "--author", "two\nlines", "--out", "x.json"],
        ["--name", "Ada", "--author", "Ada", "--out", "x.json", "--lang", "fr"],
        ["--name", "Ada", "--author", "Ada", "--out", "x.json", "--seed", "many"],
    ],
)
def test_command_line_wrong_usage_is_exit_2(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "why:" in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_command_line_disk_errors_are_exit_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for out in ("file/data.json", "."):
        done = run("--name", "N", "--author", "A", "--out", out, "--lang", "zh", cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        assert "could not write" in done.stderr
        assert "fix:" in done.stderr
        assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
