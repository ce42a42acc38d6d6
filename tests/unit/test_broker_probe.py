"""What is said of an address that is no broker's, by the protocol that it speaks."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from worker.kafka.broker_probe import Listener, listener_at
from worker.kafka.connection import Connection
from worker.kafka.diagnosis import why_unreachable

TLS = ssl.create_default_context()
SOON_S = 0.5  # for what never answers
PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a name does not exist is known at once, however slow the DNS of this machine is."""
    found = socket.getaddrinfo

    def looked_up(host: str, *arguments: Any, **options: Any) -> Any:
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)


async def answering(answer: bytes) -> AsyncIterator[str]:
    """A server that answers a line, and ends at once where there is nothing to answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer:
            await reader.readline()
            writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@contextmanager
def full() -> Iterator[int]:
    """A port whose queue has no place left: what comes is dropped, as by a firewall."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port: int = server.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(("127.0.0.1", port))
        yield port
        for each in waiting:
            each.close()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@pytest.mark.parametrize("context", [None, TLS], ids=["plain", "TLS"])
async def test_what_is_not_there_is_told_apart(context: ssl.SSLContext | None) -> None:
    assert await listener_at("no-such-host.invalid", 9092, context, PATIENCE_S) is Listener.UNKNOWN
    assert await listener_at("127.0.0.1", closed_port(), context, PATIENCE_S) is Listener.REFUSED
    assert await listener_at("localhost", closed_port(), context, PATIENCE_S) is Listener.REFUSED
    with full() as port:
        assert await listener_at("127.0.0.1", port, context, SOON_S) is Listener.NOWHERE
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert await listener_at("127.0.0.1", silent.getsockname()[1], context, SOON_S) is Listener.SILENT


@pytest.mark.parametrize(
    ("answer", "by_plain", "by_tls"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", Listener.HTTP, Listener.HTTP),
        (b"220 mail.example ESMTP\r\n", Listener.SILENT, Listener.NO_TLS),
        (b"", Listener.CLOSING, Listener.NO_TLS),
    ],
    ids=["http", "mail", "ends"],
)
async def test_what_speaks_another_protocol_is_told_apart(answer: bytes, by_plain: Listener, by_tls: Listener) -> None:
    async for address in answering(answer):
        host, _, port = address.partition(":")
        patience_s = SOON_S if by_plain is Listener.SILENT else PATIENCE_S
        assert await listener_at(host, int(port), None, patience_s) is by_plain
        assert await listener_at(host, int(port), TLS, PATIENCE_S) is by_tls


async def test_each_address_that_fails_is_named_with_who_gave_it_and_what_to_do() -> None:
    refused = f"127.0.0.1:{closed_port()}"
    async for web in answering(b"HTTP/1.1 400 Bad Request\r\n\r\n"):
        said = await why_unreachable(Connection(("no-such-host.invalid:9092", refused, web), request_timeout_ms=10_000))
        assert said.split("; ") == [
            "no-such-host.invalid:9092 has a host name that this machine cannot resolve (bootstrap_servers names it)",
            "check its spelling and this machine's DNS",
            f"{refused} refuses connections: nothing listens there (bootstrap_servers names it)",
            "check host and port, and whether the broker runs",
            f"{web} speaks HTTP, not Kafka (bootstrap_servers names it)",
            "check the port",
        ]
