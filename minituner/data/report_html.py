"""The look as HTML: one self-contained file for `inspect --html`, and the tokens that notebooks show.

    tokens_html(views)   <span style="...green, underlined...">Hello!</span><span style="...boxed...">&lt;/s&gt;</span>
    page(look)           a whole page: samples, ledger, lengths, packs; no script, nothing loaded from anywhere

Whatever stands in the data is shown and never run: it is escaped, made visible (`visible`), and the page's own policy
forbids scripts and loading. Lesson: notebooks 01 and 03.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from itertools import groupby
from pathlib import Path

from minituner.data.ledger import counted
from minituner.data.look import MOST_BAD, Look, Survey, length_facts
from minituner.data.token_view import COLOURS, ROLES, Role, TokenView, visible
from minituner.errors import UsageError

# Shape as well as colour: trained is underlined, stop is boxed, BOS is dotted, masked has neither.
_SHAPES: dict[Role, str] = {
    "trained": "border-bottom:2px solid {edge}",
    "masked": "border-bottom:2px solid transparent",
    "stop": "border:2px solid {edge};font-weight:bold",
    "bos": "border-bottom:2px dotted {edge}",
}
_BOX = "font:13px/1.9 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;word-break:break-word"
_PAGE_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 75em; margin: 2em auto }
.bar { display: flex; height: 16px; width: 40em; max-width: 100%; border: 1px solid #777; margin: 3px 0 }
.bar i { display: block; box-sizing: border-box; border-right: 1px solid #fff }
.row { display: flex; gap: 1em; align-items: center }
.row span { min-width: 10em; text-align: right; font-variant-numeric: tabular-nums } .bad { color: #8c2d04 }
"""
_DOCUMENT_TINTS = ("#009e73", "#56b4e9", "#e69f00", "#cc79a7", "#0072b2")


def safe(text: str) -> str:
    """Any text as HTML that shows it and does nothing."""
    return escape(visible(text), quote=True)


def role_style(role: Role) -> str:
    """The inline style of a role."""
    fill, edge = COLOURS[role]
    return f"background:{fill};color:#111;unicode-bidi:isolate;{_SHAPES[role].format(edge=edge)}"


def tokens_html(tokens: Iterable[TokenView], *, show_ids: bool = False) -> str:
    """Tokens as spans with inline styles, a run of one role in one span; the id is a tooltip, or printed too."""
    parts = []
    for role, run in groupby(tokens, key=lambda token: token.role):
        inner = "".join(_token_html(token, show_ids) for token in run)
        parts.append(f'<span style="{role_style(role)}">{inner}</span>')
    return f'<div dir="ltr" style="{_BOX}">{"".join(parts)}</div>'


def _token_html(token: TokenView, show_ids: bool) -> str:
    # A token that only continues a character is a bare border line, so that Chinese stays readable.
    bare = token.continues and not show_ids
    text = "" if bare else escape(token.text, quote=True).replace("⏎", "⏎\n")
    shown_id = f'<sub style="color:#555">{token.id}</sub>' if show_ids else ""
    tip = f"{token.position}: id {token.id}"
    return f'<span title="{tip}" style="border-right:1px dotted">{text}{shown_id}</span>'


def legend_html() -> str:
    """The four roles, each drawn as it looks."""
    items = "&emsp;".join(f'<span style="{role_style(role)}">{safe(meaning)}</span>' for role, meaning in ROLES.items())
    return f'<div style="{_BOX}">{items}</div>'


def page(look: Look) -> str:
    """The whole look as one HTML page without scripts or outside resources."""
    title = safe(f"minituner inspect {look.target}")
    body = [f"<h1>{title}</h1>", *_header(look), "<h2>Samples</h2>", legend_html(), *_samples(look)]
    if look.survey is not None:
        body += [*_ledger(look.survey), *_lengths(look), *_packs(look), *_bad(look)]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title>'
    head += f"<style>{_PAGE_STYLE}</style>"
    text = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{text}\n</body></html>\n'


