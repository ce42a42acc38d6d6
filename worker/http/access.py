"""Who may ask the HTTP server for what: by the token, by the name that was asked for, and by the page that asks."""

import asyncio
import hmac
import logging
import math
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Literal

from aiohttp import web

from worker.runtime.file_value import FileValue, present
from worker.settings.values import ip_address
from worker.telemetry.metrics import Metrics, Refusal

log = logging.getLogger(__name__)

TokenFor = Literal["changes", "all"]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LOG_EVERY_S: Final = 10  # between two lines on refusals of one kind, lest guessed tokens fill the log
PROBES: Final = ("/livez", "/readyz")
READING: Final = ("GET", "HEAD")


class AccessControl:
    """Decides about each request, counts and logs what it refuses. Belongs to the event loop; nothing blocks.

    Reading (GET and HEAD) is free, or with ``token_for="all"`` needs the token; the probes never do. Any other method
    exists only where a route for it was added, and always needs the token: without one it is refused. Browsers give the
    token as the password of HTTP's basic login, which counts for reading alone, since they send it unasked from other
    sites' pages too.

    Whatever the address, only requests for localhost, an IP address or one of ``names`` are answered: the page of a site
    that has pointed its own name at this address sends that name. A browser says of a request whether another site's page
    made it; those requests are refused, but for a link that opens the console as a page of its own.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        names: Iterable[str] = (),
        token: str | FileValue[str] | None = None,
        token_for: TokenFor = "changes",
    ) -> None:
        self._metrics = metrics
        self._names = {name.lower() for name in ("localhost", *names)}
        self._token = token or None
        self._token_for = token_for
        self._logged: dict[Refusal, float] = {}  # when its last line was written, by the event loop's clock

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answers with what the handler answers, or raises the refusal as an HTTP error. A middleware of aiohttp's."""
        if not self._is_own_name(request.headers.get("Host")):
            self._record_refusal(request, "host")
            raise web.HTTPMisdirectedRequest(
                text="this server answers requests for localhost, IP addresses, and the names in http_host and http_names\n"
            )
        if request.headers.get("Sec-Fetch-Site") == "cross-site" and not _is_link_to_console(request):
            self._record_refusal(request, "cross_site")
            raise web.HTTPForbidden(
                text="this request comes from another site's page: open this address directly instead\n"
            )
        if request.method in READING:
            if self._token_for == "all" and request.path not in PROBES:
                self._refuse_without_token(request, "Bearer", "Basic")
            return await handler(request)
        if request.match_info.http_exception is not None:
            raise web.HTTPMethodNotAllowed(request.method, READING)
        self._refuse_without_token(request, "Bearer")
        self._metrics.http_changes.inc()
        log.info("accepted a request that changes something", extra=_log_fields(request))
        return await handler(request)

    def _is_own_name(self, host: str | None) -> bool:
        """Whether a Host header names this server, and not a site that has pointed its own name at this address."""
        if host is None:
            return True
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        return name.strip("[]").lower() in self._names or ip_address(name) is not None

    def _record_refusal(self, request: web.Request, why: Refusal) -> None:
        """Counts a refusal, and logs it unless one of this kind was logged just now."""
        self._metrics.http_refusals.labels(why).inc()
        now = asyncio.get_running_loop().time()
        if now - self._logged.get(why, -math.inf) >= LOG_EVERY_S:
            self._logged[why] = now
            level = logging.DEBUG if why == "no_token" else logging.WARNING  # a browser's first request has no token
            log.log(level, "refused a request", extra={"reason": why, **_log_fields(request)})

    def _refuse_without_token(self, request: web.Request, *schemes: str) -> None:
        why: Refusal = "wrong_token" if "Authorization" in request.headers else "no_token"
        token = present(self._token)
        if token is None:
            self._record_refusal(request, why)
            raise web.HTTPForbidden(
                text="this request needs http_token, which is not set: see WORKER_HTTP_TOKEN_FILE\n"
            )
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.title() in schemes and hmac.compare_digest(_token(scheme, given), token.encode()):
            return
        self._record_refusal(request, why)
        refusal = web.HTTPUnauthorized(text="this request needs the token that http_token holds\n")
        for wanted in schemes:
            refusal.headers.add("WWW-Authenticate", f'{wanted} realm="sentiment-worker"')
        raise refusal


def _is_link_to_console(request: web.Request) -> bool:
    """Whether a browser opens the console in a tab, in no frame: its page alone tells nothing, and changes nothing."""
    return (request.method, request.path) == ("GET", "/") and [
        request.headers.get(f"Sec-Fetch-{of}") for of in ("Mode", "Dest")
    ] == ["navigate", "document"]


def _token(scheme: str, given: str) -> bytes:
    """The token that an Authorization header gives; an empty one where the header makes no sense."""
    if scheme.title() == "Bearer":
        return given.strip().encode("utf-8", "surrogateescape")
    try:
        return b64decode(given.strip(), validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _log_fields(request: web.Request) -> dict[str, str | None]:
    """The peer's address, the method and the path. The path is None unless a route has it, for it may hold a secret."""
    resource = request.match_info.route.resource
    return {"peer": request.remote, "method": request.method, "path": resource.canonical if resource else None}
