"""The live console: one page at /, and a stream of the worker's seconds at /events.

A second is rendered once for all who look, and only when someone does. Nobody who looks can hold anything up: a client
that has not taken the second before is not sent the next one.
"""

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from socket import SO_SNDBUF, SOL_SOCKET, gethostname
from typing import Any, Final, Protocol

import orjson
from aiohttp import web
from pydantic import SecretStr

from worker.core.events import Decoder, Event, Failure, Record, age_s
from worker.core.sentiment import Sentiment
from worker.runtime.tasks import cancelled, within
from worker.settings import Settings
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics
from worker.telemetry.statistics import RollingStatistics

log = logging.getLogger(__name__)

PAGE: Final = Path(__file__).with_name("console.html")
VIEWERS: Final = 100  # at once; one more takes the place of the one that has looked for longest
KEPT: Final = 50  # newest results, and dead letters
HELD_BYTES: Final = 2**20  # of records, for a second at most
STUCK_S: Final = 30  # a client that takes nothing for so long is dropped
SOCKET_BYTES: Final = 65_536  # of a client in the kernel, which would hold megabytes
ID_CHARS: Final = 80
PARTITION_CHARS: Final = 200
TEXT_CHARS: Final = 240


class Outcome(Protocol):
    """What became of a record: a sentiment, a failure, or neither for a null."""

    @property
    def record(self) -> Record: ...
    @property
    def failure(self) -> Failure | None: ...
    @property
    def sentiment(self) -> Sentiment | None: ...


class Tap:
    """Keeps the newest results and dead letters, for who looks now and who will look later.

    ``decoder`` reads ids and, with ``texts``, texts from the records again: for a few, that is cheaper than to carry
    them. That is done once a second, by ``take``; until then the records of the newest results are held.
    """

    def __init__(self, decoder: Decoder, *, texts: bool) -> None:
        self.results: deque[list[Any]] = deque(maxlen=KEPT)
        self.letters: deque[list[Any]] = deque(maxlen=KEPT)
        self._decoder = decoder
        self._texts = texts
        self._fresh_results: deque[tuple[Record, Sentiment, float]] = deque(maxlen=KEPT)
        self._fresh_letters: deque[list[Any]] = deque(maxlen=KEPT)

    def __call__(self, outcomes: Sequence[Outcome]) -> None:
        """The pipeline's: outcomes that have just been acknowledged. Takes some 10 µs."""
        now = time.time()
        for outcome in [outcome for outcome in outcomes if outcome.sentiment][-KEPT:]:
            if outcome.sentiment:
                self._fresh_results.append((outcome.record, outcome.sentiment, now))
        for outcome in [outcome for outcome in outcomes if outcome.failure][-KEPT:]:
            if outcome.failure:
                self._fresh_letters.append(_letter(outcome.record, outcome.failure, now))
        while len(self._fresh_results) > 1 and sum(_size(record) for record, _, _ in self._fresh_results) > HELD_BYTES:
            self._fresh_results.popleft()

    def take(self) -> tuple[list[list[Any]], list[list[Any]]]:
        """Results and dead letters since the last time, oldest first; they are kept among the newest."""
        held, self._fresh_results = self._fresh_results, deque(maxlen=KEPT)
        results = [self._result(*each) for each in held]
        letters = list(self._fresh_letters)
        self._fresh_letters.clear()
        self.results.extend(results)
        self.letters.extend(letters)
        return results, letters

    def _result(self, record: Record, sentiment: Sentiment, now: float) -> list[Any]:
        decoded = self._decoder.decode(record)
        id, text = decoded if isinstance(decoded, Event) else ("", "")
        latency_s = age_s(record.timestamp, now)
        latency_ms = None if latency_s is None else round(1000 * latency_s)
        shown = _cut(text, TEXT_CHARS) if self._texts else None
        chances = [round(chance, 3) for chance in sentiment.probabilities]
        return [
            round(now, 3),
            _cut(id, ID_CHARS),
            sentiment.label,
            round(sentiment.score, 3),
            chances,
            latency_ms,
            shown,
        ]


