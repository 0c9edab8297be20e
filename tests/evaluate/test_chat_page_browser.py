"""The page in a browser, as its user has it: with the keyboard, over several turns, on a small screen, with errors."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from page_models import PAGE_LIMITS, running_page, tiny_comparison
from serving_models import NAME, data_url, png

browser = pytest.importorskip("browser", reason="needs selenium (the extra dev)", exc_type=ImportError)
keys = pytest.importorskip("selenium.webdriver.common.keys").Keys

from aki_megatron.evaluate.chat_page.compared import Comparison  # noqa: E402
from aki_megatron.evaluate.chat_page.example import Example, ExampleQuestion  # noqa: E402

pytestmark = pytest.mark.skipif(bool(browser.missing_browser()), reason=browser.missing_browser())

FIRST, SECOND, THIRD = "Is the red cup left of it?", "And the dish?", "What is it?"
EXAMPLE = Example(png("blue", (40, 20)), "A blue box", (ExampleQuestion(SECOND, "yes"),))

COUNT_CHANGES = """
window.changes = 0;
new MutationObserver((seen) => { window.changes += seen.filter((one) => one.target.className === "text").length; })
    .observe(document.getElementById("log"), {subtree: true, childList: true});
"""
"""Count how often a text of an answer has grown: once for every piece of a stream."""

HAND_OVER = """
const [kind, name, content] = arguments;
const data = new DataTransfer();
data.items.add(new File([Uint8Array.from(content)], name, {type: "image/png"}));
document.dispatchEvent(kind === "paste" ? new ClipboardEvent(kind, {clipboardData: data, bubbles: true})
    : new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
"""
"""Drop a file on the page, or paste it."""

HEAT = """
const canvas = document.getElementById("heat");
return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.join();
"""


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return tiny_comparison(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser.chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


def picture_part(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content)}}


def answers(address: str, comparison: Comparison, messages: list[dict[str, Any]]) -> list[str]:
    """What the server answers to each model, not streamed."""
    bodies = [{"model": each.name, "messages": messages} for each in comparison.models]
    replies = [httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300).json() for body in bodies]
    return [reply["choices"][0]["message"]["content"] for reply in replies]


def ask(page: Any, question: str) -> None:
    """Type a question and press Enter; wait for both answers and for what follows them."""
    before = len(page.all(".turn"))
    page.one("#question").send_keys(question, keys.ENTER)
    page.until(lambda: len(page.all(".answer[aria-busy=false]")) == 2 * before + 2)
    page.until(lambda: page.one("#attention").get_attribute("aria-busy") == "false")


def shown_texts(page: Any, selector: str) -> list[str]:
    return [one.get_property("textContent") for one in page.all(selector)]


def test_a_picture_is_asked_about(comparison: Comparison, page: Any, tmp_path: Path) -> None:
    photo, huge = png("red", (64, 48)), tmp_path / "huge.png"
    (tmp_path / "cup.png").write_bytes(photo)
    huge.write_bytes(bytes(PAGE_LIMITS.body_bytes))
    with ExitStack() as server:
        address = server.enter_context(running_page(comparison, (EXAMPLE,)))
        page.resize(1200, 800)
        page.driver.get(address)
        page.until(lambda: page.all("#example-list button"))
        assert "which were trained with the attention rule mma" in page.text("#about")

        # errors in words, before anything was sent
        page.one("#question").send_keys(FIRST, keys.ENTER)
        assert "no picture yet" in page.text("#error")
        page.one("#question").clear()
        page.one("#file").send_keys(str(huge))
        page.until(lambda: "huge.png has 0.2 MiB; this server takes pictures of up to 0.1 MiB" in page.text("#error"))
        page.run(HAND_OVER, "drop", "text.png", list(b"no picture"))
        page.until(lambda: "text.png is no picture that a browser can show" in page.text("#error"))

        # first turn: streamed in both columns, the same as without streaming
        page.one("#file").send_keys(str(tmp_path / "cup.png"))
        page.until(lambda: page.one("#picture").is_displayed())
        assert page.one("#picture").get_attribute("alt") == "Your picture, cup.png"
        page.run(COUNT_CHANGES)
        ask(page, FIRST)
        assert page.text("#error") == ""
        content = [picture_part(photo), {"type": "text", "text": f"\n{FIRST}"}]
        first = [{"role": "user", "content": content}]
        expected = answers(address, comparison, first)
        assert shown_texts(page, ".answer .text") == expected and expected[0] != expected[1]
        assert shown_texts(page, ".answer .rule") == ["mma", "causal"]
        assert page.run("return window.changes") > 4
        assert page.run("return document.activeElement.id") == "question"

        # bars over words, heat for all of them and for one
        found = httpx.post(f"{address}/inspect", json={"model": NAME, "messages": first}, timeout=300).json()
        assert shown_texts(page, ".word:not(.all) .name") == [word["text"] for word in found["words"]]
        heights = [bar.size["height"] for bar in page.all(".bar i")]
        masses = [word["mass"] for word in found["words"]]
        assert heights.index(max(heights)) == masses.index(max(masses)) and min(heights) > 0
        whole = page.run(HEAT)
        page.one("#words").send_keys(keys.ARROW_RIGHT, keys.ARROW_RIGHT)
        assert page.text(".word[aria-selected=true] .name") == "the"
        assert '"the"' in page.text("#heat-text") == page.one("#heat").get_attribute("aria-label")[len("Heat: ") :]
        one = page.run(HEAT)
        assert len({whole, one}) == 2 and any(int(value) for value in one.split(",")[3::4])
        page.all(".word")[-1].click()
        assert page.text(".word[aria-selected=true] .name") == "?"
        page.one("#words").send_keys(keys.ESCAPE)
        assert page.text(".word[aria-selected=true] .name") == "All words"

        # causal: the tokens of the picture see none of it
        page.all("#rules label")[1].click()
        page.until(lambda: "every bar is 0" in page.text("#attention-note"))
        assert {bar.size["height"] for bar in page.all(".bar i")} == {0}
        page.all("#rules label")[0].click()
        page.until(lambda: "every bar is 0" not in page.text("#attention-note"))

        # further turns: each model has its own answers before it; the picture once, or again
        ask(page, SECOND)
        for number, model in enumerate(comparison.models):
            history = [*first, {"role": "assistant", "content": expected[number]}]
            history.append({"role": "user", "content": SECOND})
            body = {"model": model.name, "messages": history}
            reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300).json()
            assert shown_texts(page, ".answer .text")[2 + number] == reply["choices"][0]["message"]["content"]
        assert "question 1 of 2" in page.text("#attention-note")
        page.one("#history").send_keys("the conversation before it, and")
        ask(page, THIRD)
        assert shown_texts(page, ".word:not(.all) .name") == ["What", "is", "it", "?"]
        page.one("#history").send_keys("the picture only")
        ask(page, FIRST)
        assert shown_texts(page, ".answer .text")[-2:] == expected
        page.one("#instruction").send_keys("Be brief.")
        ask(page, THIRD)
        assert shown_texts(page, ".word.given .name") == ["Be", "brief", "."]
        assert shown_texts(page, ".word:not(.all, .given) .name") == ["What", "is", "it", "?"]
        content = [picture_part(photo), {"type": "text", "text": f"\nBe brief. {THIRD}"}]
        brief = answers(address, comparison, [{"role": "user", "content": content}])
        assert shown_texts(page, ".answer .text")[-2:] == brief

        # a small screen, with all of it on the page
        page.resize(360, 640)
        assert page.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.run("return document.documentElement.clientWidth") <= 360
        assert [log["message"] for log in page.driver.get_log("browser") if log["level"] == "SEVERE"] == []

        # another picture begins another conversation; the server ends meanwhile
        page.run(HAND_OVER, "paste", "pasted.png", list(photo))
        page.until(lambda: page.one("#picture").get_attribute("alt") == "Your picture, pasted.png")
        page.all("#example-list button")[0].click()
        page.until(lambda: page.one("#picture").get_attribute("alt") == "A blue box")
        assert page.all(".turn") == [] and not page.one("#attention").is_displayed()
        page.all("#suggestions button")[0].click()
        server.close()
        page.one("#question").send_keys(keys.ENTER)
        page.until(lambda: "The server does not answer" in page.text("#error"))
        assert page.one("#question").get_property("value") == SECOND  # to be asked once more
        page.until(lambda: "The attention cannot be shown" in page.text("#attention-note"))


def test_escape_stops_an_answer(comparison: Comparison, page: Any) -> None:
    with ExitStack() as stack:
        served: list[Any] = []
        address = stack.enter_context(running_page(comparison, (EXAMPLE,), served))
        page.driver.get(address)
        page.until(lambda: page.all("#example-list button"))[0].click()
        page.until(lambda: page.all("#suggestions button"))[0].click()
        go_on = threading.Event()
        stack.callback(go_on.set)
        for backend in served:  # no token comes until then
            backend.service.call(lambda _: go_on.wait(browser.SECONDS), lambda result, error: None)
        page.one("#question").send_keys(keys.ENTER)
        page.until(lambda: page.all(".answer[aria-busy=true]"))
        page.one("#question").send_keys("Another", keys.ENTER)
        assert "Press Escape to stop it" in page.text("#error")
        page.one("#question").send_keys(keys.ESCAPE)
        page.until(lambda: len(page.all(".answer[aria-busy=false]")) == 2)
        assert shown_texts(page, ".answer .state") == ["stopped", "stopped"]
        go_on.set()
        page.until(lambda: page.all(".word"))
