"""The proxy does to a connection what it says; else the acts on the network prove nothing."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest

from tests.chaos.proxy import Proxy
from tests.support.broker import free_port

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """Before a server that sends everything back."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1000):
            writer.write(chunk)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    proxy = await asyncio.to_thread(Proxy, free_port(), f"{host}:{port}")
    yield proxy
    await asyncio.to_thread(proxy.close)
    server.close()


async def soon(answer: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(answer, 30)


async def connected(proxy: Proxy) -> Streams:
    return await soon(asyncio.open_connection("127.0.0.1", proxy.port))  # type: ignore[no-any-return]


async def echoed(streams: Streams, sent: bytes) -> bytes:
    streams[1].write(sent)
    return await soon(streams[0].read(1000))  # type: ignore[no-any-return]


async def test_the_proxy_passes_bytes_on(proxy: Proxy) -> None:
    assert await echoed(await connected(proxy), b"hello") == b"hello"


async def test_the_proxy_resets_open_connections(proxy: Proxy) -> None:
    streams = await connected(proxy)
    assert await echoed(streams, b"hello") == b"hello"
    await asyncio.to_thread(proxy.reset)
    with pytest.raises(ConnectionResetError):
        await soon(streams[0].read(1000))
    assert await echoed(await connected(proxy), b"again") == b"again"


async def test_the_proxy_holds_bytes_back_and_sends_them_later(proxy: Proxy) -> None:
    streams = await connected(proxy)
    await asyncio.to_thread(proxy.set, swallows=True)
    streams[1].write(b"hello")
    answer = asyncio.create_task(streams[0].read(1000))
    done, _ = await asyncio.wait({answer}, timeout=0.3)
    assert not done
    await asyncio.to_thread(proxy.set)
    assert await soon(answer) == b"hello"


async def test_the_proxy_refuses_connections(proxy: Proxy) -> None:
    await asyncio.to_thread(proxy.set, refuses=True)
    with pytest.raises(ConnectionResetError):  # noqa: PT012 - by the connect or by the read, whichever is later
        reader, _ = await connected(proxy)
        assert await soon(reader.read(1000))


async def test_the_proxy_cuts_a_message_in_half(proxy: Proxy) -> None:
    streams = await connected(proxy)
    await asyncio.to_thread(proxy.cut)
    with pytest.raises((ConnectionResetError, AssertionError)):
        assert await echoed(streams, b"12345678") == b"12345678"