def write_page(look: Look, path: str | Path) -> Path:
    """Write `page(look)` aside and rename it into place.

    Raises:
        UsageError: the folder cannot be written to.
    """
    target, text = Path(path), page(look)
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}", fix="choose another file") from None
    return target


def _header(look: Look) -> list[str]:
    data = look.recipe.data
    lines = [f"<li>{safe(path)}: format {safe(layout)} ({safe(why)})</li>" for path, layout, why in look.layouts]
    model, template = safe(look.recipe.model.name_or_path), safe(data.template)
    lines.append(f"<li>tokenizer of {model}, template {template}, loss on {data.loss_on}</li>")
    return ["<ul>", *lines, "</ul>"]


def _samples(look: Look) -> Iterable[str]:
    for sample in look.samples:
        yield f"<h3>{safe(sample.where)}: {sample.length:,} tokens, {safe(sample.fate)}</h3>"
        yield tokens_html(sample.tokens)


def _ledger(survey: Survey) -> list[str]:
    read = f"{survey.records:,} records" + (f": {survey.ended}" if survey.ended else ", all there are")
    lines = "\n".join(safe(line) for line in survey.ledger.lines())
    groups = [("trained", survey.ledger.trained, COLOURS["trained"][1])]
    groups += [("masked", sum(survey.ledger.masked.values()), "#bbbbbb")]
    groups += [("cut or dropped", survey.ledger.truncated + sum(survey.ledger.dropped.values()), "#d55e00")]
    raw = max(survey.ledger.raw, 1)
    bar = "".join(_slice(count / raw, colour, f"{name}: {count:,}") for name, count, colour in groups if count)
    return [
        f"<h2>Where every token goes</h2><p>{safe(read)}</p>",
        f'<div class="bar">{bar}</div>',
        f"<pre>{lines}</pre>",
    ]


def _slice(share: float, colour: str, tip: str) -> str:
    return f'<i style="width:{share:.4%};background:{colour}" title="{tip}"></i>'


def _lengths(look: Look) -> list[str]:
    survey = look.survey or Survey()
    counts, edges = survey.histogram()
    if not counts:
        return []
    over = int((survey.lengths > look.recipe.data.max_length).sum())
    facts = ", ".join(f"{name} {value:,.0f}" for name, value in length_facts(survey.lengths).items())
    rows = [f"<h2>Lengths in tokens</h2><p>{facts}; {over:,} over max_length {look.recipe.data.max_length:,}</p>"]
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = _slice(count / max(counts), COLOURS["bos"][1], f"{count:,}")
        rows.append(f'<div class="row"><span>{low:,} to {high - 1:,}</span><div class="bar">{bar}</div>{count:,}</div>')
    return rows


def _packs(look: Look) -> list[str]:
    survey, data = look.survey or Survey(), look.recipe.data
    if survey.packs is None or not len(survey.packs):
        return []
    fill = f"{len(survey.packs):,} packs of at most {data.max_length:,} tokens, {survey.packs.fill:.1%} full"
    rows = [f"<h2>Packs ({data.packing})</h2><p>{fill}; white is empty</p>"]
    for number, documents in survey.some_packs():
        bar = "".join(
            _slice(length / data.max_length, _DOCUMENT_TINTS[i % len(_DOCUMENT_TINTS)], f"{length:,} tokens")
            for i, length in enumerate(documents)
        )
        rows.append(
            f'<div class="row"><span>pack {number:,}</span><div class="bar">{bar}</div>'
            f"{counted(len(documents), 'document')}</div>"
        )
    return rows


def _bad(look: Look) -> list[str]:
    survey = look.survey or Survey()
    if not survey.bad.count:
        return []
    items = [f'<li class="bad">{safe(": ".join(filter(None, item)))}</li>' for item in survey.bad.items[:MOST_BAD]]
    return [f"<h2>{survey.bad.count:,} records cannot be used</h2>", "<ul>", *items, "</ul>"]
