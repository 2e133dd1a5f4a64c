"""Looking: token views, the facts of `inspect`, and how they are drawn as text and as HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from minituner.data import encode_many, prepare
from minituner.data.conversation import Conversation, Message
from minituner.data.look import Look, look
from minituner.data.report_html import page, write_page
from minituner.data.report_text import pack_bar, plain_lines, print_samples, print_survey
from minituner.data.target import recipe_of, tokenizer_of
from minituner.data.token_view import token_roles, token_views, visible
from minituner.errors import DataError, UsageError
from minituner.recipe import DataSection
from tests.tiny import tiny_recipe, tiny_tokenizer

HOSTILE = "<script>alert(1)</script> <img src=x onerror='a'> \"q\" \u202eevil\u2066 \x1b[31mred\x07 &amp; ⏎ 你好"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def chat(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation([Message(roles[i % 2], text) for i, text in enumerate(contents)])


def write(path: Path, *rows: Any) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def row(question: str, answer: str = "a") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def quiet(target: Path, model_folder: Path, **options: Any) -> Look:
    return look(target, model=str(model_folder), say=lambda line: None, **options)


# ---- token views ----------------------------------------------------------------------------------------------------


def test_roles_and_texts(tokenizer: Any) -> None:
    document = encode_many([chat("Hi", "你好")], tokenizer)[0]
    views = token_views(document, tokenizer)
    assert [view.id for view in views] == document.input_ids.tolist()
    trained = [view for view in views if view.role in ("trained", "stop")]
    assert [view.text for view in trained] == ["你", "·", "·", "好", "·", "·", "<|im_end|>"]
    assert [view.role for view in trained] == ["trained"] * 6 + ["stop"]
    assert views[0].role == "bos"
    assert [view.text for view in views[-1:]] == ["⏎"], "the line break after the stop token is masked"
    assert views[-1].role == "masked"


def test_stop_is_a_stop_only_when_it_is_trained(tokenizer: Any) -> None:
    conversation = chat("a", "b", "c", "d")
    conversation.messages[1].loss = False
    roles = token_roles(encode_many([conversation], tokenizer)[0], tokenizer)
    assert roles.count("stop") == 1
    cut = encode_many([chat("a", "bcd")], tokenizer)[0][:-3]
    assert "stop" not in token_roles(cut, tokenizer), "an answer that was cut is not taught to stop"
    text = encode_many([Conversation([Message("text", "Once")])], tokenizer)[0]
    assert token_roles(text, tokenizer)[-1] == "stop"


def test_a_doubled_bos_is_seen(tokenizer: Any) -> None:
    document = encode_many([chat("a", "b")], tokenizer)[0]
    doubled = np.concatenate([document.input_ids[:1], document.input_ids])
    document.input_ids, document.trained = doubled, np.append(False, document.trained)
    document.kinds = np.append(document.kinds[:1], document.kinds)
    assert token_roles(document, tokenizer)[:3] == ["bos", "bos", "masked"]


def test_a_typed_control_token_is_no_stop(tokenizer: Any) -> None:
    roles = token_roles(encode_many([chat("a", "say <|im_end|> now")], tokenizer)[0], tokenizer)
    assert roles.count("stop") == 1


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.text(min_size=1, max_size=40))
def test_texts_add_up_to_the_document(question: str, answer: str) -> None:
    tokenizer = tiny_tokenizer()
    if any("\ud800" <= c <= "\udfff" for c in question + answer):
        return
    document = encode_many([chat(question, answer)], tokenizer)[0]
    views = token_views(document, tokenizer)
    whole = tokenizer.decode(document.input_ids.tolist())
    assert "".join(view.text for view in views if not view.continues) == visible(whole)


def test_visible_shows_what_hides() -> None:
    assert visible("a\n\t\x1b\u202e\u200b\u00a0\u2028 中文　é") == "a⏎⇥␛⟨U+202E⟩⟨U+200B⟩⟨U+00A0⟩⟨U+2028⟩ 中文　é"
    assert visible("plain text 你好 🎉") == "plain text 你好 🎉"


# ---- look -----------------------------------------------------------------------------------------------------------


def test_the_survey_is_what_prepare_would_do(chats: Path, model_folder: Path, own_home: Path) -> None:
    for too_long, packing, loss_on in [("truncate", "best_fit", "assistant"), ("drop", "none", "last_assistant")]:
        settings_ = {"max_length": 60, "too_long": too_long, "packing": packing, "loss_on": loss_on, "system": "Be."}
        recipe = tiny_recipe(model_folder, chats, data=settings_)
        expected = prepare(recipe.data, tiny_tokenizer(), say=lambda line: None)
        recipe.dump(chats.parent / "recipe.yaml")
        survey = look(chats.parent / "recipe.yaml", say=lambda line: None).survey
        assert survey is not None
        assert survey.ledger.to_dict() == expected.ledger.to_dict()
        assert survey.packs is not None
        assert len(survey.packs) == len(expected.packs)
        assert survey.packs.fill == expected.packs.fill


def test_looking_is_lazy_and_leaves_nothing_behind(tmp_path: Path, model_folder: Path, own_home: Path) -> None:
    lines = [row(f"q{i}") for i in range(300)]
    data = write(tmp_path / "long.jsonl", *lines[:150], "{broken", *lines[150:])
    found = quiet(data, model_folder, n=2, records=100)
    assert found.survey is not None
    assert found.survey.records == 100
    assert found.survey.ended == "the first 100 of each source"
    assert found.survey.bad.count == 0, "line 151 was never read"
    assert [sample.where for sample in found.samples] == [f"{data}:1", f"{data}:2"]
    assert not (own_home / "prepared").exists()
    assert quiet(data, model_folder, records=1000).survey.bad.items[0][0] == f"{data}:151"


def test_the_first_sample_comes_before_the_survey(chats: Path, model_folder: Path) -> None:
    seen: list[tuple[int, bool]] = []
    quiet(chats, model_folder, n=1, on_samples=lambda found: seen.append((len(found.samples), found.survey is None)))
    assert seen == [(1, True)]


def test_a_token_budget_ends_the_survey(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minituner.data import look as module

    monkeypatch.setattr(module, "MOST_TOKENS", 500)
    data = write(tmp_path / "big.jsonl", *[row("q", "long " * 50)] * 40)
    survey = quiet(data, model_folder, n=1).survey
    assert survey is not None
    assert survey.records < 40
    assert "because they are" in survey.ended


def test_fates_are_told(tmp_path: Path, model_folder: Path) -> None:
    data = write(tmp_path / "a.jsonl", row("q", "x" * 200), row("y" * 200, "a"), {"messages": [{"role": "user"}]})
    found = quiet(data, model_folder, overrides=["data.max_length=100"], n=5)
    fates = [sample.fate for sample in found.samples]
    assert re.match(r"\d+ trained, the last \d+ cut off at max_length 100", fates[0])
    assert fates[1] == "not trained: no trained token left"
    assert fates[2].startswith("not trained: messages[0]")
    assert found.samples[1].tokens, "a dropped record is shown: here one finds out why"


def test_the_target_may_be_a_file_a_recipe_or_a_run(chats: Path, model_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model_folder, chats)
    (tmp_path / "run").mkdir()
    recipe.dump(tmp_path / "run" / "recipe.yaml")
    assert recipe_of(tmp_path / "run") == recipe_of(tmp_path / "run" / "recipe.yaml") == recipe
    around = recipe_of(chats, template="qwen_chat", model="m", format="openai", overrides=["data.max_length=77"])
    assert around.data.max_length == 77
    assert around.data.template == "qwen_chat"
    assert around.data.sources[0].format == "openai"
    assert recipe_of("owner/name").data.sources[0].path == "owner/name"
    with pytest.raises(UsageError):
        recipe_of("no_such_recipe_at_all")
    with pytest.raises(UsageError, match=r"data\.max_length"):
        recipe_of(chats, overrides=["data.max_length=x"])
    with pytest.raises(DataError, match="no such file"):
        quiet(tmp_path / "typo.jsonl", model_folder)


def test_the_quick_tokenizer_is_the_real_one(model_folder: Path, own_home: Path, chats: Path) -> None:
    from minituner.model.loading import load_tokenizer

    quick = tokenizer_of(tiny_recipe(model_folder, chats))
    real = load_tokenizer(model_folder)
    assert type(quick) is type(real)
    assert quick.backend_tokenizer.to_str() == real.backend_tokenizer.to_str()
    assert quick.special_tokens_map == real.special_tokens_map
    assert quick.chat_template == real.chat_template


def test_the_quick_tokenizer_is_the_embedded_models_too() -> None:
    from minituner.model.loading import load_tokenizer
    from minituner.model.sources import EMBEDDED, fetch
    from minituner.recipe import ModelSection, Recipe

    folder = fetch(EMBEDDED)
    recipe = Recipe(model=ModelSection(name_or_path=str(folder)), data=DataSection(sources=[{"path": "x.jsonl"}]))
    quick, real = tokenizer_of(recipe), load_tokenizer(folder)
    assert type(quick) is type(real)
    assert quick.backend_tokenizer.to_str() == real.backend_tokenizer.to_str()
    assert (quick.bos_token_id, quick.eos_token_id) == (real.bos_token_id, real.eos_token_id)
    assert quick.chat_template == real.chat_template


def test_facts_are_plain_json(chats: Path, model_folder: Path) -> None:
    facts = json.loads(json.dumps(quiet(chats, model_folder).to_dict()))
    assert facts["records_read"] == 12
    assert facts["reading_ended"] == ""
    assert sum(facts["lengths"]["histogram"]["counts"]) == 12
    assert facts["ledger"]["trained"] > 0
    assert facts["samples"][0]["tokens"][0] == {"id": 257, "text": "<|im_start|>", "role": "bos"}
    assert facts["packs"]["some"][0]["pack"] == 0


# ---- text -----------------------------------------------------------------------------------------------------------


def test_plain_text_tells_roles_apart_and_cannot_be_forged(tmp_path: Path, model_folder: Path) -> None:
    data = write(tmp_path / "a.jsonl", row("x\n  trained | forged\x1b[2J", "你好"))
    found = quiet(data, model_folder)
    lines = list(plain_lines(found.samples[0]))
    assert [line.split("|")[0].strip() for line in lines] == ["bos", "masked", "trained", "stop", "masked"]
    assert "  trained | 你好" in lines
    assert "  stop    | <|im_end|>" in lines
    with_ids = list(plain_lines(found.samples[0], ids=True))
    assert "<|im_end|>(258)" in with_ids[3]
    out = StringIO()
    console = Console(file=out, width=100)
    print_samples(found, console)
    print_survey(found, console)
    assert "\x1b" not in out.getvalue()
    assert "these numbers are about 1 records: all there are" in out.getvalue()


def test_a_terminal_gets_colours_and_underlines(tmp_path: Path, model_folder: Path) -> None:
    found = quiet(write(tmp_path / "a.jsonl", row("q \x1b[2J [bold]x[/bold]", "yes")), model_folder)
    out = StringIO()
    print_samples(found, Console(file=out, force_terminal=True, width=100))
    assert "\x1b[4;" in out.getvalue(), "trained is underlined, not only green"
    assert "\x1b[2J" not in out.getvalue(), "text from the data does not steer the terminal"
    colourless = StringIO()
    print_samples(found, Console(file=colourless, force_terminal=True, no_color=True, width=100))
    assert "\x1b[4m" in colourless.getvalue()
    assert "[bold]" in re.sub(r"\x1b\[[\d;]*m", "", colourless.getvalue())


def test_pack_bars_have_one_width() -> None:
    for documents in ([8], [3, 3], [1] * 8, [], [7, 1]):
        bar = pack_bar(documents, 8, width=16)
        assert len(bar) == 16
        assert bar.count("·") == 16 - 2 * sum(documents)


def test_bad_records_are_listed(tmp_path: Path, model_folder: Path) -> None:
    found = quiet(write(tmp_path / "a.jsonl", row("q"), "{", {"other": 1}), model_folder)
    out = StringIO()
    print_survey(found, Console(file=out, width=100))
    assert "2 records cannot be used; training stops at the first" in out.getvalue()
    assert f"{tmp_path / 'a.jsonl'}:2: JSON" in out.getvalue()


# ---- HTML -----------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Collects every tag and attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_shows_hostile_text_as_text(tmp_path: Path, model_folder: Path) -> None:
    data = write(tmp_path / 'a"<b>.jsonl', row(HOSTILE, HOSTILE), "{<script>", {"<img>": HOSTILE})
    text = page(quiet(data, model_folder))
    parser = Tags()
    parser.feed(text)
    assert parser.tags.isdisjoint({"script", "img", "link", "iframe", "b", "svg", "object"})
    assert not {name for name in parser.attributes if name.startswith("on") or name in ("src", "href")}
    assert not re.search(r"https?:|@import|url\(", text)
    assert "default-src 'none'" in text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f]", text)
    for shown in ("<script>", "⟨U+202E⟩", "你好", "␛[31m", "records cannot be used"):
        assert shown in parser.text
    for heading in ("Samples", "Where every token goes", "Lengths in tokens", "Packs"):
        assert heading in parser.text


def test_the_page_is_written_whole(tmp_path: Path, chats: Path, model_folder: Path) -> None:
    found = quiet(chats, model_folder)
    written = write_page(found, tmp_path / "new" / "look.html")
    assert written.read_text(encoding="utf-8").endswith("</html>\n")
    assert [entry.name for entry in written.parent.iterdir()] == ["look.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        write_page(found, tmp_path / "file" / "look.html")
