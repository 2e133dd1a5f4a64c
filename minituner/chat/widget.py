"""The same chat in a notebook's cell: a box, Send, Stop, Again, New chat, and the conversation above them.

    chat_widget("work_dirs/ada/hf")          the last line of a cell shows it
    widget = chat_widget(loaded)             from `open_model`, shared with others
    widget.visitor.talk.session.messages     what was said, for the next cell

The answer grows while the notebook stays usable: a thread looks on (`Turn.updates`), the kernel is not held.
Lesson: notebook 09.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from minituner.chat.loaded import LoadedModel
from minituner.chat.settings import Settings, checked_names
from minituner.chat.turn import Turn
from minituner.chat.web_visitor import Host, Visitor
from minituner.errors import MinitunerError, UsageError

STYLE = "white-space:pre-wrap;overflow-wrap:anywhere;padding:4px 8px;margin:4px 0;border-radius:6px;"
COLOURS = {"user": "background:#8882;margin-left:15%;", "assistant": "background:#48f2;margin-right:15%;"}


def chat_widget(
    model: str | Path | LoadedModel,
    *,
    adapter: str | Path | list[str | Path] | None = None,
    template: str | None = None,
    system: str | None = None,
    compare: bool = False,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> Any:
    """A chat to put into a notebook, as an `ipywidgets.VBox` with the parts as attributes (see `ChatParts`).

    `model` is what `open_model` takes, or what it returned; `settings` are those of `Settings`.

    Raises:
        UsageError: as `open_model`; a setting that does not exist; `compare` with one model only; `adapter` beside a
            model that is open already. MinitunerError: the model cannot be loaded.
    """
    chosen = Settings(**checked_names(settings))
    if isinstance(model, LoadedModel):
        if adapter is not None:
            raise UsageError("the model is open already", fix="give its adapters to open_model")
        loaded = model
    else:
        from minituner.chat.opening import open_model

        adapters = [] if adapter is None else adapter if isinstance(adapter, list) else [adapter]
        loaded = open_model(model, adapters, compare=compare, say=say)
    longest = max(chosen.max_new_tokens, Host.longest_answer)
    visitor = Visitor(Host(loaded, chosen, template, system, longest_answer=longest))
    visitor.arrange(visitor.talk.session.adapter, compare)
    return ChatParts(visitor, compare).box


class ChatParts:
    """The widgets and what they do; `box` holds them all and carries the others as attributes of the same names."""

    def __init__(self, visitor: Visitor, compare: bool) -> None:
        import ipywidgets

        names = visitor.host.loaded.names
        self.visitor, self._reader = visitor, None
        self.history = ipywidgets.HTML()
        self.note = ipywidgets.HTML()
        self.text = ipywidgets.Textarea(
            placeholder="Your message", rows=2, layout={"width": "100%"}, continuous_update=True
        )
        self.send = ipywidgets.Button(description="Send", button_style="primary")
        self.stop = ipywidgets.Button(description="Stop", disabled=True)
        self.again = ipywidgets.Button(description="Again")
        self.clear = ipywidgets.Button(description="New chat")
        self.adapter = ipywidgets.Dropdown(options=names, description="answers:", layout={"width": "auto"})
        self.compare = ipywidgets.Checkbox(compare, description="compare", indent=False, layout={"width": "auto"})
        self.send.on_click(lambda _: self._send())
        self.stop.on_click(lambda _: self.visitor.stop())
        self.again.on_click(lambda _: self._again())
        self.clear.on_click(lambda _: self._clear())
        buttons = ipywidgets.HBox([self.send, self.stop, self.again, self.clear], layout={"flex_flow": "row wrap"})
        choice = [ipywidgets.HBox([self.adapter, self.compare])] if len(names) > 1 else []
        self.box = ipywidgets.VBox([self.history, self.note, self.text, buttons, *choice])
        for name in ("visitor", "history", "note", "text", "send", "stop", "again", "clear", "adapter", "compare"):
            setattr(self.box, name, getattr(self, name))
        self.box.wait = self.wait
        self._show()

    def wait(self) -> None:
        """Wait until the answer under way is whole."""
        if self._reader:
            self._reader.join()

    def _send(self, text: str | None = None) -> None:
        text = self.text.value if text is None else text
        try:
            turn = self.visitor.send(text, adapter=self.adapter.value, compare=self.compare.value)
        except UsageError as error:
            self._say(error.text())
            return
        self.text.value = ""
        self._busy(True)
        self._reader = threading.Thread(target=self._watch, args=(turn,), name="chat-widget", daemon=True)
        self._reader.start()

    def _again(self) -> None:
        try:
            text = self.visitor.again()
        except UsageError as error:
            self._say(error.text())
            return
        self._send(text)

    def _clear(self) -> None:
        self.visitor.forget()
        self.wait()
        self._say("")
        self._show()

    def _watch(self, turn: Turn) -> None:
        """Show the answer as it grows; whatever ends it, the buttons work again."""
        note = ""
        try:
            for _ in turn.updates():
                self._show()
        except Exception as error:  # a thread has nobody to raise to; the person at the notebook reads it
            note = f"{type(error).__name__}: {error}"
        finally:
            turn.join()
            refusal: MinitunerError | None = turn.refusal
            note = note or (refusal.text() if refusal else "\n".join(self.visitor.notes))
            if len(turn.sides[-1].messages) == turn.began[-1]:
                self.text.value = turn.text  # nothing was kept: it can be sent again
            self._say(note)
            self._show()
            self._busy(False)

    def _busy(self, busy: bool) -> None:
        self.stop.disabled = not busy
        for button in (self.send, self.again):
            button.disabled = busy

    def _say(self, note: str) -> None:
        self.note.value = f'<div style="white-space:pre-wrap">{escape(note)}</div>' if note else ""

    def _show(self) -> None:
        """Text as text: nothing that a person or a model writes becomes HTML."""
        sides = zip(self.visitor.talk.sides, self.visitor.bubbles(), strict=True)
        columns = []
        for side, bubbles in sides:
            title = f"<b>{escape(side.adapter)}</b>" if self.visitor.talk.beside else ""
            shown = "".join(
                f'<div style="{STYLE}{COLOURS[bubble["role"]]}">{escape(bubble["content"])}</div>' for bubble in bubbles
            )
            columns.append(f'<div style="flex:1 1 240px;min-width:0">{title}{shown}</div>')
        self.history.value = f'<div style="display:flex;flex-wrap:wrap;gap:12px">{"".join(columns)}</div>'
