"""The console in a real browser, fed by a real worker on a real Kafka."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.broker import Broker, free_port
from tests.support.browser import Browser, chromium
from tests.support.process import WorkerProcess, Workers
from tests.support.topics import Kafka, Record, Topics
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka

DEADLINE_S = 180  # a worker and a browser start on a machine that may be busy
TOKEN = "a-token-of-these-tests"
DOT = "return getComputedStyle(document.querySelector('#flow .dead b'), '::before').content"
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
    each = ", ".join(f"{name} {value:.2f}" for name, value in result["probabilities"].items())
    score = f"{result['score']:+.2f}".replace("-", "−")
    assert f"{score}; {each}" in browser.texts("#results tbody tr td:nth-child(3)"), "read out with the score"
    titles = browser.run("return [...document.querySelectorAll('#results tbody td:nth-child(3)')].map(n => n.title)")
    assert each in titles, "shown beside the pointer"

    shows(browser, "[data-chart=mix] .key", f"{label} 100 %")
    drawn = browser.run("return [...document.querySelectorAll('.plot path')].map(path => path.getAttribute('d') || '')")
    assert sum(len(path) > 10 for path in drawn) >= 8, "the charts are drawn"
    settings = dict(
        zip(browser.texts("#settings td:first-child"), browser.texts("#settings td:last-child"), strict=True)
    )
    assert settings["group_id"] == topics.group
    assert settings["sasl_password"] == "–"
    assert "cpu" in browser.text("#model")
    assert "float32" in browser.text("#model")
    assert browser.text("#host") == socket.gethostname()
    assert browser.text("#group") == topics.group
    shows(browser, "#partitions", f"2: {topics.input} 0–1")
    assert browser.text("#up").endswith((" s)", " min)"))
    assert browser.text("#version")
    assert not browser.complaints()


def test_the_newest_are_there_when_the_page_is_loaded_again_and_fill_their_card(
    kafka: Kafka, topics: Topics, workers: Workers, browser: Browser
) -> None:
    kafka.create_all(topics, 1)
    worker = workers.start(topics).wait_until_assigned(1)
    look(browser, worker)
    assert browser.run(DOT) == "none", "without a dead letter nothing is red"
    browser.open("about:blank")
    kafka.send(topics.input, [*(event(number) for number in range(60)), *[Record(b"{broken")] * 60])
    wait_for(lambda: worker.metrics.outcomes == 120, "all outcomes while nobody looks", DEADLINE_S)
    look(browser, worker)
    shows(browser, "#letters tbody td:nth-child(2) .place", f"{topics.input}-0 @ 119")  # the last, by a second later
    assert len(browser.texts("#letters tbody tr")) == 50
    assert browser.texts("#results tbody td:nth-child(4)") == [f"e{number}" for number in range(59, 9, -1)]
    assert browser.run(DOT) != "none"
    gap = browser.run("""
        const list = document.querySelector("#results").parentElement, card = list.parentElement;
        return card.getBoundingClientRect().bottom - list.getBoundingClientRect().bottom;
    """)
    assert gap < 25, "no blank below the list but the card's own padding"
    assert not browser.complaints()


def test_what_is_not_known_is_grey_and_says_since_when(
    fragile_broker: Broker, topics: Topics, fragile_workers: Workers, browser: Browser
) -> None:
    kafka = Kafka(fragile_broker.bootstrap)
    kafka.create_all(topics, 1)
    worker = fragile_workers.start(topics).wait_until_assigned(1)
    look(browser, worker)
    kafka.send(topics.input, [event(1)])
    shows(browser, "#results tbody", "e1")
    wait_for(lambda: browser.text("[data-chart=lag] .value").strip() == "0", "a lag that is known", DEADLINE_S)
    colour = "return getComputedStyle(document.querySelector('[data-chart=lag] .value')).color"
    known = browser.run(colour)
    fragile_broker.pause()
    shows(browser, "[data-chart=lag] .value", "Not known since ")
    assert browser.run(colour) != known
    shows(browser, "[data-chart=latency] .value", "No result since ")
    shows(browser, "#flow", "lag not known, 1 partition")
    shows(browser, "#banner", "The worker has not been ready for ", "kafka: ")
    fragile_broker.resume()
    wait_for(lambda: browser.text("#status") == "ready", "the page to say ready", DEADLINE_S)
    wait_for(lambda: "Not known" not in browser.text("[data-chart=lag] .value"), "the lag", DEADLINE_S)
    wait_for(lambda: browser.run(colour) == known and not shown(browser, "#banner"), "all to be as before", DEADLINE_S)
    assert not browser.complaints()


def test_a_worker_that_says_nothing_is_told_with_since_when(topics: Topics, workers: Workers, browser: Browser) -> None:
    worker = workers.start(topics).wait_for_status("/livez", 200)
    browser.open(worker.url)
    shows(browser, "#status", "not ready")
    wait = "second({ ...now, sample: null }); return retry"
    assert browser.run(f"retry = 7; hello(about); {wait}") == 7, "a page that others drop again and again waits longer"
    assert browser.run(f"since -= 2 * LIVED_MS; {wait}") == 0, "one that was fed for long begins anew"
    worker.pause()
    shows(browser, "#banner", "The worker has not answered since ")
    assert browser.text("#status") == "no answer"
    worker.resume()
    shows(browser, "#banner", "The worker has not been ready for ")


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
    shows(browser, "#banner", "The worker has not answered since ", "The page is trying again.")
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
    shows(browser, "#why", "topics: ", topics.input)
    assert shown(browser, "#banner")
    shows(browser, "#status", "not ready")
    shows(browser, "#state", "The worker has not been ready for ")
    assert "docs/operating.md" in browser.text("#runbook") or browser.run(
        "return !!document.querySelector('#runbook a')"
    )
    assert browser.run("return document.querySelector('#why').getAttribute('role')") == "alert"
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
    if width < 600:
        for narrow in (width, 390):
            browser.emulate(width=narrow, height=800, scheme=scheme, reduced_motion=True)
            tops = "n => Math.round((n.getBoundingClientRect().top + n.getBoundingClientRect().bottom) / 10)"
            rows = browser.run(f"return [...document.querySelectorAll('h1, #status, #pause')].map({tops})")
            assert len(set(rows)) == 1, "name, state and button stand in one row"
            keys = browser.run("return [...document.querySelectorAll('.who dt')].map(n => n.getClientRects()[0].left)")
            assert len(set(keys)) == 1, "the lines of identity stand below each other"
    assert contrast(browser, "#status") >= 4.5
    assert contrast(browser, "#runbook") >= 4.5
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


def shown(browser: Browser, selector: str) -> bool:
    return bool(browser.run("return document.querySelector(arguments[0]).checkVisibility()", selector))


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
