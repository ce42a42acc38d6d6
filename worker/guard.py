"""What stands between the network and the HTTP side: who may ask what, how much at once, and for how long."""

import asyncio
import hmac
import ipaddress
import logging
from base64 import b64decode
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final, Literal, cast

from aiohttp import web, web_response

log = logging.getLogger(__name__)

TokenFor = Literal["changes", "all"]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CONNECTIONS: Final = 256  # open at once; one more closes the oldest, so that nobody can keep the probes out
LINE_BYTES: Final = 4_096  # of a request line, and of a header
HEADERS: Final = 64
BODY_BYTES: Final = 16_384
IDLE_S: Final = 10  # without a whole request: an idle connection, or one that sends a header's byte now and then
BODY_S: Final = 5  # for the body to arrive
PROBES: Final = ("/livez", "/readyz")
READING: Final = ("GET", "HEAD")

# Unless a handler says otherwise, nothing is stored, guessed at, or shown inside another site's page.
HEADERS_OF_ANSWERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
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
    """

    def __init__(self, *, host: str, token: str | None = None, token_for: TokenFor = "changes") -> None:
        self._host = host
        self._is_local = _is_loopback(host)
        self._token = token.encode() if token else None
        self._token_for = token_for
        self._open: dict[_Connection, asyncio.Transport] = {}
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None

    def application(self) -> web.Application:
        """An application that asks this guard about each request; add routes to it."""
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
        if self._is_local and not self._is_meant(request.headers.get("Host")):
            raise web.HTTPMisdirectedRequest(
                text="this address answers to localhost, to IP addresses, and to the name in http_host\n"
            )
        if request.method in READING:
            if self._token_for == "all" and request.path not in PROBES:
                self._refuse_without_token(request, "Bearer", "Basic")
            return await handler(request)
        if request.match_info.http_exception is not None:
            raise web.HTTPMethodNotAllowed(request.method, READING)
        self._refuse_without_token(request, "Bearer")
        await _body(request)
        return await handler(request)

    def _is_meant(self, host: str | None) -> bool:
        """Whether a browser's page from elsewhere, whose name was turned to our address, cannot be who asks."""
        if host is None:
            return True
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        return name.strip("[]").lower() in ("localhost", self._host.lower()) or _address(name) is not None

    def _refuse_without_token(self, request: web.Request, *schemes: str) -> None:
        if self._token is None:
            raise web.HTTPForbidden(text="this needs http_token, which is not set: see WORKER_HTTP_TOKEN_FILE\n")
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.title() in schemes and hmac.compare_digest(_token(scheme, given), self._token):
            return
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


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return address.is_loopback if address else host.lower() == "localhost"
