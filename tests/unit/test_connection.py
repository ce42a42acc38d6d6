"""What the worker adds to aiokafka's connections."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from aiokafka.conn import AIOKafkaConnection, AIOKafkaProtocol
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.metadata import MetadataRequest
from uvloop import new_event_loop

from tests.support.secure import Authority
from worker.errors import WrongSetting
from worker.kafka.clients import admin_client
from worker.kafka.connection import Connection, tls_context
from worker.runtime.tasks import within


async def write_to_a_connection_that_was_reset() -> None:
    """The transport has gone, and the task that reads from it has not run yet."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None: ...

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    connection = AIOKafkaConnection(host, port, request_timeout_ms=1000)
    connection._reader, connection._writer = await asyncio.open_connection(host, port)
    connection._closed_fut = asyncio.get_running_loop().create_future()
    connection._read_task = asyncio.create_task(asyncio.sleep(0))
    connection._versions = {}
    connection._writer.transport.abort()
    try:
        await connection.send(MetadataRequest())
    finally:
        server.close()


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, new_event_loop], ids=["asyncio", "uvloop"])
def test_a_write_to_a_connection_that_was_reset(factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=factory) as runner, pytest.raises(KafkaConnectionError):
        runner.run(write_to_a_connection_that_was_reset())


async def end_tls_with_a_server_that_does_not(port: int, trust: ssl.SSLContext) -> None:
    loop = asyncio.get_running_loop()
    connection = AIOKafkaConnection("127.0.0.1", port, request_timeout_ms=1000, ssl_context=trust)
    connection._closed_fut = loop.create_future()
    connection._reader = asyncio.StreamReader()
    connection._protocol = AIOKafkaProtocol(connection._closed_fut, connection._reader, loop=loop)
    transport, _ = await loop.create_connection(lambda: connection._protocol, "127.0.0.1", port, ssl=trust)
    connection._writer = asyncio.StreamWriter(transport, connection._protocol, connection._reader, loop)
    connection._read_task = asyncio.create_task(asyncio.sleep(0))
    closed = connection.close()
    connection.close()  # which may be said again
    await within(15, closed)


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, new_event_loop], ids=["asyncio", "uvloop"])
def test_a_tls_connection_ends_though_the_broker_says_nothing(
    factory: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    authority = Authority(tmp_path, "authority")
    certificate, key = authority.issue("broker", ["127.0.0.1"])
    (tmp_path / "both.pem").write_text(certificate + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    is_over = threading.Event()

    def serve(listening: socket.socket) -> None:
        accepted, _ = listening.accept()
        with context.wrap_socket(accepted, server_side=True):
            is_over.wait(60)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        try:
            with asyncio.Runner(loop_factory=factory) as runner:
                trust = tls_context(authority.cafile, None, None, None)
                runner.run(end_tls_with_a_server_that_does_not(listening.getsockname()[1], trust))
        finally:
            is_over.set()
            thread.join(60)


async def test_an_admin_client_asks_for_its_topics_alone_while_a_broker_is_away() -> None:
    """At every try to connect to that broker; without topics of its own a client would ask for all of the cluster's."""
    client = admin_client(Connection(("nowhere:1",)), iter(["a", "b"]))
    assert client._client._topics == {"a", "b"}


@pytest.fixture
def pems(tmp_path: Path) -> dict[str, Path]:
    certificate, key = Authority(tmp_path, "clients").issue_files("worker", password="right")
    for name in ("bad", "other"):
        (tmp_path / name).write_text("-----BEGIN NOTHING-----\n")
    other = Authority(tmp_path, "others").issue_files("other")[1]
    return {"cert": certificate, "key": key, "other": other, "bad": tmp_path / "bad", "missing": tmp_path / "missing"}


@pytest.mark.parametrize(
    ("ca", "cert", "key", "password", "words"),
    [
        ("bad", None, None, None, "ssl_cafile {} cannot be used: it should be a PEM file of certificates"),
        ("missing", None, None, None, "ssl_cafile {} cannot be read (No such file or directory): it should be"),
        ("cert", "bad", "key", "right", "ssl_certfile {} cannot be used: it should be a PEM file of certificates"),
        ("cert", "cert", "bad", None, "ssl_keyfile {} cannot be used: it should be a PEM file with the key"),
        ("cert", "cert", "other", None, "ssl_keyfile {} cannot be used: it should be a PEM file with the key"),
        ("cert", "cert", "key", "wrong", "ssl_keyfile {} cannot be used: it should be a PEM file with the key"),
        ("cert", "cert", "key", None, "WORKER_SSL_KEY_PASSWORD that key's password, if any"),
        ("cert", "cert", None, None, "ssl_certfile {} cannot be used: it should be a PEM file with the key"),
    ],
)
def test_a_file_of_tls_that_cannot_be_used_is_named(
    pems: dict[str, Path], ca: str, cert: str | None, key: str | None, password: str | None, words: str
) -> None:
    files = [pems[name] if name else None for name in (ca, cert, key)]
    with pytest.raises(WrongSetting) as refusal:
        tls_context(*files, password)
    at_fault = {"ssl_cafile": files[0], "ssl_certfile": files[1]}.get(words.split(maxsplit=1)[0], files[2])
    assert words.format(at_fault) in str(refusal.value)
    assert "_ssl.c" not in str(refusal.value)


def test_files_of_tls_that_fit_are_used(pems: dict[str, Path]) -> None:
    assert tls_context(pems["cert"], pems["cert"], pems["key"], "right").check_hostname
