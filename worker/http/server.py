"""The HTTP server: /metrics, /livez and /readyz, and what others add. It answers from before the model loads until the end.

How much a client may send, how many may be connected and for how long is bounded here.
"""

import asyncio
import logging
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Final, Protocol, cast

from aiohttp import web, web_response

from worker.http.access import READING, AccessControl, Handler
from worker.printable import printable
from worker.telemetry.health import Health
from worker.telemetry.metrics import CONTENT_TYPE, Metrics

log = logging.getLogger(__name__)

CONNECTIONS: Final = 256  # open at once; one more closes the oldest, so that nobody can keep the probes out
LINE_BYTES: Final = 4_096  # of a request line, and of a header
HEADERS: Final = 64
BODY_BYTES: Final = 16_384
IDLE_S: Final = 10  # without a whole request: an idle connection, or one that sends a header's byte now and then
BODY_S: Final = 5  # for the body to arrive

# Unless a handler says otherwise, nothing is stored, guessed at, or shown inside another site's page.
RESPONSE_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
SERVER: Final = "sentiment-worker"
web_response.SERVER_SOFTWARE = SERVER  # type: ignore[attr-defined]  # else each answer tells the versions of Python and aiohttp


class Routes(Protocol):
    """Something with pages of its own: the console, the reload."""

    def add_to(self, app: web.Application) -> None: ...


class Server:
    """Answers what ``access`` lets through. Belongs to the event loop; nothing blocks.

    It listens on ``host`` and ``port``; for port 0 on any free one, which ``port`` names once it has started.
    """

    def __init__(
        self,
        health: Health,
        metrics: Metrics,
        access: AccessControl,
        *,
        host: str,
        port: int,
        routes: Iterable[Routes] = (),
    ) -> None:
        self.port = port
        self._host = host
        self._health = health
        self._metrics = metrics
        self._open: dict[_Connection, asyncio.Transport] = {}  # oldest first
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        app = self._app = web.Application(middlewares=[access.check, _read_body], client_max_size=BODY_BYTES)
        app.on_response_prepare.append(_add_headers)
        app.router.add_get("/metrics", self._answer_metrics)
        app.router.add_get("/livez", self._answer_livez)
        app.router.add_get("/readyz", self._answer_readyz)
        for each in routes:
            each.add_to(app)
        metrics.ready.set_function(lambda: float(health.why_not_ready() is None))

    async def start(self) -> None:
        """Begins to answer. Raises OSError where the address is taken or not this machine's."""
        self._runner = runner = web.AppRunner(self._app, access_log=None, handle_signals=False, shutdown_timeout=1)
        await runner.setup()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: self._connection(runner, loop), self._host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Ends every connection, within a second or two; may be called without ``start``."""
        if self._server:
            self._server.close()
        if self._runner:
            await self._runner.cleanup()

    def _connection(self, runner: web.AppRunner, loop: asyncio.AbstractEventLoop) -> "_Connection":
        assert runner.server is not None
        handler = _Handler(
            runner.server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,  # a few bytes could become many
            keepalive_timeout=IDLE_S,
            lingering_time=1,
            max_field_size=LINE_BYTES,
            max_headers=HEADERS,
            max_line_size=LINE_BYTES,
        )
        return _Connection(handler, self._open)

    async def _answer_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _answer_livez(self, _: web.Request) -> web.Response:
        return _probe_response("alive", self._health.why_not_alive())

    async def _answer_readyz(self, _: web.Request) -> web.Response:
        return _probe_response("ready", self._health.why_not_ready())


class _Handler(web.RequestHandler):
    """Answers and logs errors without their messages: they hold parts of the request, a token perhaps."""

    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        level = logging.ERROR if status >= HTTPStatus.INTERNAL_SERVER_ERROR else logging.DEBUG
        log.log(level, "a request failed", extra={"status": status, "error": type(exc).__name__})
        return super().handle_error(request, status, None, message and HTTPStatus(status).phrase + "\n")

    def log_exception(self, *_: Any, exc_info: BaseException | None = None) -> None:
        if exc_info:
            log.error("a connection failed", extra={"error": type(exc_info).__name__})


class _Connection(asyncio.Protocol):
    """Passes everything on to aiohttp's own protocol, and counts among the open connections."""

    def __init__(self, inner: asyncio.Protocol, others: "dict[_Connection, asyncio.Transport]") -> None:
        self._inner = inner
        self._open = others  # oldest first
        self.data_received = inner.data_received  # type: ignore[method-assign]
        self.eof_received = inner.eof_received  # type: ignore[method-assign]
        self.pause_writing = inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = inner.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if len(self._open) >= CONNECTIONS:
            oldest = next(iter(self._open))
            self._open.pop(oldest).abort()
        self._open[self] = cast("asyncio.Transport", transport)  # uvloop's are not of that class
        self._inner.connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._open.pop(self, None)
        self._inner.connection_lost(error)


@web.middleware
async def _read_body(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Reads the body of a request that changes something, within a bounded time; the handler finds it read."""
    if request.method not in READING:
        if (request.content_length or 0) > BODY_BYTES:
            raise web.HTTPRequestEntityTooLarge(BODY_BYTES, request.content_length or 0)
        try:
            async with asyncio.timeout(BODY_S):
                await request.read()
        except TimeoutError:
            raise web.HTTPRequestTimeout from None
    return await handler(request)


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    for name, value in RESPONSE_HEADERS.items():
        response.headers.setdefault(name, value)


def _probe_response(good: str, why_not: str | None) -> web.Response:
    return web.Response(text=(printable(why_not) if why_not else good) + "\n", status=503 if why_not else 200)
