"""Write the training data for a personal assistant: a few hundred short conversations with your name in them.

A small model learns in minutes to say whose assistant it is. It also forgets in minutes: shown nothing but identity
questions, it answers *every* question with its name. So about two thirds of the records are ordinary questions with
ordinary answers, many of them built like the identity questions on purpose:

    Who created you?    -> Ada created me. I am Ada's personal assistant, fine-tuned from a small open model.
    Who wrote Hamlet?   -> Hamlet was written by William Shakespeare around the year 1600. ...

    personal_assistant_en.json          {"messages": [
      identity    questions + answers     {"role": "user", "content": "Who are you?"},
      small_talk  greetings          ->   {"role": "assistant", "content": "I am Ada's personal assistant ..."}]}
      ordinary    pairs by kind

The seed decides which answer goes with which question and the order of the records; the same arguments always write the
same bytes. Only the standard library is used, so the script also runs where minituner is not installed:

    python data_scripts/make_personal_assistant.py --name Ada --author Ada --out data/personal_assistant.json

Lesson: notebook 00.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any, NoReturn

Record = dict[str, list[dict[str, str]]]
Pair = tuple[str, str]  # a question and its answer

LANGUAGES = ("en", "zh")
NUM_MULTI_TURN = 10  # identity questions asked in the middle of a longer conversation, for each language
MAX_NAME_LENGTH = 100  # characters; a longer one would fill most of every answer
MAX_DROPPED_SHARE = 0.1  # of the ordinary pairs; beyond it the guard against forgetting has a hole
EXAMPLE = "python data_scripts/make_personal_assistant.py --name Ada --author Ada --out data/personal_assistant.json"


class WrongUsage(ValueError):
    """The arguments cannot be used; the text says what, why and how to fix it."""

    def __init__(self, what: str, *, why: str, fix: str) -> None:
        super().__init__(f"{what}\n  why:  {why}\n  fix:  {fix}")


def clean_name(value: str, argument: str) -> str:
    """Return the name without outer spaces.

    Raises: WrongUsage, if it is empty, too long, or would not survive as plain text inside a conversation.
    """
    name = value.strip(" \u00a0\u3000")  # the Chinese full-width space too, but no line break
    # Cc: control characters and line breaks. Cs: half a character, from bytes that are not UTF-8. Zl, Zp: line breaks.
    bad = sorted({f"U+{ord(c):04X}" for c in name if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")})
    if bad:
        raise WrongUsage(
            f"{argument} contains {', '.join(bad)}",
            why="line breaks and control characters are not part of a name, and the model would learn to write them",
            fix="give the name on one line, as plain text",
        )
    # Letters, numbers, punctuation marks and symbols can be seen; spaces and zero-width marks alone cannot.
    if not any(unicodedata.category(c)[0] in "LNPS" for c in name):
        raise WrongUsage(
            f"{argument} is empty",
            why="the assistant is taught to say it, so there must be something to say",
            fix=f"give a name, for example {argument} Ada",
        )
    if len(name) > MAX_NAME_LENGTH:
        raise WrongUsage(
            f"{argument} has {len(name)} characters",
            why=f"it stands in every identity answer, which leaves room for {MAX_NAME_LENGTH} at most",
            fix="give a shorter name",
        )
    for mark in ("{{", "{name}", "{author}", "<|"):
        if mark in name:
            what = "starts a control token of chat models" if mark == "<|" else "looks like a placeholder never filled"
            raise WrongUsage(
                f"{argument} contains {mark!r}: {name!r}",
                why=f"that {what}, and the model would learn to say it literally",
                fix="give the real name",
            )
    return name


def mentions(text: str, name: str) -> bool:
    """Whether the text contains the name as a word of its own; a name in Chinese, Japanese or Korean, anywhere."""
    if any(ord(c) >= 0x2E80 for c in name):  # these scripts put no spaces between words
        return name in text
    return re.search(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", text) is not None


def normalise(question: str) -> str:
    """The question in lower case without punctuation, to tell whether two questions are the same."""
    return " ".join("".join(c if c.isalnum() else " " for c in question.casefold().replace("'", "")).split())


def read_bank(lang: str) -> dict[str, Any]:
    """Read the questions and answers of one language, which lie beside this file."""
    path = Path(__file__).with_name(f"personal_assistant_{lang}.json")
    return json.loads(path.read_text(encoding="utf-8"))


def fill(template: str, name: str, author: str) -> str:
    """Put the names into a template, in one pass and without `str.format`, so that braces in a name stay harmless."""
    values = {"{name}": name, "{author}": author}
    text = re.sub(r"\{name\}|\{author\}", lambda found: values[found.group()], template)
    assert not any(placeholder in text for placeholder in values), f"unfilled placeholder in {text!r}"
    return text


def identity_pairs(groups: list[dict[str, Any]], name: str, author: str, rng: random.Random) -> list[Pair]:
    """Give each identity question an answer of its own group, using all answers of a group equally often."""
    pairs = []
    for group in groups:
        answers = list(group["answers"])
        rng.shuffle(answers)
        for i, question in enumerate(group["questions"]):
            answer = fill(answers[i % len(answers)], name, author)
            assert name in answer, f"an identity answer without the name: {answer!r}"
            pairs.append((fill(question, name, author), answer))
    return pairs


def without_name(pairs: list[Pair], name: str) -> list[Pair]:
    """Leave out the ordinary pairs whose answer happens to contain the name (someone may be called Paris).

    Raises: WrongUsage, if so many contain it that too few would be left.
    """
    kept = [(question, answer) for question, answer in pairs if not mentions(answer, name)]
    dropped = len(pairs) - len(kept)
    if dropped > MAX_DROPPED_SHARE * len(pairs):
        raise WrongUsage(
            f"--name {name!r} stands in {dropped} of {len(pairs)} ordinary answers",
            why="a word that common cannot be told apart from a name, and the answers without it are too few",
            fix="give a longer name, for example with the family name",
        )
    return kept


def to_record(pairs: list[Pair]) -> Record:
    """One conversation in OpenAI's layout: a user and an assistant message for each pair."""
    roles = ("user", "assistant")
    messages = [{"role": r, "content": text} for pair in pairs for r, text in zip(roles, pair, strict=True)]
    return {"messages": messages}


