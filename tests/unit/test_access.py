"""The HTTP server against those who should not be let in: methods, tokens, sizes, slow and many clients."""

import asyncio
import base64
import gzip
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import uvloop
from aiohttp import web

from worker.http import server as server_module
from worker.http.access import AccessControl, TokenFor
from worker.http.server import BODY_BYTES, CONNECTIONS, HEADERS, LINE_BYTES, Server
from worker.runtime.file_value import FileValue
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

TOKEN = "0123456789abcdef-secret"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
BASIC = {"Authorization": "Basic " + base64.b64encode(f"anyone:{TOKEN}".encode()).decode()}
PATHS = ("/metrics", "/livez", "/readyz")
SECONDS = 30


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One connection, on which every byte is the test's own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await asyncio.wait_for(self._writer.drain(), SECONDS)

    async def receive(self, *, is_head: bool = False) -> Answer:
        head = await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), SECONDS)
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.title(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        length = 0 if is_head else int(headers.get("Content-Length", 0))
        return Answer(int(first.split()[1]), headers, await asyncio.wait_for(self._reader.readexactly(length), SECONDS))

    async def is_closed(self) -> bool:
        """Waits until the other side has closed the connection."""
        try:
            while await asyncio.wait_for(self._reader.read(65_536), SECONDS):
                pass
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self._writer.close()


class ServerUnderTest:
    """A server as the worker has it, with a route that changes something beside."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        token: str | FileValue[str] | None = None,
        token_for: TokenFor = "changes",
        names: Sequence[str] = (),
    ) -> None:
        health = self.health = Health()
        self.changes: list[bytes] = []
        self.metrics = Metrics("test")
        access = AccessControl(self.metrics, names=[host, *names], token=token, token_for=token_for)
        self._server = Server(health, self.metrics, access, host=host, port=0)
        self._server._app.router.add_post("/change", self._change)
        self._server._app.router.add_get("/much", self._much)
        self._clients: list[Client] = []

    async def _change(self, request: web.Request) -> web.Response:
        self.changes.append(await request.read())
        return web.Response(text="changed\n")

    async def _much(self, _: web.Request) -> web.Response:
        return web.Response(body=bytes(1_000_000))

    def refusals(self, reason: str) -> float:
        (counter,) = self.metrics.http_refusals.labels(reason).collect()
        return counter.samples[0].value

    async def start(self) -> "ServerUnderTest":
        await self._server.start()
        return self

    async def stop(self) -> None:
        for client in self._clients:
            client.close()
        await asyncio.wait_for(self._server.stop(), SECONDS)

    async def connect(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self._server.port))
        self._clients.append(client)
        return client

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        client = await self.connect()
        fields = {
            "Host": "localhost",
            **({} if body is None else {"Content-Length": str(len(body))}),
            **(headers or {}),
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        await client.send(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + (body or b""))
        return await client.receive(is_head=method == "HEAD")


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    """The worker's own loop: its transports and asyncio's differ."""
    return uvloop.EventLoopPolicy()


@pytest.fixture
async def server() -> AsyncIterator[ServerUnderTest]:
    server = await ServerUnderTest().start()
    yield server
    await server.stop()


@pytest.fixture
async def with_token() -> AsyncIterator[ServerUnderTest]:
    """One with a token, for changes."""
    server = await ServerUnderTest(token=TOKEN).start()
    yield server
    await server.stop()


@pytest.fixture
async def closed() -> AsyncIterator[ServerUnderTest]:
    """One with a token, for everything."""
    server = await ServerUnderTest(token=TOKEN, token_for="all").start()
    yield server
    await server.stop()


# --- Methods and paths ---


@pytest.mark.parametrize("path", PATHS)
async def test_reading_is_answered(server: ServerUnderTest, path: str) -> None:
    get, head = await server.ask("GET", path), await server.ask("HEAD", path)
    assert get.status == head.status == 200
    assert get.body
    assert int(head.headers["Content-Length"]) > 0


async def test_a_brokers_words_reach_no_terminal_as_they_are() -> None:
    server = await ServerUnderTest().start()
    server.health.failing("kafka", "\x1b[2Jno\nready")
    answer = await server.ask("GET", "/readyz")
    await server.stop()
    assert (answer.status, answer.body) == (503, b"kafka: \\u001b[2Jno\\nready\n")


@pytest.mark.parametrize("path", [*PATHS, "/nowhere", "/"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
async def test_other_methods_are_not_allowed(with_token: ServerUnderTest, method: str, path: str) -> None:
    answer = await with_token.ask(method, path, BEARER, b"x")
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET,HEAD"


async def test_a_method_that_is_none_is_refused(server: ServerUnderTest) -> None:
    assert (await server.ask("FROBNICATE", "/metrics")).status == 400


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/metrics/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/livez%00",
        "/Livez",
    ],
)
async def test_a_path_leads_to_no_file(server: ServerUnderTest, path: str) -> None:
    answer = await server.ask("GET", path)
    assert answer.status == 404
    assert b"root:" not in answer.body


async def test_answers_tell_no_versions_and_are_neither_kept_nor_framed(server: ServerUnderTest) -> None:
    for answer in (await server.ask("GET", "/metrics"), await server.ask("GET", "/nowhere")):
        assert answer.headers["Server"] == "sentiment-worker"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    client = await server.connect()
    await client.send(b"<b>no HTTP at all\r\n\r\n")
    answer = await client.receive()
    assert answer.status == 400
    assert answer.body == b"Bad Request\n", "and nothing of the request"
    assert answer.headers["Server"] == "sentiment-worker"


# --- The token ---


async def test_without_a_token_nothing_can_be_changed(server: ServerUnderTest) -> None:
    for headers in ({}, BEARER, {"Authorization": "Bearer "}, {"Authorization": "Bearer None"}):
        answer = await server.ask("POST", "/change", headers, b"x")
        assert answer.status == 403
        assert b"http_token" in answer.body
    assert not server.changes


async def test_with_the_token_something_can_be_changed(with_token: ServerUnderTest) -> None:
    assert (await with_token.ask("POST", "/change", BEARER, b"x")).status == 200
    assert (await with_token.ask("POST", "/change", {"Authorization": f"bearer {TOKEN}"}, b"y")).status == 200
    assert with_token.changes == [b"x", b"y"]


WRONG = [
    "",
    "Bearer",
    "Bearer ",
    TOKEN,
    f"Bearer {TOKEN[:-1]}",
    f"Bearer {TOKEN}x",
    f"Bearer {TOKEN.upper()}",
    f"Token {TOKEN}",
    "Basic ",
    "Basic ???",
    "Basic " + base64.b64encode(b"anyone:wrong").decode(),
    "Basic " + base64.b64encode(TOKEN.encode()).decode(),
]


@pytest.mark.parametrize("wrong", [*WRONG, BASIC["Authorization"]])  # a browser sends Basic from any site's page
async def test_with_another_token_nothing_is_changed(with_token: ServerUnderTest, wrong: str) -> None:
    answer = await with_token.ask("POST", "/change", {"Authorization": wrong}, b"x")
    assert answer.status == 401
    assert answer.headers["Www-Authenticate"] == 'Bearer realm="sentiment-worker"'
    assert TOKEN.encode() not in answer.body
    assert not with_token.changes


async def test_a_token_that_changes_in_its_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    server = await ServerUnderTest(token=FileValue(file.read_text, [file])).start()
    try:
        assert (await server.ask("POST", "/change", BEARER, b"x")).status == 200
        file.write_text("another-token-0123456789")
        assert (await server.ask("POST", "/change", BEARER, b"x")).status == 401
        renewed = {"Authorization": "Bearer another-token-0123456789"}
        assert (await server.ask("POST", "/change", renewed, b"x")).status == 200
    finally:
        await server.stop()


async def test_reading_is_free_unless_all_needs_the_token(with_token: ServerUnderTest, closed: ServerUnderTest) -> None:
    for path in PATHS:
        assert (await with_token.ask("GET", path)).status == 200
    for method in ("GET", "HEAD"):
        assert (await closed.ask(method, "/metrics")).status == 401
        assert (await closed.ask(method, "/nowhere")).status == 401, "and does not tell what there is"
        assert (await closed.ask(method, "/metrics", BEARER)).status == 200
        assert (await closed.ask(method, "/metrics", BASIC)).status == 200


@pytest.mark.parametrize("wrong", WRONG)
async def test_all_needs_the_right_token(closed: ServerUnderTest, wrong: str) -> None:
    assert (await closed.ask("GET", "/metrics", {"Authorization": wrong})).status == 401


async def test_probes_never_need_a_token(closed: ServerUnderTest) -> None:
    for path in ("/livez", "/readyz"):
        assert (await closed.ask("GET", path)).status == 200


# --- Another site's page ---


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example"]
)
async def test_a_page_that_turned_its_name_to_this_machine_reads_nothing(server: ServerUnderTest, host: str) -> None:
    answer = await server.ask("GET", "/metrics", {"Host": host})
    assert answer.status == 421


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "127.0.0.1", "[::1]:8080", "[::1]", "10.1.2.3:80"]
)
async def test_this_machines_own_names_are_answered(server: ServerUnderTest, host: str) -> None:
    assert (await server.ask("GET", "/metrics", {"Host": host})).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 421),
        ("10.1.2.3:8080", 200),  # as Prometheus and the kubelet ask a pod
        ("localhost:8080", 200),  # through a port that is forwarded
        ("worker.example", 200),
        ("Sentiment-Worker.prod.svc:8080", 200),
        ("other.worker.example", 421),
    ],
)
async def test_an_address_for_others_has_the_names_that_are_set(host: str, status: int) -> None:
    server = await ServerUnderTest(host="0.0.0.0", names=["worker.example", "sentiment-worker.prod.svc"]).start()
    try:
        assert (await server.ask("GET", "/metrics", {"Host": host})).status == status
        assert server.refusals("host") == (status == 421)
    finally:
        await server.stop()


@pytest.mark.parametrize("path", [*PATHS, "/change"])
async def test_what_another_sites_page_asks_for_is_refused(with_token: ServerUnderTest, path: str) -> None:
    method = "POST" if path == "/change" else "GET"
    answer = await with_token.ask(method, path, {**BEARER, "Sec-Fetch-Site": "cross-site"})
    assert answer.status == 403
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert with_token.refusals("cross_site") == 1
    for site in ("same-origin", "same-site", "none"):
        assert (await with_token.ask(method, path, {**BEARER, "Sec-Fetch-Site": site})).status == 200


async def test_a_link_on_another_site_opens_the_console_alone(with_token: ServerUnderTest) -> None:
    link = {**BEARER, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert (await with_token.ask("GET", "/", link)).status == 404  # let through, and no console is here
    for path in (*PATHS, "/much", "/events"):
        assert (await with_token.ask("GET", path, link)).status == 403
    for method, path in (("HEAD", "/"), ("POST", "/"), ("POST", "/change")):
        assert (await with_token.ask(method, path, link)).status == 403
    for header, value in (("Mode", "no-cors"), ("Mode", "cors"), ("Dest", "iframe"), ("Dest", "object"), ("Dest", "")):
        assert (await with_token.ask("GET", "/", {**link, f"Sec-Fetch-{header}": value})).status == 403


# --- Sizes ---


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /" + b"x" * LINE_BYTES + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (LINE_BYTES + 1) + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: x\r\n" * HEADERS + b"\r\n",
    ],
    ids=["a long line", "a long header", "many headers"],
)
async def test_a_large_head_is_refused(server: ServerUnderTest, request_head: bytes) -> None:
    client = await server.connect()
    await client.send(request_head)
    assert (await client.receive()).status == 400
    assert await client.is_closed()


async def test_a_head_without_end_is_not_collected(server: ServerUnderTest) -> None:
    client = await server.connect()

    async def send_too_much() -> None:
        await client.send(b"GET /livez HTTP/1.1\r\nX: ")
        while True:
            await client.send(b"x" * 65_536)

    with pytest.raises((ConnectionError, RuntimeError)):  # uvloop says it by the latter
        await asyncio.wait_for(send_too_much(), SECONDS)


async def test_a_large_body_is_refused(with_token: ServerUnderTest) -> None:
    assert (await with_token.ask("POST", "/change", BEARER, b"x" * BODY_BYTES)).status == 200
    client = await with_token.connect()
    head = f"POST /change HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
    await client.send(head + b"Content-Length: 100000000\r\n\r\n")
    assert (await client.receive()).status == 413
    chunked = await with_token.connect()
    await chunked.send(head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"x" * 4_096 + b"\r\n")
    await chunked.send(4 * (b"1000\r\n" + b"x" * 4_096 + b"\r\n"))
    assert (await chunked.receive()).status == 413
    assert len(with_token.changes) == 1


async def test_a_packed_body_is_not_unpacked(with_token: ServerUnderTest) -> None:
    packed = gzip.compress(bytes(10_000_000))[:BODY_BYTES]
    answer = await with_token.ask("POST", "/change", {**BEARER, "Content-Encoding": "gzip"}, packed)
    assert answer.status == 200
    assert with_token.changes == [packed]


async def test_a_body_behind_a_get_is_not_waited_for(server: ServerUnderTest) -> None:
    client = await server.connect()
    await client.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nx")
    assert (await client.receive()).status == 200
    assert await client.is_closed()


# --- Slow and many clients ---


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "IDLE_S", 0.5)


@pytest.mark.usefixtures("impatient")
async def test_a_head_that_comes_a_byte_at_a_time_ends(server: ServerUnderTest) -> None:
    client = await server.connect()

    async def trickle() -> None:
        await client.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n")
        while True:
            await client.send(b"x")
            await asyncio.sleep(0.05)

    trickling = asyncio.create_task(trickle())
    assert await client.is_closed()
    trickling.cancel()
    await asyncio.gather(trickling, return_exceptions=True)


@pytest.mark.usefixtures("impatient")
async def test_who_says_nothing_is_sent_away(server: ServerUnderTest) -> None:
    assert await (await server.connect()).is_closed()


async def test_a_body_that_does_not_come_ends(with_token: ServerUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "BODY_S", 0.5)
    client = await with_token.connect()
    head = f"POST /change HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 9\r\n\r\n"
    await client.send(head.encode() + b"x")
    assert (await client.receive()).status == 408
    assert not with_token.changes


async def test_many_clients_keep_nobody_out(server: ServerUnderTest) -> None:
    """Connections that stay open without a word: the oldest make room."""
    crowd = [await server.connect() for _ in range(CONNECTIONS * 3)]
    assert (await server.ask("GET", "/livez")).status == 200
    assert all([await client.is_closed() for client in crowd[:CONNECTIONS]])
    await crowd[-1].send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await crowd[-1].receive()).status == 200, "the newest are still there"
    assert len(server._server._open) <= CONNECTIONS


async def test_clients_that_do_not_read_keep_nobody_out(server: ServerUnderTest) -> None:
    """What they asked for is more than the sockets hold."""
    for _ in range(CONNECTIONS + 1):
        await (await server.connect()).send(b"GET /much HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5)
    assert (await server.ask("GET", "/readyz")).status == 200


# --- What is logged and counted ---


async def test_wrong_tokens_are_counted_and_told_with_who_gave_them(
    with_token: ServerUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        await with_token.ask("POST", "/change", {"Authorization": "Bearer a-wrong-token-of-somebody"})
    await with_token.ask("POST", "/change")
    assert (with_token.refusals("wrong_token"), with_token.refusals("no_token")) == (3, 1)
    (told,) = [record for record in caplog.records if record.levelno >= logging.WARNING]  # not one for each guess
    assert (vars(told)["reason"], vars(told)["peer"], vars(told)["path"]) == ("wrong_token", "127.0.0.1", "/change")
    assert "a-wrong-token" not in caplog.text


async def test_accepted_changes_are_counted_and_told_with_who_asked(
    with_token: ServerUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await with_token.ask("POST", "/change", BEARER, b"x")
    assert b"sentiment_worker_http_changes_total 1.0" in with_token.metrics.text()
    (told,) = [record for record in caplog.records if record.name == "worker.http.access"]
    assert (vars(told)["peer"], vars(told)["method"], vars(told)["path"]) == ("127.0.0.1", "POST", "/change")


async def test_no_part_of_a_request_is_logged(closed: ServerUnderTest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = await closed.connect()
    await client.send(b"GET /livez HTTP/1.1\r\nAuthorization: Bearer my-own-token\x00\r\nBroken my-own-token\r\n\r\n")
    assert (await client.receive()).status == 400
    no_http = await closed.connect()
    await no_http.send(b"my-own-token\r\n\r\n")
    assert (await no_http.receive()).status == 400
    await closed.ask("GET", "/metrics?my-own-token", {"Authorization": "Bearer my-own-token"})
    assert "my-own-token" not in caplog.text
    assert TOKEN not in caplog.text


async def test_a_page_that_fails_says_so_without_words(
    server: ServerUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: web.Request) -> web.Response:
        raise ValueError("text of an event")

    await server.stop()
    other = ServerUnderTest()
    other._server._app.router.add_get("/fail", fail)
    await other.start()
    answer = await other.ask("GET", "/fail", {"Accept": "text/html"})
    await other.stop()
    assert answer.status == 500
    assert b"text of an event" not in answer.body
    assert "a request failed" in caplog.text
    assert "text of an event" not in caplog.text
