"""The look as text: what `minituner inspect` prints.

    terminal                                  pipe or file
    <|im_start|>user Hi ... Hello!<|im_end|>    masked  | <|im_start|>user⏎Hi ...
    underlined: trained, reversed: stop         trained | Hello!
                                                stop    | <|im_end|>

Roles can be told apart without colour in both. User text goes through `visible`, so it cannot steer the terminal.
Lesson: notebook 01.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from minituner.data.ledger import counted
from minituner.data.look import MOST_BAD, Look, Sample, Survey, length_facts
from minituner.data.token_view import ROLES, Role, TokenView, visible

if TYPE_CHECKING:
    from rich.console import Console

# Two styles in turn, so that one sees where a token ends.
STYLES: dict[Role, tuple[str, str]] = {
    "trained": ("green underline", "bright_green underline"),
    "masked": ("bright_black", "white dim"),
    "stop": ("bold reverse", "bold reverse"),
    "bos": ("bold cyan", "bold cyan"),
}
WIDTH = 60  # characters of the longest bar
FILLS = "█▓▒"  # one after the other, so that neighbouring documents differ


def print_samples(look: Look, console: Console, *, ids: bool = False) -> None:
    """Print what is looked at, and the sample records as tokens with their roles."""
    for line in header_lines(look):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if console.is_terminal:
        console.print(_legend())
    for sample in look.samples:
        title = f"\n{visible(sample.where)}: {sample.length:,} tokens, {visible(sample.fate)}"
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        if console.is_terminal:
            console.print(_coloured(sample, ids))
        else:
            for line in plain_lines(sample, ids):
                console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_survey(look: Look, console: Console) -> None:
    """Print the ledger, the lengths, the packs and the bad records."""
    for line in survey_lines(look):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def header_lines(look: Look) -> list[str]:
    """What is looked at: sources, how they were recognised, tokenizer, template."""
    data = look.recipe.data
    lines = [f"{visible(path)}: format {layout} ({visible(why)})" for path, layout, why in look.layouts]
    model = visible(look.recipe.model.name_or_path)
    return [*lines, f"tokenizer of {model}, template {data.template}, loss on {data.loss_on}"]


def _legend() -> object:
    from rich.text import Text

    legend = Text()
    for role, meaning in ROLES.items():
        legend.append(role, STYLES[role][0]).append(meaning.removeprefix(role) + "   ")
    return legend


def _coloured(sample: Sample, ids: bool) -> object:
    from rich.text import Text

    text = Text(overflow="fold")
    for number, token in enumerate(sample.tokens):
        text.append(_token(token, ids).replace("⏎", "⏎\n"), STYLES[token.role][number % 2])
    return text


def plain_lines(sample: Sample, ids: bool = False) -> Iterator[str]:
    """One line for each run of tokens with the same role; without ids, split characters are shown once."""
    for role, run in groupby(sample.tokens, key=lambda token: token.role):
        shown = "".join(_token(token, ids) for token in run if ids or not token.continues)
        yield f"  {role:<7} | {shown}"


def _token(token: TokenView, ids: bool) -> str:
    if ids:
        return f"{token.text}({token.id}) "
    return "" if token.continues else token.text


def survey_lines(look: Look) -> list[str]:
    """Ledger, length histogram, packs and bad records as lines of text."""
    survey = look.survey or Survey()
    read = f"these numbers are about {survey.records:,} records"
    lines = ["", f"{read}: {survey.ended}" if survey.ended else f"{read}: all there are", *survey.ledger.lines()]
    lines += [*_histogram(survey, look.recipe.data.max_length), *_packs(look, survey)]
    if survey.bad.count:
        stops = "; training stops at the first (data.on_error=skip passes over them)"
        how = stops if look.recipe.data.on_error == "stop" else ", skipped"
        lines += ["", f"{survey.bad.count:,} records cannot be used{how}:"]
        lines += ["  " + visible(": ".join(filter(None, item))) for item in survey.bad.items[:MOST_BAD]]
    return lines


def _histogram(survey: Survey, max_length: int) -> list[str]:
    counts, edges = survey.histogram()
    if not counts:
        return []
    facts = length_facts(survey.lengths)
    over = int((survey.lengths > max_length).sum())
    head = f"length in tokens: shortest {facts['shortest']:,}, median {facts['median']:,.0f}, "
    head += f"mean {facts['mean']:,.0f}, longest {facts['longest']:,}; {over:,} over max_length {max_length:,}"
    lines = ["", head]
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * -(-count * WIDTH // max(counts))
        lines.append(f"  {low:>7,} to {high - 1:>7,}  {bar} {count:,}")
    return lines


def _packs(look: Look, survey: Survey) -> list[str]:
    if survey.packs is None or not len(survey.packs):
        return []
    data, packs = look.recipe.data, survey.packs
    lines = [
        "",
        f"packing {data.packing}: {len(packs):,} packs of at most {data.max_length:,} tokens, {packs.fill:.1%} full",
    ]
    for number, documents in survey.some_packs():
        shown = pack_bar(documents, data.max_length)
        lines.append(f"  pack {number:>6,} |{shown}| {sum(documents):,} tokens, {counted(len(documents), 'document')}")
    return lines


def pack_bar(documents: list[int], max_length: int, width: int = WIDTH) -> str:
    """One pack as `width` characters: neighbouring documents in different shades, a dot where nothing is."""
    bar, done, before = "", 0, 0
    for number, length in enumerate(documents):
        done += length
        end = done * width // max_length
        bar += FILLS[number % len(FILLS)] * (end - before)
        before = end
    return bar + "·" * (width - len(bar))
