"""The command that talks: `minituner chat`.

    minituner chat work_dirs/ada/hf                             a conversation, asked the way training did
    minituner chat BASE --adapter ada=A --adapter formal=B      /adapter formal switches
    minituner chat work_dirs/ada/hf --compare --prompt "Hi"     base and tuned model, once

Lesson: notebook 09.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from minituner.cli_options import Adapters, Bits, Dtype, Model, OtherBase, System, Template, TrustRemoteCode

chat_app = typer.Typer()


@chat_app.command()
def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Ask this once and leave.")] = None,
    adapter: Adapters = None,
    template: Template = None,
    system: System = None,
    system_template: Annotated[str | None, typer.Option(help="A system text of list-templates, by its key.")] = None,
    bits: Bits = None,
    dtype: Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this share.")] = 0.9,
    top_k: Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0: all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens that were there are less likely.")] = 1.0,
    stop_words: Annotated[list[str] | None, typer.Option(help="A text that ends an answer (repeatable).")] = None,
    seed: Annotated[int | None, typer.Option(help="Draw the same answers each time.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base and tuned model answer side by side.")] = False,
    other_base: OtherBase = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model, exactly the way it was trained."""
    from minituner.collection import collection_paused
    from minituner.errors import UsageError

    if system_template is not None:
        from minituner.catalog.lookup import system_prompt

        if system is not None:
            raise UsageError("--system and --system-template both name a system text", fix="leave one out")
        system = system_prompt(system_template)
    if temperature == 0 and (top_p != 0.9 or top_k or seed is not None):
        print("temperature 0 takes the likeliest token: --top-p, --top-k and --seed change nothing", file=sys.stderr)
    with collection_paused():
        from minituner.chat.session import open_session
        from minituner.chat.terminal import Talk, answer, run, show

        session = open_session(
            model,
            adapter=list(adapter or ()),
            template=template,
            system=system,
            say=lambda line: print(line, file=sys.stderr),
            dtype=dtype,
            bits=bits,
            compare=compare,
            trust_remote_code=trust_remote_code,
            other_base=other_base,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            stop_words=tuple(stop_words or ()),
            seed=seed,
        )
    if prompt is None:
        run(session, compare=compare)
    elif compare:
        talk = Talk(session)
        talk.compare()
        answer(talk, prompt)
    else:
        session.ask(prompt, stream=show)
        print()
