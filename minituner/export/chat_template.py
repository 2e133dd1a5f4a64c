"""A named template as a Jinja chat template: what training saw, for every program that reads `chat_template`.

    internlm2_chat  ->  {%- for message in messages -%} ... {{- '<|im_start|>user\\n' + ns.users | join('\\n') + ...

Training renders named templates in Python (data/templates.py); transformers, vLLM and LMDeploy know only Jinja. This
writes the same rules down once more: systems and users in a row are joined, every answer gets its suffix, its end token
and the separator, rounds are counted. Tested against the segments of training for each template.

Two things no chat template can do: keep a control token that a user typed as text, and tokenise earlier answers apart
from the prompts around them. `minituner parity` shows whether the second matters for a tokenizer.
Lesson: notebook 09.
"""

from __future__ import annotations

import copy
from typing import Any

from minituner.data.encoding import own_bos
from minituner.data.templates import NamedTemplate


def jinja_of(template: NamedTemplate, bos_token: str | None = None) -> str:
    """The Jinja source that prints what `render_named` prints.

    Args:
        bos_token: printed in front of everything, for tokenizers that put one there.
    """
    before, place, after = template.instruction.partition("{input}")
    inputs = " + ns.users | join('\\n')" if place else ""
    instruction = f"{_rounds(before)}{inputs} + {_rounds(after)}"
    if template.system is None:
        complaint = f"template {template.key} has no place for a system text"
        system = "{{- raise_exception(" + ascii(complaint) + ") -}}"
    else:
        parts = template.system.split("{system}")
        system = "{{- " + " + ns.system + ".join(ascii(part) for part in parts) + " -}}"
    # The joined system text may be empty although there is a message: then it is left out, as in training.
    prompt = (
        "{%- set ns.system = ns.systems | join('\\n') -%}{%- if ns.system -%}" + system + "{%- endif -%}"
        "{{- " + instruction + " -}}{%- set ns.systems = [] -%}{%- set ns.users = [] -%}"
    )
    end = "" if template.suffix_as_eos else " + eos_token"
    front = "{{- bos_token -}}" if bos_token else ""
    return (
        "{%- if tools is defined and tools -%}"
        "{{- raise_exception("
        + ascii(f"template {template.key} has no place for tools")
        + ") -}}{%- endif -%}"
        + front
        + "{%- set ns = namespace(systems=[], users=[], round=1, system='') -%}"
        "{%- for message in messages -%}"
        "{%- if message['content'] is string -%}{%- set text = message['content'] -%}"
        "{%- elif not message['content'] -%}{%- set text = '' -%}"
        "{%- else -%}{%- set text = message['content'] | selectattr('text', 'defined') | map(attribute='text') "
        "| join -%}{%- endif -%}"
        "{%- if message['role'] == 'system' -%}{%- set ns.systems = ns.systems + [text] -%}"
        "{%- elif message['role'] in ['user', 'tool'] -%}{%- set ns.users = ns.users + [text] -%}"
        "{%- elif message['role'] == 'assistant' -%}"
        + prompt
        + "{{- text + "
        + ascii(template.suffix)
        + end
        + " + "
        + ascii(template.sep)
        + " -}}{%- set ns.round = ns.round + 1 -%}"
        "{%- else -%}{{- raise_exception("
        + ascii(f"template {template.key} has no place for the role ")
        + " + message['role']) -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if ns.users or ns.systems or add_generation_prompt -%}" + prompt + "{%- endif -%}"
    )


def _rounds(text: str) -> str:
    """A Jinja expression for `text` with {round} in its place."""
    return " + ns.round | string + ".join(ascii(part) for part in text.split("{round}"))


def with_trained_template(tokenizer: Any, template: str) -> Any:
    """The tokenizer as it is to be saved: a copy whose chat template is the one that was trained with.

    A tokenizer without any, trained on plain text, stays as it is.

    Raises:
        UsageError: no such template.
    """
    if template == "native":
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    bos = tokenizer.bos_token if own_bos(tokenizer) is not None else None
    tokenizer.chat_template = jinja_of(NamedTemplate.find(template), bos)
    return tokenizer
