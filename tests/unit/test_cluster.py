"""What the worker adds to aiokafka's connections."""

import asyncio
from collections.abc import Callable

import pytest
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.metadata import MetadataRequest
from uvloop import new_event_loop

from worker import cluster


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
    assert cluster.UNREACHABLE
    with asyncio.Runner(loop_factory=factory) as runner, pytest.raises(KafkaConnectionError):
        runner.run(write_to_a_connection_that_was_reset())


@pytest.mark.parametrize(
    ("config", "retention_ms"),
    [
        ({}, cluster.NO_LIMIT),
        ({"cleanup.policy": "delete", "retention.ms": "604800000"}, 604_800_000),
        ({"cleanup.policy": "compact,delete", "retention.ms": "0"}, 0),
        ({"cleanup.policy": "delete", "retention.ms": "-1"}, cluster.NO_LIMIT),
        ({"cleanup.policy": "compact", "retention.ms": "604800000"}, cluster.NO_LIMIT),
        (
            {"cleanup.policy": "delete", "retention.ms": "1", "message.timestamp.type": "LogAppendTime"},
            cluster.NO_LIMIT,
        ),
    ],
)
def test_retention_is_that_of_topics_that_delete_by_the_producers_time(
    config: dict[str, str | None], retention_ms: int
) -> None:
    assert cluster._parsed_limits(config).retention_ms == retention_ms


async def test_an_admin_client_asks_for_its_topics_alone_while_a_broker_is_away() -> None:
    """At every try to connect to that broker; without topics of its own a client would ask for all of the cluster's."""
    client = cluster.admin_client(cluster.Connection(("nowhere:1",)), iter(["a", "b"]))
    assert client._client._topics == {"a", "b"}
