"""The console without a browser: what it tells, to whom, and what a client that does not listen can do."""

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import aiohttp
import pytest

from tests.support.outcomes import BAD, outcome
from worker.core.decoder import Decoder
from worker.http import console as console_module
from worker.http.access import AccessControl
from worker.http.console import PAGE, Console, content_security_policy, shown_settings
from worker.http.recent_outcomes import RecentOutcomes
from worker.http.server import Server
from worker.settings.run import RunSettings
from worker.settings.sources import load
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

RUNBOOK = "https://docs.example/operating.md#what-to-do"
SECRET = "a-token-that-nobody-may-see"


def ids(rows: Iterable[list[Any]]) -> list[str]:
    return [row[1] for row in rows]


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
        self.metrics, self.health, self.recent = Metrics("test"), Health(), RecentOutcomes(Decoder(), texts=False)
        settings = load(RunSettings, [], "test", {"WORKER_HTTP_TOKEN": SECRET})
        self.console = Console(
            self.metrics, self.health, self.recent, shown_settings(settings), version="1.2.3", runbook=RUNBOOK
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
        server.recent.add([outcome(5), outcome(6, failure=BAD)])
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
    server.recent.add([*map(outcome, range(60)), *(outcome(number, failure=BAD) for number in range(60, 120))])
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
        async with asyncio.timeout(60):
            await answer.content.read()