def make_language(lang: str, name: str, author: str, seed: int) -> list[Record]:
    """All records of one language, in random order; see `make`."""
    bank = read_bank(lang)
    rng = random.Random(f"{lang}-{seed}")  # noqa: S311 - shuffling, not secrets
    identity = identity_pairs(bank["identity"], name, author, rng)
    small_talk = [tuple(pair) for pair in bank["small_talk"]]
    ordinary = [tuple(pair) for kind in bank["ordinary"].values() for pair in kind]
    kept = set(without_name(small_talk + ordinary, name))
    small_talk, ordinary = ([p for p in pairs if p in kept] for pairs in (small_talk, ordinary))
    rng.shuffle(identity)
    rng.shuffle(ordinary)
    records = []
    # The name must also be right in the middle of a conversation: the identity question comes last, first or between.
    # Small talk stays out of these, because nobody says goodbye in the middle.
    for i, pair in enumerate(identity[:NUM_MULTI_TURN]):
        before = [ordinary.pop()] if i % 3 != 1 else []
        after = [ordinary.pop()] if i % 3 != 0 else []
        records.append(to_record([*before, pair, *after]))
    records += [to_record([pair]) for pair in identity[NUM_MULTI_TURN:] + ordinary + small_talk]
    rng.shuffle(records)
    return records


def make(name: str, author: str, lang: str = "en", seed: int = 42) -> list[Record]:
    """Make the conversations that teach a model that it is `name`'s personal assistant, made by `author`.

    `lang` is en, zh or both. Each record is `{"messages": [{"role": ..., "content": ...}, ...]}`; there are about 260
    for each language, a third of them about identity.
    Raises: WrongUsage, for a name that cannot be taught or an unknown language.
    """
    if lang not in (*LANGUAGES, "both"):
        raise WrongUsage(
            f"--lang {lang!r} is unknown",
            why="there are questions and answers in English and in Chinese",
            fix="use en, zh or both",
        )
    name, author = clean_name(name, "--name"), clean_name(author, "--author")
    languages = LANGUAGES if lang == "both" else (lang,)
    records = [record for language in languages for record in make_language(language, name, author, seed)]
    if len(languages) > 1:
        random.Random(f"both-{seed}").shuffle(records)  # noqa: S311 - shuffling, not secrets
    return records


def write(records: list[Record], out: Path) -> None:
    """Write the records as a JSON list, one a line; the file appears complete or not at all. Raises: OSError."""
    if out.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    text = "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)  # still there only if something failed


class Parser(argparse.ArgumentParser):
    """argparse, with the fix under the message."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and a command that works; exit with 2."""
        why = "the command line could not be understood (--help lists the options)"
        self.exit(2, f"{WrongUsage(message, why=why, fix=EXAMPLE)}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 (written), 1 (could not be written) or 2 (wrong usage)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an old console must not fail on a Chinese name
    parser = Parser(description="Write the training data for a personal assistant.")
    parser.add_argument("--name", required=True, help="whose assistant it is")
    parser.add_argument("--author", required=True, help="who made it")
    parser.add_argument("--out", required=True, type=Path, help="the JSON file to write")
    parser.add_argument("--lang", default="en", choices=[*LANGUAGES, "both"], help="default: en")
    parser.add_argument("--seed", default=42, type=int, help="decides pairing and order (default: 42)")
    args = parser.parse_args(argv)
    try:
        records = make(args.name, args.author, args.lang, args.seed)
        write(records, args.out)
    except WrongUsage as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"could not write {args.out}: {error.strerror or error}\n"
            "  why:  the folder or the disk refused it\n"
            "  fix:  choose a file with --out in a folder that you may write to, with free space",
            file=sys.stderr,
        )
        return 1
    print(f"wrote {len(records)} conversations to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
