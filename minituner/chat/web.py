"""The chat page served: on which address, to whom, and what is switched off.

    serve(open_model("work_dirs/ada/hf"))                       http://127.0.0.1:7860, this machine only
    serve(loaded, address="0.0.0.0", token="long-and-secret")   others too, who have to know the token

Never a public link, no analytics, nothing loaded from another address: it works without the internet. The model is
in memory once, one answer is computed at a time, and everybody has a conversation of their own.
Lesson: notebook 09.
"""

from __future__ import annotations

import hmac
import importlib.util
import ipaddress
import os
import time
from collections.abc import Callable
from typing import Any

from minituner.chat.web_visitor import Host
from minituner.errors import MinitunerError, UsageError

SHORTEST_TOKEN = 8


class Server:
    """A page that is being served; `url` opens it, `close` ends it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url

    def close(self) -> None:
        """Serve no longer."""
        self.page.close(verbose=False)

    def wait(self) -> None:
        """Serve until Ctrl-C."""
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            self.close()


def is_local(address: str) -> bool:
    """Whether only this machine itself reaches `address`."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def check_address(address: str, token: str | None) -> None:
    """Refuse to serve strangers.

    Raises:
        UsageError: others could reach `address` and there is no token, or one that can be guessed.
    """
    if token is None and not is_local(address):
        raise UsageError(
            f"--host {address} lets other machines in, and there is no --share-token",
            why="whoever reaches the port could use the model",
            fix="add --share-token with a secret of your own, or leave --host out",
        )
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise UsageError("--share-token is too short to be a secret", fix=f"{SHORTEST_TOKEN} characters or more")


def check_gradio() -> None:
    """Refuse early, before minutes of loading.

    Raises:
        UsageError: gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UsageError(
            "the chat page needs the package gradio",
            fix="install it",
            next_command='pip install "minituner[web]"',
        )


def serve(
    host: Host,
    *,
    address: str = "127.0.0.1",
    port: int | None = None,
    token: str | None = None,
    say: Callable[[str], None] = print,
) -> Server:
    """Serve the page; returns at once, when it can be opened.

    Args:
        host: the model, and what visitors may do.
        address: to listen at.
        port: None is the first free one from 7860.
        token: the password of everybody who may come in.

    Raises:
        UsageError: see `check_address` and `check_gradio`. MinitunerError: the port is taken.
    """
    check_address(address, token)
    check_gradio()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio asks nothing else when it is imported
    import gradio as gr
    from starlette.middleware import Middleware

    from minituner.chat.web_guard import Guard
    from minituner.chat.web_page import CSS, build

    page = build(host)
    # A character is up to 12 bytes in JSON (two escapes), and there are two texts: the message and the system text.
    guard = Middleware(Guard, longest=24 * host.longest_message + 65536, local_only=token is None)
    plain = ["system-ui", "sans-serif"]
    try:
        _, url, _ = page.launch(
            server_name=address,
            server_port=port,
            auth=(lambda _name, password: hmac.compare_digest(password.encode(), token.encode())) if token else None,
            auth_message="Any name; the password is the token." if token else None,
            share=False,
            inline=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            max_threads=40 + 2 * host.line.capacity,  # each waiting visitor is looked after by one
            max_file_size=1,
            allowed_paths=[],
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            footer_links=[],
            theme=gr.themes.Default(font=plain, font_mono=["ui-monospace", "monospace"]),
            css=CSS,
            app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None},
        )
    except OSError as error:
        raise MinitunerError(
            f"cannot listen at {address}, port {port or 'from 7860'}",
            why=str(error),
            fix="another --port, or leave it out",
        ) from None
    say(f"{url}  (Ctrl-C ends it)")
    if token and not is_local(address):
        say("the token and what is said travel unencrypted: use it in a network you trust, or behind a proxy with TLS")
    return Server(page, url)
