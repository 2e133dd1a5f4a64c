"""The chat page: two chats, a box, buttons, settings, and what each of them does.

    +-----------+-----------+
    |   base    |    ada    |     on a phone one above the other; the base only while comparing
    +-----------+-----------+
    | message ...    [Send] |     [Stop] while an answer comes
    | [Again]  [New chat]   |
    | > Settings            |     adapter, compare, system text, sampling
    +-----------------------+

Text of people and models is shown as text: no Markdown, no HTML. Lesson: notebook 09.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from html import escape
from pathlib import Path
from typing import Any

from minituner.chat.line import LineFull
from minituner.chat.loaded import BASE
from minituner.chat.turn import Turn
from minituner.chat.web_visitor import Bubble, Host, Visitor
from minituner.errors import MinitunerError, UsageError

FORGOTTEN_AFTER = 6 * 3600  # seconds without a message
# The order in which the page sends them, and in which an API client gives them.
CONTROLS = (
    "adapter",
    "compare",
    "system",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "seed",
)
CSS = """
.gradio-container { width: 100%; max-width: 1100px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.25rem; margin: 0; overflow-wrap: anywhere; }
#note { min-height: 1.5em; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
button[aria-label="Clear"] { display: none; }  /* "New chat" does it; it would lie over the first message */
.message { overflow-wrap: anywhere; }
.message .md { white-space: pre-wrap; }
"""


def build(host: Host) -> Any:
    """The page, as a `gradio.Blocks` that nobody serves yet."""
    import gradio as gr

    names, begin = host.loaded.names, host.settings
    several = len(names) > 1
    title = Path(host.loaded.where).name or "minituner"
    looks = {
        "height": "55vh",
        "min_height": 240,
        "render_markdown": False,
        "feedback_options": None,
        "group_consecutive_messages": False,
        "buttons": [],  # they would copy the escaped text
        "layout": "bubble",
    }
    with gr.Blocks(analytics_enabled=False, title=f"Chat: {title}", fill_width=True) as page:
        visitor = gr.State(None, time_to_live=FORGOTTEN_AFTER)
        gr.HTML(f"<h1>{escape(title)}</h1>", elem_id="title", padding=False)
        with gr.Row():
            beside = gr.Chatbot(visible=False, label=BASE, elem_id="beside", **looks)
            chat = gr.Chatbot(label=names[0] if several else "chat", elem_id="chat", **looks)
        note = gr.HTML("", elem_id="note", padding=False)
        box = gr.Textbox(
            elem_id="box",
            show_label=False,
            placeholder="Your message",
            max_lines=8,
            max_length=host.longest_message,
            submit_btn="Send",
            autofocus=True,
        )
        with gr.Row():
            again = gr.Button("Again", elem_id="again", size="sm", min_width=100)
            clear = gr.Button("New chat", elem_id="clear", size="sm", min_width=100)
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            with gr.Row(visible=several):
                adapter = gr.Radio(names, value=names[0], label="Who answers", elem_id="adapter")
                compare = gr.Checkbox(False, label="Compare side by side", elem_id="compare")
            system = gr.Textbox(
                host.first_system(names[0]),
                label="System text (empty: none)",
                lines=2,
                max_lines=6,
                max_length=host.longest_message,
                elem_id="system",
            )
            with gr.Row():
                most = gr.Slider(1, host.longest_answer, begin.max_new_tokens, step=1, label="Longest answer (tokens)")
                warmth = gr.Slider(
                    0, max(2.0, begin.temperature), begin.temperature, step=0.05, label="Temperature (0: greedy)"
                )
            with gr.Row():
                top_p = gr.Slider(0.01, 1, begin.top_p, step=0.01, label="top_p")
                top_k = gr.Number(begin.top_k, precision=0, minimum=0, label="top_k (0: all)")
            with gr.Row():
                penalty = gr.Slider(0.5, 2, begin.repetition_penalty, step=0.05, label="Repetition penalty (1: none)")
                # gradio shows and sends an empty number as 0, which is a seed.
                seed = gr.Textbox(
                    "" if begin.seed is None else str(begin.seed),
                    label="Seed (empty: a new one each time)",
                    max_length=19,
                )

        handlers = Handlers(gr, host)
        controls = [adapter, compare, system, most, warmth, top_p, top_k, penalty, seed]
        shown = [visitor, box, beside, chat, note]
        # No limit of gradio's own on what runs at once: the line serves one, and tells the others where they stand.
        open_to_all = {"concurrency_limit": None, "show_progress": "hidden"}
        box.submit(handlers.send, [box, visitor, *controls], shown, api_name="send", **open_to_all)
        again.click(handlers.again, [visitor, *controls], shown, api_name="again", **open_to_all)
        box.stop(handlers.stop, [visitor], [visitor], queue=False, api_name="stop", **open_to_all)
        clear.click(handlers.forget, [visitor], shown, queue=False, api_name="forget", **open_to_all)
        private = {"queue": False, "api_visibility": "private", **open_to_all}
        for bin_icon in (chat, beside):
            bin_icon.clear(handlers.forget, [visitor], shown, **private)
        compare.input(lambda on: gr.update(visible=on), [compare], [beside], **private)
        adapter.input(handlers.system_of, [adapter, system], [system], **private)
    # What calls the API by itself gets no further than the browser: past this many, the answer is "queue is full".
    return page.queue(max_size=4 * host.line.capacity + 16, api_open=False)


class Handlers:
    """What the page's events do; each returns (or yields) what its outputs become."""

    def __init__(self, gr: Any, host: Host) -> None:
        self.gr, self.host = gr, host

    def send(self, text: str, visitor: Visitor | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The message's bubble, then the answer as it grows."""
        visitor = visitor or Visitor(self.host)
        try:
            turn = visitor.send(text, **dict(zip(CONTROLS, values, strict=True)))
        except UsageError as error:
            yield self._refused(visitor, text, error)
            return
        box = self.gr.update(value="", submit_btn=False, stop_btn="Stop")
        with closing(turn.updates()) as updates:
            for _ in updates:
                if not turn.done:
                    yield self._shown(visitor, box, waiting(turn))
                    box = self.gr.skip()
        turn.join()
        if turn.refusal:
            yield self._refused(visitor, turn.text, turn.refusal)
            return
        nothing = all(len(side.messages) == began for side, began in zip(turn.sides, turn.began, strict=True))
        box = self.gr.update(submit_btn="Send", stop_btn=False, **({"value": turn.text} if nothing else {}))
        notes = [*visitor.notes, *(["stopped"] if turn.stopped else [])]
        notes += ["the answer is empty"] if not nothing and not any(turn.answers) else []
        yield self._shown(visitor, box, "\n".join(notes))

    def again(self, visitor: Visitor | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The last answer taken back, and another one."""
        visitor = visitor or Visitor(self.host)
        try:
            text = visitor.again()
        except UsageError as error:
            yield self._shown(visitor, self.gr.skip(), error.text())
            return
        yield from self.send(text, visitor, *values)

    def stop(self, visitor: Visitor | None) -> Visitor | None:
        """The answer under way ends; `send` shows what there is of it."""
        if visitor:
            visitor.stop()
        return visitor

    def forget(self, visitor: Visitor | None) -> tuple[Any, ...]:
        """An empty page."""
        visitor = visitor or Visitor(self.host)
        visitor.forget()
        return self._shown(visitor, self.gr.update(value="", submit_btn="Send", stop_btn=False), "")

    def system_of(self, adapter: str, text: str) -> str:
        """The system text that `adapter` was trained with, unless the visitor has written another.

        The base keeps the text of the adapter before it: the same prompt, so that the difference is the adapter's.
        """
        usual = {name: self.host.first_system(name) for name in self.host.loaded.names if name != BASE}
        return usual.get(adapter, text) if text in usual.values() else text

    def _refused(self, visitor: Visitor, text: str, error: MinitunerError) -> tuple[Any, ...]:
        """The message back in the box, and why."""
        if isinstance(error, LineFull):
            said = f"{error.what}: {error.why}; {error.fix}"
        else:
            said = error.text()
        if visitor.turn and not visitor.turn.done:
            return self._shown(visitor, self.gr.skip(), said)
        return self._shown(visitor, self.gr.update(value=text, submit_btn="Send", stop_btn=False), said)

    def _shown(self, visitor: Visitor, box: Any, note: str) -> tuple[Any, ...]:
        *others, main = [[as_text(bubble) for bubble in side] for side in visitor.bubbles()]
        talk = visitor.talk
        label = talk.session.adapter if len(talk.session.loaded.names) > 1 else "chat"
        beside = self.gr.update(visible=False)
        if others:
            beside = self.gr.update(value=others[0], label=talk.beside.adapter, visible=True)
        return visitor, box, beside, self.gr.update(value=main, label=label), escape(note).replace("\n", "<br>")


def as_text(bubble: Bubble) -> Bubble:
    """A bubble that shows its text as it is, indentation included.

    Without Markdown, gradio 6 still puts a text into the page as HTML, after `inspect.cleandoc`, which would take the
    indentation from a program's lines.
    """
    text = escape(bubble["content"], quote=False).replace("\t", "&#9;")
    return {**bubble, "content": re.sub("^ +", lambda found: "&#32;" * len(found[0]), text, flags=re.MULTILINE)}


def waiting(turn: Turn) -> str:
    """What to say while nothing has come yet."""
    if turn.before:
        return f"please wait: {turn.before} message{'s are' if turn.before > 1 else ' is'} answered before yours"
    return "" if any(turn.answers) else "..."
