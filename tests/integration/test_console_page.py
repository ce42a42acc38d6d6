"""The console in a real browser, fed by a real worker on a real Kafka."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.broker import free_port
from tests.browser import Browser, chromium
from tests.process import WorkerProcess, Workers
from tests.topics import Kafka, Record, Topics
from tests.waiting import wait_for

pytestmark = pytest.mark.kafka

DEADLINE_S = 180  # a worker and a browser start on a machine that may be busy
TOKEN = "a-token-of-these-tests"
MARKUP = "<img src=x onerror=alert(1)> <b>хорошо</b>"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with chromium(tmp_path / "profile") as browser:
        browser.emulate(width=1280, height=900, scheme="light")
        yield browser


def event(number: int, text: str = "всё хорошо") -> Record:
    return Record(json.dumps({"id": f"e{number}", "text": text}).encode())


def shows(browser: Browser, selector: str, *words: str, seconds: float = DEADLINE_S) -> None:
    wait_for(
        lambda: all(word in browser.text(selector) for word in words),
        f"{selector} to show {words}",
        seconds,
        describe=lambda: browser.text(selector)[:500],
    )


def look(browser: Browser, worker: WorkerProcess) -> None:
    browser.open(worker.url)
    wait_for(lambda: browser.text("#status") == "ready", "the page to say ready", DEADLINE_S)


def test_it_shows_what_was_sent(kafka: Kafka, topics: Topics, workers: Workers, browser: Browser) -> None:
    kafka.create_all(topics, 2)
    worker = workers.start(topics).wait_until_assigned(2)
    look(browser, worker)
    kafka.send(topics.input, [event(number, MARKUP) for number in range(3)])
    kafka.send(topics.input, [Record(b"{broken")])
    shows(browser, "#results tbody", "e0", "e1", "e2")
    assert MARKUP not in browser.text("#results"), "texts are not shown unless asked for"
    shows(browser, "#letters tbody", "invalid_json", "not JSON", topics.input)
    shows(browser, "#reasons", "invalid_json1")
    shows(browser, "#flow", topics.input, topics.output, topics.dead_letters, "3 results", "1 dead letter", "lag 0")
    shows(browser, "#counts", "4 consumed = 3 results + 1 dead letters + 0 tombstones + 0 skipped")
    label = browser.text("#results tbody tr td:nth-child(2)")
    assert label in ("negative", "neutral", "positive")
    result = json.loads(kafka.read(topics.output)[0].value or b"")
    assert f"{result['score']:+.2f}".replace("-", "−") in browser.texts("#results tbody tr td:nth-child(3)")

    shows(browser, "[data-chart=mix] .key", f"{label} 100 %")
    drawn = browser.run("return [...document.querySelectorAll('.plot path')].map(path => path.getAttribute('d') || '')")
    assert sum(len(path) > 10 for path in drawn) >= 8, "the charts are drawn"
    settings = dict(
        zip(browser.texts("#settings td:first-child"), browser.texts("#settings td:last-child"), strict=True)
    )
    assert settings["group_id"] == topics.group
    assert settings["sasl_password"] == "–"
    assert browser.text("#model").endswith("cpu · float32")
    assert not browser.complaints()


def test_texts_are_shown_as_text_where_they_are_switched_on(
    kafka: Kafka, topics: Topics, workers: Workers, browser: Browser
) -> None:
    kafka.create_all(topics, 1)
    variables = {"WORKER_CONSOLE_TEXTS": "true", "WORKER_HTTP_TOKEN": TOKEN}
    worker = workers.start(topics, variables=variables).wait_until_assigned(1)
    look(browser, worker)
    kafka.send(topics.input, [event(1, MARKUP)])
    shows(browser, "#results tbody .text", MARKUP)
    assert browser.run("return document.querySelectorAll('#results img, #results b').length") == 0
    shows(browser, "#settings", "http_token(hidden)")
    assert TOKEN not in browser.text("html")
    assert not browser.complaints()


def test_it_goes_on_after_a_restart_of_the_worker(
    kafka: Kafka, topics: Topics, workers: Workers, browser: Browser
) -> None:
    kafka.create_all(topics, 1)
    port = free_port()
    worker = workers.start(topics, http_port=port).wait_until_assigned(1)
    look(browser, worker)
    kafka.send(topics.input, [event(1)])
    shows(browser, "#results tbody", "e1")
    browser.run("window.isTheSamePage = true")
    assert not browser.complaints()

    assert worker.terminate() == 0
    shows(browser, "#status", "trying again")
    again = workers.start(topics, http_port=port)
    wait_for(lambda: browser.text("#status") == "ready", "the new worker", DEADLINE_S)
    kafka.send(topics.input, [event(2)])
    shows(browser, "#results tbody", "e2")
    assert browser.run("return window.isTheSamePage") is True, "nobody has to load it again"
    assert not browser.complaints(network=False)
    assert again.terminate() == 0


def test_it_says_why_the_worker_is_not_ready(topics: Topics, workers: Workers, browser: Browser) -> None:
    """Topics that are not there; and in the beginning the model that still loads."""
    worker = workers.start(topics).wait_for_status("/livez", 200)
    browser.open(worker.url)
    shows(browser, "#status", "not ready: ", topics.input)
    assert browser.run("return document.querySelector('#status').getAttribute('role')") == "status"
    assert not browser.complaints()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_every_screen_in_light_and_dark(
    topics: Topics, workers: Workers, browser: Browser, scheme: str, width: int
) -> None:
    worker = workers.start(topics).wait_for_status("/livez", 200)
    browser.emulate(width=width, height=800, scheme=scheme, reduced_motion=True)
    browser.open(worker.url)
    shows(browser, "#status", "not ready")
    browser.run("for (const each of document.querySelectorAll('details')) each.open = true")
    assert browser.run("return document.documentElement.scrollWidth") <= width, "nothing is beyond the right edge"
    assert contrast(browser, "#status") >= 4.5
    assert contrast(browser, "h2") >= 4.5
    assert contrast(browser, ".axis span") >= 4.5
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) < 0.2) == (scheme == "dark")
    assert not browser.complaints()


def test_the_keyboard_reaches_everything(kafka: Kafka, topics: Topics, workers: Workers, browser: Browser) -> None:
    kafka.create_all(topics, 1)
    worker = workers.start(topics).wait_until_assigned(1)
    look(browser, worker)
    shows(browser, "[data-chart=rate] .value", "0")
    chart = "[data-chart=rate] .plot"
    browser.press(chart, "\ue012", "\ue012")  # arrow left, twice: ten seconds ago
    spoken = browser.run("return document.querySelector(arguments[0]).getAttribute('aria-label')", chart)
    assert "events per second" in spoken
    assert "at " in browser.text("[data-chart=rate] .value")
    browser.press("#pause", "\ue007")
    shows(browser, "#status", "paused")
    browser.press("#pause", "\ue007")
    shows(browser, "#status", "ready")
    browser.press("#numbers summary", "\ue007")
    wait_for(lambda: browser.run("return document.querySelector('#numbers').open"), "the table to open")
    names = "[...document.querySelectorAll('button, a, summary, [tabindex=\"0\"]')]"
    nameless = browser.run(
        f"return {names}.filter(n => !(n.textContent.trim() || n.getAttribute('aria-label'))).length"
    )
    assert nameless == 0, "everything that takes the focus has a name"
    assert not browser.complaints()


def test_a_tab_that_nobody_sees_asks_for_nothing(topics: Topics, workers: Workers, browser: Browser) -> None:
    worker = workers.start(topics).wait_for_status("/livez", 200)
    browser.open(worker.url)
    shows(browser, "#status", "not ready")
    hide = "Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});"
    tell = "document.dispatchEvent(new Event('visibilitychange')); return stream === null"
    assert browser.run(hide + tell, True) is True
    assert browser.run(hide + tell, False) is False


def contrast(browser: Browser, selector: str) -> float:
    """WCAG's ratio of an element's text to what is behind it."""
    script = """
        let node = document.querySelector(arguments[0]);
        const color = getComputedStyle(node).color;
        while (getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)") node = node.parentElement;
        return [color, getComputedStyle(node).backgroundColor];
    """
    light, dark = sorted((luminance(color) for color in browser.run(script, selector)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    """Of ``rgb(r, g, b)``, as WCAG has it."""
    channels = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
