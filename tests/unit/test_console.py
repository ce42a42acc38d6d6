"""The console without a browser: what it tells, to whom, and what a client that does not listen can do."""

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import aiohttp
import pytest
from aiokafka import ConsumerRecord

from worker.core.events import Decoder, Failure
from worker.core.sentiment import Sentiment
from worker.http import console as console_module
from worker.http.access import AccessControl
from worker.http.console import KEPT, PAGE, Console, Tap, content_security_policy, shown_settings
from worker.http.server import Server
from worker.settings import RunSettings, load
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

RUNBOOK = "https://docs.example/operating.md#what-to-do"
SECRET = "a-token-that-nobody-may-see"
GOOD = Sentiment("positive", 0.75, (0.1, 0.2, 0.85))
BAD = Failure("decode", "invalid_json", "the value is not JSON at character 0")


class Outcome(NamedTuple):
    record: Any
    failure: Failure | None
    sentiment: Sentiment | None


def outcome(number: int, *, value: bytes | None = None, failure: Failure | None = None) -> Outcome:
    value = value or json.dumps({"id": f"e{number}", "text": f"текст {number}"}).encode()
    sent_at = round(1000 * time.time()) - 1_000
    record = ConsumerRecord("texts", 3, number, sent_at, 0, None, value, None, 0, len(value), [])
    return Outcome(record, failure, None if failure else GOOD)


def tap(*, texts: bool = False) -> Tap:
    return Tap(Decoder(), texts=texts)


def ids(rows: Iterable[list[Any]]) -> list[str]:
    return [row[1] for row in rows]


# What is taken from the pipeline.


def test_a_result_is_told_with_its_probabilities_and_without_its_text() -> None:
    taker = tap()
    taker([outcome(1)])
    ((_, id, label, score, probabilities, latency_ms, text),), letters = taker.take()
    assert (id, label, score, text) == ("e1", "positive", 0.75, None)
    assert probabilities == [0.1, 0.2, 0.85]
    assert latency_ms > 0
    assert not letters
    assert taker.take() == ([], []), "told once"
    assert len(taker.results) == 1, "kept for the next page"


def test_a_latency_that_cannot_be_right_is_not_told() -> None:
    taker = tap()
    told = outcome(1)
    taker([told._replace(record=replace(told.record, timestamp=1_795_428_000))])  # in seconds
    ((*_, latency_ms, _),), _ = taker.take()
    assert latency_ms is None


def test_texts_are_told_where_they_are_switched_on_and_cut() -> None:
    taker = tap(texts=True)
    taker([outcome(1), outcome(2, value=json.dumps({"id": "e2", "text": "я" * 1_000}).encode())])
    results, _ = taker.take()
    assert results[0][-1] == "текст 1"
    assert results[1][-1] == "я" * 240 + "…"


def test_a_dead_letter_is_told_with_its_place_and_reason() -> None:
    taker = tap()
    taker([outcome(7, value=b"{broken", failure=BAD)])
    results, ((_, place, stage, reason, message),) = taker.take()
    assert not results
    assert (place, stage, reason, message) == ("texts-3 @ 7", "decode", "invalid_json", BAD.message)


def test_the_last_of_each_are_kept_however_many_come_at_once() -> None:
    taker = tap()
    for begin in range(0, 5_000, 100):
        taker([outcome(number, failure=BAD if number % 2 else None) for number in range(begin, begin + 100)])
    taker.take()
    assert ids(taker.results) == [f"e{number}" for number in range(4_900, 5_000, 2)]
    assert ids(taker.letters) == [f"texts-3 @ {number}" for number in range(4_901, 5_001, 2)]
    taker([outcome(number, failure=BAD) for number in range(5_000, 5_100)])
    taker.take()
    assert len(taker.results) == len(taker.letters) == KEPT, "failures alone drive no result out"


