"""What a browser may send to the page, and what the page may load: checked before gradio sees a request.

    POST /gradio_api/queue/join   300 kB        413: no message is that long
    POST /gradio_api/upload                     404: this page takes no files, so nobody can fill the disk
    GET  /  with Host: evil.example             421: a name that was bent to point at this machine
    any answer                                  Content-Security-Policy: nothing from another address is loaded

Plain ASGI (asgi.readthedocs.io), no imports. Lesson: notebook 09.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

API = "/gradio_api/"
# What the page itself asks for; uploads, files, proxies, recordings and the ways around the queue are not in it.
CALLS = {
    "app_id",
    "call",
    "cancel",
    "heartbeat",
    "info",
    "login_check",
    "queue",
    "reset",
    "run",  # what is not queued; gradio refuses it for what is
    "startup-events",
    "token",
    "user",
}
LOCAL = {"localhost", "127.0.0.1", "[::1]"}
HEADERS = {
    # gradio's page is one inline script and compiles templates; what matters is that nothing comes from elsewhere.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self' http://localhost:* http://127.0.0.1:*",  # a notebook shows the page in a frame
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        longest: of a request's body, in bytes.
        local_only: answer only to the names of this machine itself.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], longest: int, local_only: bool) -> None:
        self.app, self.longest, self.local_only = app, longest, local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on and add the headers to its answer."""
        if scope["type"] == "websocket":
            return  # gradio's page has none; an unanswered handshake is refused by the server
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if refusal := self.refusal(scope):
            status, text = refusal
            head = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": status, "headers": head})
            await send({"type": "http.response.body", "body": text.encode()})
            return

        async def headed(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message.get("headers", []) if name.decode() not in HEADERS]
                message["headers"] = kept + [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, headed)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and text, if the request is not to be passed on."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        name = headers.get("host", "")
        if self.local_only and (name if name.endswith("]") else name.rpartition(":")[0] or name) not in LOCAL:
            return 421, "This page answers to localhost only.\n"
        path = scope["path"]
        if path.startswith(API) and path[len(API) :].split("/")[0] not in CALLS:
            return 404, "There is nothing here.\n"
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        length = headers.get("content-length", "")
        if not length.isdigit():
            return 411, "The request does not say how long it is.\n"
        if int(length) > self.longest:
            return 413, "The request is too long.\n"
        return None
