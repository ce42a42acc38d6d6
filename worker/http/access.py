"""What stands between the network and the HTTP side: who may ask what, how much at once, and for how long."""

import asyncio
import hmac
import logging
import math
from base64 import b64decode
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, Final, Literal, cast

from aiohttp import web, web_response

from worker.settings import ip_address
from worker.telemetry.metrics import Metrics, Refusal

log = logging.getLogger(__name__)

TokenFor = Literal["changes", "all"]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CONNECTIONS: Final = 256  # open at once; one more closes the oldest, so that nobody can keep the probes out
LINE_BYTES: Final = 4_096  # of a request line, and of a header
HEADERS: Final = 64
BODY_BYTES: Final = 16_384
IDLE_S: Final = 10  # without a whole request: an idle connection, or one that sends a header's byte now and then
BODY_S: Final = 5  # for the body to arrive
TOLD_S: Final = 10  # a line for refusals of one kind at most so often: who guesses tokens should not fill the log
PROBES: Final = ("/livez", "/readyz")
READING: Final = ("GET", "HEAD")

# Unless a handler says otherwise, nothing is stored, guessed at, or shown inside another site's page.
HEADERS_OF_ANSWERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
SERVER: Final = "sentiment-worker"
web_response.SERVER_SOFTWARE = SERVER  # type: ignore[attr-defined]  # else each answer tells the versions of Python and aiohttp


class Guard:
    """Makes the application, and listens for it. All of it belongs to the event loop; nothing blocks.

    Reading (GET and HEAD) is free, or with ``token_for="all"`` needs the token; the probes never do. Any other method
    exists only where a route for it was added, and always needs the token: without one it is refused. Browsers give the
    token as the password of HTTP's basic login, which counts for reading alone, since they send it unasked from other
    sites' pages too.

    Whatever the address, only requests for localhost, an IP address, ``host`` or one of ``names`` are answered: a page
    whose own name was turned to this address sends that name. A browser says of a request whether another site's page
    made it; those are refused, but for a link that opens the console, as a page of its own.
    """

    def __init__(
        self, *, host: str, names: Sequence[str] = (), token: str | None = None, token_for: TokenFor = "changes"
    ) -> None:
        self._host = host
        self._names = {name.lower() for name in ("localhost", host, *names)}
        self._token = token.encode() if token else None
        self._token_for = token_for
        self._open: dict[_Connection, asyncio.Transport] = {}
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._metrics: Metrics  # the application's
        self._told: dict[Refusal, float] = {}  # when its last line was written

    def application(self, metrics: Metrics) -> web.Application:
        """An application that asks this guard about each request, and counts what is refused; add routes to it."""
        self._metrics = metrics
        app = web.Application(middlewares=[self._check], client_max_size=BODY_BYTES)
        app.on_response_prepare.append(_add_headers)
        return app

    async def listen(self, app: web.Application, port: int) -> int:
        """Begins to answer, and returns the port. Raises OSError where the address is taken or not this machine's."""
        self._runner = runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
        await runner.setup()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: self._connection(runner, loop), self._host, port)
        listening: int = self._server.sockets[0].getsockname()[1]
        return listening

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

    async def close(self) -> None:
        """Ends every connection, within a second or two; may be called without ``listen``."""
        if self._server:
            self._server.close()
        if self._runner:
            await self._runner.cleanup()

    @web.middleware
    async def _check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not self._is_meant(request.headers.get("Host")):
            self._refused(request, "host")
            raise web.HTTPMisdirectedRequest(
                text="this answers to localhost, to IP addresses, and to the names in http_host and http_names\n"
            )
        if request.headers.get("Sec-Fetch-Site") == "cross-site" and not _is_link_to_console(request):
            self._refused(request, "cross_site")
            raise web.HTTPForbidden(text="another site's page asked for this: open it by its address instead\n")
        if request.method in READING:
            if self._token_for == "all" and request.path not in PROBES:
                self._refuse_without_token(request, "Bearer", "Basic")
            return await handler(request)
        if request.match_info.http_exception is not None:
            raise web.HTTPMethodNotAllowed(request.method, READING)
        self._refuse_without_token(request, "Bearer")
        self._metrics.http_changes.inc()
        log.info("accepted a request that changes something", extra=_who(request))
        await _body(request)
        return await handler(request)

    def _is_meant(self, host: str | None) -> bool:
        """Whether a browser's page from elsewhere, whose name was turned to our address, cannot be who asks."""
        if host is None:
            return True
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        return name.strip("[]").lower() in self._names or ip_address(name) is not None

    def _refused(self, request: web.Request, why: Refusal) -> None:
        """Counts it, and tells of it where none of this kind was told of just now."""
        self._metrics.http_refusals.labels(why).inc()
        now = asyncio.get_running_loop().time()
        if now - self._told.get(why, -math.inf) >= TOLD_S:
            self._told[why] = now
            level = logging.DEBUG if why == "no_token" else logging.WARNING  # each browser begins without one
            log.log(level, "refused a request", extra={"reason": why, **_who(request)})

    def _refuse_without_token(self, request: web.Request, *schemes: str) -> None:
        why: Refusal = "wrong_token" if "Authorization" in request.headers else "no_token"
        if self._token is None:
            self._refused(request, why)
            raise web.HTTPForbidden(text="this needs http_token, which is not set: see WORKER_HTTP_TOKEN_FILE\n")
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.title() in schemes and hmac.compare_digest(_token(scheme, given), self._token):
            return
        self._refused(request, why)
        refusal = web.HTTPUnauthorized(text="this needs the token that http_token holds\n")
        for wanted in schemes:
            refusal.headers.add("WWW-Authenticate", f'{wanted} realm="sentiment-worker"')
        raise refusal


class _Handler(web.RequestHandler):
    """Answers and logs errors without their words: they hold parts of the request, a token perhaps."""

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
    """Passes everything on to aiohttp's own protocol, and counts among the open ones."""

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


def _is_link_to_console(request: web.Request) -> bool:
    """Whether a browser opens the console in a tab, in no frame: its page alone tells nothing, and changes nothing."""
    return (request.method, request.path) == ("GET", "/") and [
        request.headers.get(f"Sec-Fetch-{of}") for of in ("Mode", "Dest")
    ] == ["navigate", "document"]


async def _body(request: web.Request) -> None:
    """Reads the body here, where its time is bounded; the handler finds it read."""
    if (request.content_length or 0) > BODY_BYTES:
        raise web.HTTPRequestEntityTooLarge(BODY_BYTES, request.content_length or 0)
    try:
        async with asyncio.timeout(BODY_S):
            await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    for name, value in HEADERS_OF_ANSWERS.items():
        response.headers.setdefault(name, value)


def _token(scheme: str, given: str) -> bytes:
    """The token that an Authorization header gives; an empty one where it makes no sense."""
    if scheme.title() == "Bearer":
        return given.strip().encode("utf-8", "surrogateescape")
    try:
        return b64decode(given.strip(), validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _who(request: web.Request) -> dict[str, str | None]:
    """Who asked for what; of the path only what is a route's, for any other may hold a secret."""
    resource = request.match_info.route.resource
    return {"peer": request.remote, "method": request.method, "path": resource.canonical if resource else None}