def test_few_bytes_of_records_are_held_until_they_are_read() -> None:
    taker = tap()
    large = json.dumps({"id": "large", "text": "x", "more": "y" * (console_module.HELD_BYTES // 3)}).encode()
    taker([outcome(number, value=large) for number in range(40)])
    assert sum(len(record.value or b"") for record, *_ in taker._fresh_results) <= console_module.HELD_BYTES
    taker.take()
    assert not taker._fresh_results
    taker([outcome(1, value=large)])
    assert ids(taker.take()[0]) == ["large"], "the newest is told whatever its size"


# The page.


def test_the_page_is_small_and_asks_nobody_else() -> None:
    page = PAGE.read_text()
    assert len(PAGE.read_bytes()) < 40_000
    assert set(re.findall(r"https?://[\w.]+", page)) == {"http://www.w3.org"}, "the namespace of SVG alone"
    assert not re.search(r"\ssrc=|@import|url\(|\sstyle=|\son\w+=|innerHTML|eval\(", page)


def test_the_policy_lets_the_pages_own_script_run_and_no_other() -> None:
    policy = content_security_policy(PAGE.read_text())
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    other = content_security_policy(PAGE.read_text().replace('"use strict"', '"use strict "'))
    assert other != policy


def test_settings_are_shown_without_secrets() -> None:
    settings = load(RunSettings, ["--group-id", "mine"], "test", {"WORKER_HTTP_TOKEN": SECRET})
    shown = shown_settings(settings)
    assert shown["group_id"] == "mine"
    assert shown["http_token"] == "(hidden)"
    assert SECRET not in repr(shown)


# The stream.


class ServerUnderTest:
    def __init__(self) -> None:
        self.metrics, self.health, self.tap = Metrics("test"), Health(), Tap(Decoder(), texts=False)
        settings = load(RunSettings, [], "test", {"WORKER_HTTP_TOKEN": SECRET})
        self.console = Console(
            self.metrics, self.health, self.tap, shown_settings(settings), version="1.2.3", runbook=RUNBOOK
        )
        access = AccessControl(self.metrics, token=SECRET)
        self.http = Server(self.health, self.metrics, access, host="127.0.0.1", port=0, routes=[self.console])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.port}"


@pytest.fixture
async def server() -> AsyncIterator[ServerUnderTest]:
    server = ServerUnderTest()
    await server.http.start()
    yield server
    await server.http.stop()


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as client:
        yield client


async def message(answer: aiohttp.ClientResponse) -> tuple[str, Any]:
    kind = (await answer.content.readline()).decode().removeprefix("event: ").strip()
    data = json.loads((await answer.content.readline()).decode().removeprefix("data: "))
    assert await answer.content.readline() == b"\n"
    return kind, data


async def second_with(answer: aiohttp.ClientResponse, name: str) -> Any:
    """The first second that has something of this name."""
    while True:
        kind, data = await message(answer)
        assert kind == "second"
        if data[name]:
            return data[name]


async def test_the_page_comes_with_its_policy(server: ServerUnderTest, client: aiohttp.ClientSession) -> None:
    async with client.get(server.url + "/") as answer:
        assert answer.status == 200
        assert answer.content_type == "text/html"
        assert "script-src 'sha256-" in answer.headers["Content-Security-Policy"]
        assert await answer.read() == PAGE.read_bytes()


async def test_the_stream_begins_with_everything_and_goes_on_with_seconds(
    server: ServerUnderTest, client: aiohttp.ClientSession
) -> None:
    server.health.not_ready("model", "loading")
    async with client.get(server.url + "/events") as answer:
        kind, data = await message(answer)
        assert (kind, data["version"], data["not_ready"]["reason"]) == ("hello", "1.2.3", "model: loading")
        assert (data["host"], data["runbook"]) == (socket.gethostname(), RUNBOOK)
        assert time.time() - 60 < data["started_at"] <= time.time()
        assert data["settings"]["output_topic"] == "sentiment"
        assert SECRET not in repr(data)
        server.tap([outcome(5), outcome(6, failure=BAD)])
        results = await second_with(answer, "results")
        assert [result[1] for result in results] == ["e5"]
    async with client.get(server.url + "/events") as answer:
        kind, data = await message(answer)
        assert kind == "hello"
        assert [result[1] for result in data["results"]] == ["e5"], "there at once when the page is loaded again"
        assert data["letters"][0][3] == "invalid_json"
        assert data["history"], "the last minutes too"


async def test_what_came_while_nobody_looked_is_there_for_the_next_page(
    server: ServerUnderTest, client: aiohttp.ClientSession
) -> None:
    server.tap([*map(outcome, range(60)), *(outcome(number, failure=BAD) for number in range(60, 120))])
    for second in range(60):
        server.console._show(float(second))
    async with client.get(server.url + "/events") as answer:
        _, data = await message(answer)
    assert ids(data["results"]) == [f"e{number}" for number in range(10, 60)]
    assert ids(data["letters"]) == [f"texts-3 @ {number}" for number in range(70, 120)]


async def test_why_and_for_how_long_the_worker_is_not_ready(server: ServerUnderTest) -> None:
    def not_ready_at(second: float) -> Any:
        server.console._show(second)
        return server.console._snapshot([], [])["not_ready"]

    assert not_ready_at(1) is None
    server.health.not_ready("group", "not joined yet")
    assert not_ready_at(2) == {"reason": "group: not joined yet", "for_s": 0, "is_failing": False}
    server.health.failing("kafka", "no broker answers")
    assert not_ready_at(62.5) == {"reason": "kafka: no broker answers", "for_s": 60, "is_failing": True}
    server.health.working("kafka")
    server.health.working("group")
    assert not_ready_at(63) is None
    server.health.failing("kafka", "no broker answers")
    assert not_ready_at(64)["for_s"] == 0


async def test_it_says_which_partitions_it_has_and_whose_lag_is_not_known(server: ServerUnderTest) -> None:
    metrics = server.metrics
    metrics.assigned_partitions.set(3)
    for partition in (0, 1, 4):
        metrics.lag("texts", partition, 10, 1)
    server.console._show(1.0)
    snapshot = server.console._snapshot([], [])
    assert snapshot["partitions"] == "texts 0–1, 4"
    assert snapshot["lag"] == {"unknown": 0, "since": None, "known": 30}
    metrics.forget_partition("texts", 1)
    server.console._show(2.0)
    snapshot = server.console._snapshot([], [])
    assert (snapshot["lag"]["unknown"], snapshot["lag"]["known"]) == (1, 20)
    assert snapshot["lag"]["since"] == pytest.approx(time.time(), abs=30)
    assert snapshot["sample"].lag_records is None, "a part of the lag is not shown as all of it"


async def test_one_viewer_too_many_takes_the_place_of_the_oldest(
    server: ServerUnderTest, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_module, "VIEWERS", 2)
    async with client.get(server.url + "/events") as oldest, client.get(server.url + "/events") as second:
        assert (await message(oldest))[0] == (await message(second))[0] == "hello"
        async with client.get(server.url + "/events") as newest:
            assert (await message(newest))[0] == "hello"
            with pytest.raises(aiohttp.ClientError):
                await oldest.read()
            assert (await message(second))[0] == (await message(newest))[0] == "second"
            assert len(server.console._viewers) == 2


async def test_nothing_is_rendered_while_nobody_looks(server: ServerUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: Sequence[Any]) -> dict[str, Any]:
        raise AssertionError("rendered for nobody")

    monkeypatch.setattr(server.console, "_snapshot", snapshot)
    for second in range(3):
        server.console._show(float(second))
    assert len(server.console._statistics.history) >= 3, "the history is kept all the same"


async def test_a_client_that_does_not_read_is_skipped_then_dropped_and_holds_nobody_up(
    server: ServerUnderTest, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler = "x" * 400_000  # a page's second is a thousand bytes; this fills a socket at once
    monkeypatch.setattr(server.console, "_snapshot", lambda *_: {"filler": filler})
    monkeypatch.setattr(console_module, "STUCK_S", 2)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        slow.connect(("127.0.0.1", server.http.port))
        slow.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with client.get(server.url + "/events") as answer:
            await message(answer)
            async with asyncio.timeout(30):
                while len(server.console._viewers) < 2:
                    server.console._show(0.0)
                    await message(answer)
                while len(server.console._viewers) == 2:
                    server.console._show(0.0)
                    assert (await message(answer))[0] == "second", "who reads goes on"
            server.console._show(0.0)
            assert (await message(answer))[0] == "second"


async def test_the_end_of_the_worker_ends_the_stream(client: aiohttp.ClientSession) -> None:
    server = ServerUnderTest()
    await server.http.start()
    async with client.get(server.url + "/events") as answer:
        await message(answer)
        await server.http.stop()
        async with asyncio.timeout(10):
            await answer.content.read()
