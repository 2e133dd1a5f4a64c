"""The command that serves the chat page: `minituner web`.

    minituner web work_dirs/ada/hf                              http://127.0.0.1:7860, for this machine
    minituner web BASE --adapter ada=A --adapter formal=B       a choice of who answers, and compare
    minituner web work_dirs/ada/hf --host 0.0.0.0 --share-token SECRET

Lesson: notebook 09.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from minituner.cli_options import Adapters, Bits, Dtype, Model, OtherBase, System, Template, TrustRemoteCode

web_app = typer.Typer()


@web_app.command()
def web(
    model: Model,
    adapter: Adapters = None,
    host: Annotated[str, typer.Option(help="Address to listen at; any but this machine's own needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860.", min=1, max=65535)] = None,
    share_token: Annotated[str | None, typer.Option(help="Let in only who knows this password.")] = None,
    template: Template = None,
    system: System = None,
    bits: Bits = None,
    dtype: Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Answers begin at this length, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="Where the slider begins; 0 is greedy.")] = 0.0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Load what a full fine-tuning started from, to compare with.")
    ] = False,
    longest_answer: Annotated[int, typer.Option(help="The most tokens a visitor may ask for.")] = 1024,
    longest_message: Annotated[int, typer.Option(help="The most characters a visitor may send.")] = 8000,
    waiting: Annotated[int, typer.Option(help="How many messages may wait, the one being answered included.")] = 16,
    other_base: OtherBase = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model in the browser, exactly the way it was trained."""
    from minituner.chat.web import check_address, check_gradio, serve

    check_address(host, share_token)
    check_gradio()
    from minituner.chat.line import Line
    from minituner.chat.opening import open_model
    from minituner.chat.settings import Settings
    from minituner.chat.web_visitor import Host
    from minituner.data.templates import NamedTemplate

    settings, line = Settings(max_new_tokens=max_new_tokens, temperature=temperature), Line(waiting)
    if template not in (None, "native"):
        NamedTemplate.find(template)  # a misspelt name is said before minutes of loading

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    loaded = open_model(
        model,
        adapter or (),
        dtype=dtype,
        bits=bits,
        compare=compare,
        trust_remote_code=trust_remote_code,
        other_base=other_base,
        say=say,
    )
    visitors = Host(loaded, settings, template, system, line, longest_message, longest_answer)
    serve(visitors, address=host, port=port, token=share_token, say=say).wait()
