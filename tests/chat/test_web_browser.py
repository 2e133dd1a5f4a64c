"""The page in a real Chromium: what a person sees and clicks, on a screen and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from minituner.chat.web import Server
from tests.chat.web_site import CHROMIUM, PATIENCE, TOKENS, House, served

pytest.importorskip("gradio", reason="gradio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"),
]

BOT, USER = ".message.bot", ".message.user"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def house() -> House:
    return House()


@pytest.fixture(scope="module")
def server(house: House) -> Iterator[Server]:
    with served(house) as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage"],
        )
        yield browser
        browser.close()


class Person:
    """Somebody in front of the page; every request and every error of the page is kept."""

    def __init__(self, chromium: Any, url: str, **size: int) -> None:
        self.page = chromium.new_context(viewport=size or {"width": 1000, "height": 800}).new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.asked, self.errors = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        self.page.goto(url)
        self.page.wait_for_selector("#box textarea")

    def send(self, text: str) -> None:
        self.page.fill("#box textarea", text)
        self.page.press("#box textarea", "Enter")

    def sees(self, selector: str, text: str) -> None:
        """Wait until the page shows `text` there, and nothing else."""
        playwright.expect(self.page.locator(selector).last).to_have_text(text, timeout=PATIENCE * 1000)

    def sees_all(self, selector: str, texts: list[str]) -> None:
        """Wait until the page shows exactly these texts there, in this order."""
        playwright.expect(self.page.locator(selector)).to_have_text(texts, timeout=PATIENCE * 1000)

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def idle(self) -> None:
        self.page.wait_for_selector("#box button:has-text('Send')")

    def leave(self) -> None:
        self.page.context.close()


@pytest.fixture
def people(chromium: Any, server: Server, house: House) -> Iterator[list[Person]]:
    """Two people in front of the page."""
    both = [Person(chromium, server.url) for _ in range(2)]
    yield both
    house.gate.open()
    for person in both:
        person.leave()


def test_a_conversation_again_and_a_new_one(people: list[Person], house: House, server: Server) -> None:
    ada = people[0]
    answers = house.alone("Hello", "And you?")
    ada.send("Hello")
    ada.sees(f"#chat {BOT}", answers[0])
    ada.idle()
    assert ada.page.input_value("#box textarea") == ""
    ada.send("And you?")
    ada.sees_all(f"#chat {USER}", ["Hello", "And you?"])
    ada.sees_all(f"#chat {BOT}", answers)
    ada.idle()
    house.gate.hold(6)
    ada.page.click("#again")
    house.gate.wait_until_held()
    # The old answer has to be gone from the page before the new one, which is equal, can be waited for.
    ada.page.wait_for_selector("#box button:has-text('Stop')")
    playwright.expect(ada.page.locator(f"#chat {BOT}").last).not_to_have_text(answers[1], timeout=PATIENCE * 1000)
    house.gate.open()
    ada.sees_all(f"#chat {BOT}", answers)
    ada.idle()
    ada.sees_all(f"#chat {BOT}", answers)
    ada.page.click("#clear")
    playwright.expect(ada.page.locator(f"#chat {BOT}")).to_have_count(0)
    ada.send("Hello")
    ada.sees(f"#chat {BOT}", answers[0])
    assert not [url for url in ada.asked if not url.startswith((server.url, "data:", "blob:"))], "nothing from outside"
    assert not ada.errors


def test_the_answer_is_seen_while_it_grows_and_stop_keeps_it(people: list[Person], house: House) -> None:
    ada, (whole,) = people[0], house.alone("Hello")
    house.gate.hold(6)
    ada.send("Hello")
    house.gate.wait_until_held()
    ada.page.wait_for_selector(f"#chat {BOT}")
    ada.page.wait_for_function(f"document.querySelector('#chat {BOT}').innerText.trim().length >= 5")
    (growing,) = ada.texts(f"#chat {BOT}")
    assert whole.startswith(growing)
    assert len(growing) <= 6, "the model is held there"
    with ada.page.expect_response("**/run/predict"):
        ada.page.click("#box button:has-text('Stop')")
    house.gate.open()
    ada.sees("#note", "stopped")
    ada.idle()
    (kept,) = ada.texts(f"#chat {BOT}")
    assert whole.startswith(kept)
    assert 5 <= len(kept) < TOKENS
    ada.send("More")
    ada.page.wait_for_function(f"document.querySelectorAll('#chat {BOT}').length == 2")
    ada.idle()


def test_two_people_at_once_and_the_second_is_told_to_wait(people: list[Person], house: House) -> None:
    ada, bo = people
    house.gate.hold(2)
    ada.send("I am Ada.")
    house.gate.wait_until_held()
    bo.send("I am Bo.")
    bo.sees("#note", "please wait: 1 message is answered before yours")
    house.gate.open()
    for person, message in ((ada, "I am Ada."), (bo, "I am Bo.")):
        person.sees(f"#chat {BOT}", house.alone(message)[0])
        person.idle()
    for person, message in ((bo, "I am Bo."), (ada, "I am Ada.")):
        person.send("Who am I?")
        person.sees(f"#chat {BOT}", house.alone(message, "Who am I?")[1])
        person.sees_all(f"#chat {USER}", [message, "Who am I?"])


def test_a_full_line_gives_the_message_back(people: list[Person], house: House) -> None:
    ada = people[0]
    places = [house.host.line.enter() for _ in range(house.host.line.capacity)]
    ada.send("Hello")
    ada.page.wait_for_function("document.querySelector('#note').innerText.includes('busy, please wait')")
    ada.idle()  # a line pressed before the first is answered to the end is lost
    assert ada.page.input_value("#box textarea") == "Hello"
    for place in places:
        place.leave()
    ada.page.press("#box textarea", "Enter")
    ada.sees(f"#chat {BOT}", house.alone("Hello")[0])


def test_base_and_tuned_side_by_side(people: list[Person], house: House) -> None:
    ada = people[0]
    assert not ada.page.is_visible("#beside")
    ada.page.click("#settings button")
    ada.page.check("#compare input")
    ada.page.wait_for_selector("#beside")
    ada.send("Hello")
    ada.sees(f"#beside {BOT}", house.alone("Hello", adapter="base")[0])
    ada.sees(f"#chat {BOT}", house.alone("Hello")[0])
    left, right = (ada.page.locator(name).bounding_box() for name in ("#beside", "#chat"))
    assert left["x"] + left["width"] <= right["x"], "side by side"
    assert abs(left["y"] - right["y"]) < 2
    ada.idle()
    ada.page.uncheck("#compare input")
    ada.page.wait_for_selector("#beside", state="hidden")
    ada.page.click("#adapter label:has-text('base')")
    ada.send("Hi")
    ada.sees_all(f"#chat {BOT}", [house.alone("Hello")[0], house.alone("Hello", "Hi", adapter="base")[1]])
    playwright.expect(ada.page.locator("#chat label").first).to_contain_text("base", timeout=PATIENCE * 1000)


@pytest.mark.parametrize(
    "text",
    [
        "<script>window.hit = 1; alert(1)</script>",
        '<img src="x" onerror="window.hit = 1"> <b>bold</b>',
        "**md** [a](javascript:alert(1)) &lt;b&gt; $x^2$ `c`",
        "# two:\n\n    lines   你好\n        deeper\n\tlast",
    ],
)
def test_what_is_written_stays_text(people: list[Person], house: House, text: str) -> None:
    ada = people[0]
    ada.send(text)
    ada.sees(f"#chat {BOT}", house.alone(text)[0])
    assert ada.texts(f"#chat {USER}") == [text]
    inside = ada.page.locator("#chat .message-wrap")
    assert inside.locator("script, img, b, strong, a, code").count() == 0
    assert ada.page.evaluate("window.hit") is None
    assert not ada.errors


def test_what_a_model_writes_stays_text_too(people: list[Person], house: House) -> None:
    ada, said = people[0], "<b><script>h=1</script>"
    ids = iter([*house.loaded.tokenizer(said).input_ids, house.loaded.tokenizer.eos_token_id])
    assert len(said) < TOKENS  # else the answer is cut

    def dictate(_: Any, __: Any, output: Any) -> Any:
        output.logits[..., -1, :] = 0
        output.logits[..., -1, next(ids)] = 100
        return output

    hook = house.loaded.model.register_forward_hook(dictate)
    try:
        ada.send("Hello")
        ada.sees(f"#chat {BOT}", said)
    finally:
        hook.remove()
    assert ada.page.locator("#chat .message-wrap").locator("script, b").count() == 0
    assert ada.page.evaluate("window.hit") is None


def test_a_phone_needs_no_sideways_scrolling(chromium: Any, server: Server, house: House) -> None:
    ada = Person(chromium, server.url, **PHONE)
    wide = "[document.documentElement.scrollWidth, document.body.scrollWidth, window.innerWidth]"
    ada.page.click("#settings button")
    ada.page.check("#compare input")
    ada.send("x" * 200)
    ada.sees(f"#chat {BOT}", house.alone("x" * 200)[0])
    assert ada.page.evaluate(wide) == [390, 390, 390]
    above, below = (ada.page.locator(name).bounding_box() for name in ("#beside", "#chat"))
    assert above["y"] + above["height"] <= below["y"], "one above the other"
    for name in ("#chat", "#beside", "#box", "#again", "#clear", "#system", "#settings"):
        box = ada.page.locator(name).bounding_box()
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= 390, name
    bubble = ada.page.locator(f"#chat {USER}").bounding_box()
    assert bubble["x"] + bubble["width"] <= 390, "a long word is broken"
    ada.leave()


def test_the_token_is_the_password(chromium: Any) -> None:
    house = House()
    with served(house, token="a-long-secret") as server:
        page = chromium.new_context().new_page()
        page.set_default_timeout(PATIENCE * 1000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        page.wait_for_selector("input[type=password]")
        assert page.locator("#box").count() == 0
        page.fill("input >> nth=0", "ada")
        page.fill("input[type=password]", "a-long-secret")
        page.click("button:has-text('Login')")
        page.wait_for_selector("#box textarea")
        page.fill("#box textarea", "Hello")
        page.press("#box textarea", "Enter")
        playwright.expect(page.locator(f"#chat {BOT}")).to_have_text(house.alone("Hello")[0], timeout=PATIENCE * 1000)
        assert not [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]
        page.context.close()
