"""The page over HTTP: who may come in, what may be sent, and thirty people at once, none mixed up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import httpx

from minituner.chat.web import Server, serve
from minituner.errors import MinitunerError, UsageError
from tests.chat.web_site import PATIENCE, House, dialogue, free_port, served

TOKEN = "a-long-secret"
PLAIN = ["tuned", False, "", 6, 0, 0.9, 0, 1, ""]  # the controls, six tokens an answer


@pytest.fixture(scope="module")
def house() -> House:
    return House(capacity=8)


@pytest.fixture(scope="module")
def server(house: House) -> Iterator[Server]:
    with served(house) as server:
        yield server


class Browser:
    """What a browser's page does, without one."""

    def __init__(self, server: Server, name: str) -> None:
        self.client = httpx.Client(base_url=server.url, timeout=PATIENCE)
        self.name = name
        depends = self.client.get("/config").json()["dependencies"]
        self.functions = {one["api_name"]: one["id"] for one in depends}

    def join(self, function: str, *data: Any) -> httpx.Response:
        body = {"data": list(data), "fn_index": self.functions[function], "session_hash": self.name}
        return self.client.post("/gradio_api/queue/join", json=body)

    def events(self) -> Iterator[dict[str, Any]]:
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.name}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    def send(self, text: str, *, controls: list[Any] = PLAIN) -> tuple[list[dict[str, str]], str, str]:
        """The conversation that the page shows then, the note under it, and the box."""
        joined = self.join("send", text, None, *controls)
        assert joined.status_code == 200, joined.text
        shown: list[Any] = [None] * 5
        for event in self.events():
            if event["msg"] == "process_completed":
                assert event["success"], event
                shown = event["output"]["data"]
                break
        _, box, _, chat, note = shown
        bubbles = [{"role": b["role"], "content": b["content"][0]["text"]} for b in chat["value"]]
        return bubbles, note if isinstance(note, str) else note.get("value", ""), box.get("value", "")


@pytest.mark.slow
def test_thirty_people_at_once_are_each_answered_or_told_to_wait_and_never_mixed_up(
    house: House, server: Server
) -> None:
    people = [Browser(server, f"person{number}") for number in range(30)]
    messages = [(f"I am number {number}.", "Who am I?") for number in range(30)]
    first: dict[int, Any] = {}
    errors: list[BaseException] = []

    def ask(number: int, text: str, into: dict[int, Any]) -> None:
        try:
            into[number] = people[number].send(text)
        except BaseException as error:
            errors.append(error)

    def everybody(who: list[int], turn: int, into: dict[int, Any]) -> list[threading.Thread]:
        threads = [threading.Thread(target=ask, args=(n, messages[n][turn], into)) for n in who]
        for thread in threads:
            thread.start()
        return threads

    house.gate.hold()  # nobody is answered until all have asked
    threads = everybody(list(range(30)), 0, first)
    until = time.monotonic() + PATIENCE
    while len(first) < 30 - 8 and not errors and time.monotonic() < until:
        time.sleep(0.05)
    assert not errors
    assert len(first) == 22, "eight have a place in the line, the others were told at once"
    for number, (bubbles, note, box) in first.items():
        assert "busy, please wait" in note
        assert bubbles == []
        assert box == messages[number][0], "the message is back in the box"
    refused = set(first)
    house.gate.open()
    for thread in threads:
        thread.join(PATIENCE)

    for turn in (0, 1):
        left = [n for n in range(30) if turn or n in refused]
        while left:  # who is told to wait asks again
            answered: dict[int, Any] = {}
            for thread in everybody(left, turn, answered):
                thread.join(PATIENCE)
            assert not errors
            left = [n for n in left if "busy, please wait" in answered[n][1]]
            first |= {n: answered[n] for n in answered if n not in left}
    expected = {n: dialogue(messages[n], house.alone(*messages[n], tokens=6)) for n in range(30)}
    assert {n: first[n][0] for n in range(30)} == expected
    assert len({said[3]["content"] for said in expected.values()}) > 10, "the same question, told apart by the history"
    assert len(house.host.line) == 0


def test_a_closed_page_lets_the_next_one_in(house: House, server: Server) -> None:
    house.gate.hold(3)
    leaver, stayer = Browser(server, "leaver"), Browser(server, "stayer")
    leaver.join("send", "Hi", None, *PLAIN)
    events = leaver.events()
    for event in events:
        if event["msg"] == "process_generating":
            break
    house.gate.wait_until_held()
    events.close()  # the connection is gone
    leaver.client.close()
    house.gate.open()
    assert stayer.send("Hello")[0] == dialogue(["Hello"], house.alone("Hello", tokens=6))
    assert len(house.host.line) == 0


