"""The live console: one page at /, and at /events a stream of server-sent events, one for each second of the worker.

A second is rendered once for all viewers, and only if there are any. No viewer can hold anything up: a client that has not
taken the second before is not sent the next one.
"""

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from socket import SO_SNDBUF, SOL_SOCKET, gethostname
from typing import Any, Final

import orjson
from aiohttp import web
from pydantic import SecretStr

from worker.http.recent_outcomes import RecentOutcomes, shortened
from worker.runtime.tasks import cancel_all, within
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics
from worker.telemetry.statistics import RollingStatistics

log = logging.getLogger(__name__)

PAGE: Final = Path(__file__).with_name("console.html")
VIEWERS: Final = 100  # at once; one more replaces the oldest
STUCK_S: Final = 30  # after which a client that takes nothing is dropped
SOCKET_BYTES: Final = 65_536  # that the kernel buffers for a client, instead of megabytes
PARTITION_CHARS: Final = 200


class Console:
    """Serves the page and its stream. Belongs to the event loop.

    ``settings`` are shown by name. ``runbook`` is an address that says what to do where the worker is not ready. The stream
    begins with all that the page shows, so that a page that is loaded again, or connects again after a restart, is complete
    at once.
    """

    def __init__(
        self,
        metrics: Metrics,
        health: Health,
        recent: RecentOutcomes,
        settings: Mapping[str, str],
        *,
        version: str,
        runbook: str | None = None,
    ) -> None:
        self._health = health
        self._recent = recent
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
        self._hello: bytes | None = None  # this second's, once somebody has asked for it
        self._next = asyncio.Event()
        self._is_closed = False
        self._ticker: asyncio.Task[None] | None = None
        self._not_ready_since: float | None = None  # by the event loop's clock
        self._now = 0.0

    def add_to(self, app: web.Application) -> None:
        """GET / and GET /events."""
        app.router.add_get("/", self._answer_page)
        app.router.add_get("/events", self._stream, allow_head=False)
        app.on_startup.append(self._start)
        app.on_shutdown.append(self._stop)

    async def _start(self, _: web.Application) -> None:
        self._ticker = asyncio.create_task(self._tick())

    async def _stop(self, _: web.Application) -> None:
        self._is_closed = True
        self._next.set()
        if self._ticker:
            await cancel_all([self._ticker])

    async def _tick(self) -> None:
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            due = max(due + 1, clock())
            await asyncio.sleep(due - clock())
            try:
                self._show(clock())
            except Exception as error:  # noqa: BLE001 - the next second may succeed, and the worker does not need the console
                log.error("the console could not be updated", extra={"error": type(error).__name__})

    def _show(self, now: float) -> None:
        self._statistics.sample()
        self._now = now
        if self._health.why_not_ready() is None:
            self._not_ready_since = None
        elif self._not_ready_since is None:
            self._not_ready_since = now
        results, dead_letters = self._recent.take()
        self._hello = None
        if self._viewers:
            self._second = _message("second", self._snapshot(results, dead_letters))
            self._next.set()
            self._next = asyncio.Event()

    def _snapshot(self, results: Sequence[Any], dead_letters: Sequence[Any]) -> dict[str, Any]:
        statistics = self._statistics
        return {
            "sample": statistics.history[-1] if statistics.history else None,
            "queues": statistics.queues(),
            "stages": statistics.stages_ms(),
            "dead_letters": statistics.dead_letters(),
            "counts": statistics.counts(),
            "lag": statistics.lag(),
            "partitions": shortened(statistics.partitions(), PARTITION_CHARS),
            "model": statistics.model(),
            "labels": statistics.labels(),
            "not_ready": self._not_ready(),
            "results": results,
            "letters": dead_letters,
        }

    def _not_ready(self) -> dict[str, Any] | None:
        reason = self._health.why_not_ready()
        if reason is None:
            return None
        since = self._now if self._not_ready_since is None else self._not_ready_since
        return {"reason": reason, "for_s": int(self._now - since), "is_failing": self._health.is_failing()}

    def _hello_message(self) -> bytes:
        """All that the page shows; rendered once a second at most."""
        if self._hello is None:
            recent, history = self._recent, list(self._statistics.history)
            snapshot = self._snapshot(list(recent.results), list(recent.dead_letters))
            self._hello = _message("hello", {**self._about, **snapshot, "history": history})
        return self._hello

    async def _answer_page(self, _: web.Request) -> web.Response:
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": self._policy}
        return web.Response(body=self._page, headers=headers)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        transport = request.transport
        if transport is None:
            return web.Response()  # the client has gone
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
            pass  # the client has gone
        except TimeoutError:
            transport.abort()
        finally:
            self._viewers.pop(transport, None)
        return response

    async def _send(self, transport: asyncio.Transport, response: web.StreamResponse) -> None:
        """Sends all that the page shows, then what is new each second.

        Raises ConnectionError, or TimeoutError if the client takes nothing.
        """
        transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_SNDBUF, SOCKET_BYTES)
        coming = self._next
        await within(STUCK_S, response.write(self._hello_message()))
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


def shown_settings(settings: Iterable[tuple[str, object]]) -> dict[str, str]:
    """Each setting by its name, for the console; of a secret only whether it is set."""
    return {name: _shown(value) for name, value in settings if name != "config"}


def content_security_policy(page: str) -> str:
    """The page's policy: it may run its own style and script, and ask this server alone."""
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


def _shown(value: object) -> str:
    if isinstance(value, SecretStr):
        return "(hidden)"
    return "–" if value is None else str(value)