class Console:
    """Serves the page and its stream; all of it belongs to the event loop.

    ``settings`` are shown by name. ``runbook`` is the address of what to do where the worker is not ready. The stream
    begins with all that the page shows, so that a page loaded again, or one that comes back after a restart, is complete
    at once.
    """

    def __init__(
        self,
        metrics: Metrics,
        health: Health,
        tap: Tap,
        settings: Mapping[str, str],
        *,
        version: str,
        runbook: str | None = None,
    ) -> None:
        self._health = health
        self._tap = tap
        self._statistics = RollingStatistics(metrics)
        self._page = PAGE.read_bytes()
        self._policy = content_security_policy(self._page.decode())
        self._about = {
            "settings": settings,
            "version": version,
            "host": gethostname(),
            "started_at": int(time.time()),
            "runbook": runbook,
            "page": hashlib.sha256(self._page).hexdigest()[:12],
        }
        self._viewers: dict[asyncio.Transport, None] = {}  # oldest first
        self._second = b""
        self._everything: bytes | None = None
        self._next = asyncio.Event()
        self._is_closed = False
        self._ticking: asyncio.Task[None] | None = None
        self._not_ready_since: float | None = None  # by the event loop's clock
        self._now = 0.0

    def add_to(self, app: web.Application) -> None:
        """GET / and GET /events."""
        app.router.add_get("/", self._answer_page)
        app.router.add_get("/events", self._stream, allow_head=False)
        app.on_startup.append(self._start)
        app.on_shutdown.append(self._stop)

    async def _start(self, _: web.Application) -> None:
        self._ticking = asyncio.create_task(self._tick())

    async def _stop(self, _: web.Application) -> None:
        self._is_closed = True
        self._next.set()
        if self._ticking:
            await cancelled([self._ticking])

    async def _tick(self) -> None:
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            due = max(due + 1, clock())
            await asyncio.sleep(due - clock())
            try:
                self._show(clock())
            except Exception as error:  # noqa: BLE001 - the next second may do better, and the worker needs none of it
                log.error("the console could not show a second", extra={"error": type(error).__name__})

    def _show(self, now: float) -> None:
        self._statistics.sample()
        self._now = now
        if self._health.why_not_ready() is None:
            self._not_ready_since = None
        elif self._not_ready_since is None:
            self._not_ready_since = now
        results, letters = self._tap.take()
        self._everything = None
        if self._viewers:
            self._second = _message("second", self._snapshot(results, letters))
            self._next.set()
            self._next = asyncio.Event()

    def _snapshot(self, results: Sequence[Any], letters: Sequence[Any]) -> dict[str, Any]:
        statistics = self._statistics
        return {
            "sample": statistics.history[-1] if statistics.history else None,
            "queues": statistics.queues(),
            "stages": statistics.stages_ms(),
            "dead_letters": statistics.dead_letters(),
            "counts": statistics.counts(),
            "lag": statistics.lag(),
            "partitions": _cut(statistics.partitions(), PARTITION_CHARS),
            "model": statistics.model(),
            "not_ready": self._not_ready(),
            "results": results,
            "letters": letters,
        }

    def _not_ready(self) -> dict[str, Any] | None:
        reason = self._health.why_not_ready()
        if reason is None:
            return None
        since = self._now if self._not_ready_since is None else self._not_ready_since
        return {"reason": reason, "for_s": int(self._now - since), "is_failing": self._health.is_failing()}

    def _hello(self) -> bytes:
        """All that there is to see; rendered once a second at most."""
        if self._everything is None:
            tap, history = self._tap, list(self._statistics.history)
            snapshot = self._snapshot(list(tap.results), list(tap.letters))
            self._everything = _message("hello", {**self._about, **snapshot, "history": history})
        return self._everything

    async def _answer_page(self, _: web.Request) -> web.Response:
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": self._policy}
        return web.Response(body=self._page, headers=headers)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        transport = request.transport
        if transport is None:
            return web.Response()  # it has gone
        if len(self._viewers) >= VIEWERS:
            oldest = next(iter(self._viewers))
            del self._viewers[oldest]
            oldest.abort()
        self._viewers[transport] = None
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
            await response.prepare(request)
            await self._send(transport, response)
        except ConnectionError:
            pass  # it has gone
        except TimeoutError:
            transport.abort()
        finally:
            self._viewers.pop(transport, None)
        return response

    async def _send(self, transport: asyncio.Transport, response: web.StreamResponse) -> None:
        """Everything, then second after second. Raises ConnectionError, TimeoutError where nothing is taken."""
        transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_SNDBUF, SOCKET_BYTES)
        coming = self._next
        await within(STUCK_S, response.write(self._hello()))
        stuck_s = 0
        while stuck_s < STUCK_S:
            await coming.wait()
            coming = self._next
            if self._is_closed or transport.is_closing():
                return
            if transport.get_write_buffer_size():
                stuck_s += 1
            else:
                stuck_s = 0
                await within(STUCK_S, response.write(self._second))
        raise TimeoutError


def shown_settings(settings: Settings) -> dict[str, str]:
    """Each setting by its name as it is in force; of a secret only whether it is set."""
    return {name: _shown(value) for name, value in settings if name != "config"}


def content_security_policy(page: str) -> str:
    """What the page may do: run its own style and script, and ask this server alone."""
    script, style = (_hash_of(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash_of(page: str, tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _message(kind: str, data: Mapping[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), orjson.dumps(data, default=tuple))


def _letter(record: Record, failure: Failure, now: float) -> list[Any]:
    place = f"{record.topic}-{record.partition} @ {record.offset}"
    return [round(now, 3), place, failure.stage, failure.reason, failure.message]


def _size(record: Record) -> int:
    return len(record.value or b"") + sum(len(value or b"") for _, value in record.headers)


def _shown(value: object) -> str:
    if isinstance(value, SecretStr):
        return "(hidden)"
    return "–" if value is None else str(value)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "…"