def test_what_a_person_writes_is_escaped_and_what_is_wrong_is_said(house: House, server: Server) -> None:
    browser = Browser(server, "writer")
    nasty = "<img src=x onerror=alert(1)> & <script>"
    bubbles, _, _ = browser.send(nasty)
    assert bubbles[0]["content"] == "&lt;img src=x onerror=alert(1)&gt; &amp; &lt;script&gt;"
    assert bubbles[1]["content"] == house.alone(nasty, tokens=6)[0], "the model reads what was written"
    _, note, box = browser.send("x" * 9000)
    assert "9000 characters" in note
    assert len(box) == 9000
    bubbles, note, _ = browser.send("Hi", controls=["tuned", False, "", 6, 1, 0.9, 0, 1, "<b>x</b>"])
    assert "&lt;b&gt;" in note
    assert len(bubbles) == 2


@pytest.mark.parametrize(
    ("method", "path", "more", "status"),
    [
        ("POST", "/gradio_api/upload", {"files": {"files": b"x"}}, 404),
        ("GET", "/gradio_api/file=/etc/passwd", {}, 404),
        ("GET", "/gradio_api/proxy=http://example.org/", {}, 404),
        ("GET", "/gradio_api/runs", {}, 404),
        ("POST", "/gradio_api/queue/join", {"content": b"x" * 300_000}, 413),
        ("POST", "/gradio_api/queue/join", {"content": iter([b"x"])}, 411),
        ("GET", "/", {"headers": {"host": "evil.example:80"}}, 421),
        ("GET", "/", {"headers": {"host": "localhost"}}, 200),
    ],
)
def test_what_the_page_does_not_need_is_closed(
    server: Server, method: str, path: str, more: dict[str, Any], status: int
) -> None:
    answer = httpx.request(method, server.url.rstrip("/") + path, timeout=PATIENCE, **more)
    assert answer.status_code == status
    if status == 200:
        assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_the_queue_cannot_be_walked_around(house: House, server: Server) -> None:
    browser = Browser(server, "walker")
    body = {"data": ["Hi", None, *PLAIN], "session_hash": "walker"}
    answer = browser.client.post("/gradio_api/run/send", json=body)
    assert answer.status_code >= 400
    assert len(house.host.line) == 0


def test_a_token_is_asked_for() -> None:
    house = House()
    with served(house, token=TOKEN) as server:
        body = {"data": ["Hi", None, *PLAIN], "fn_index": 0, "session_hash": "x"}
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
            assert client.post("/gradio_api/queue/join", json=body).status_code == 401
            assert client.get("/config").status_code == 401
            wrong = client.post("/login", data={"username": "ada", "password": "guess"})
            assert wrong.status_code == 400
            assert client.get("/config").status_code == 401
            right = client.post("/login", data={"username": "ada", "password": TOKEN})
            assert right.status_code == 200
            assert client.get("/config").status_code == 200
            assert TOKEN not in client.get("/config").text


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_strangers_are_not_let_in_without_a_token(address: str) -> None:
    with pytest.raises(UsageError, match="--share-token"):
        serve(House().host, address=address)
    with pytest.raises(UsageError, match="too short"):
        serve(House().host, address=address, token="short")


def test_a_port_that_is_taken_is_a_message(house: House, server: Server) -> None:
    with pytest.raises(MinitunerError, match="another --port"):
        serve(house.host, port=int(server.url.rstrip("/").rpartition(":")[2]), say=lambda line: None)


@pytest.mark.slow
def test_the_command_refuses_before_it_loads_and_serves_until_it_is_interrupted(model_folder: Path) -> None:
    command = [sys.executable, "-m", "minituner", "web"]
    done = subprocess.run(
        [*command, "/nowhere", "--host", "0.0.0.0"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 2
    assert "--share-token" in done.stderr
    port = free_port()
    with subprocess.Popen(
        [*command, str(model_folder), "--port", str(port)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background jobs start with it ignored, and so do their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        try:
            lines = []
            for line in running.stderr:
                lines.append(line)
                if "Ctrl-C ends it" in line:
                    break
            assert f"http://127.0.0.1:{port}" in "".join(lines)
            assert httpx.get(f"http://127.0.0.1:{port}/", timeout=PATIENCE).status_code == 200
            running.send_signal(2)
            assert running.wait(PATIENCE) == 0, running.stderr.read()
        finally:
            running.kill()
