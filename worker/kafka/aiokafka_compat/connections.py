"""Connections: brokers with other addresses, silent brokers, secrets that change, resets, stops that were interrupted."""

import asyncio
import contextlib
import copy
import functools
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakKeyDictionary

from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.cluster import ClusterMetadata
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import KafkaConnectionError, KafkaError

from worker.kafka.aiokafka_compat.metadata import inner_client
from worker.runtime.file_value import present
from worker.runtime.tasks import cancel_all, within

SILENT_BROKERS_S: Final = 60.0
TLS_END_S: Final = 1.0
LEAST_SHARE: Final = 1 / 6  # of it, for a client that has asked for nothing in so long

# Bootstrapping again. Upstream would have to do it, as the Java client does (KIP-899, KIP-1102).


@dataclass(slots=True)
class _ClientState:
    """What is remembered of one aiokafka client, beside what it remembers itself."""

    metadata_due_at: float = 0.0
    heard_at: float = 0.0
    locks: defaultdict[object, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))


_states: WeakKeyDictionary[AIOKafkaClient, _ClientState] = WeakKeyDictionary()
_ask_known_brokers = AIOKafkaClient._metadata_update


async def update_metadata(
    client: AIOKafkaClient, cluster: ClusterMetadata, topics: Iterable[str] | None, timeout_s: float = SILENT_BROKERS_S
) -> bool:
    """Asks the brokers that a client knows for metadata, and ``bootstrap_servers`` where none of them answers.

    That is at once where all refuse connections, and after ``timeout_s`` without a word where they are silent. aiokafka asks
    ``bootstrap_servers`` at the start alone, and waits for ever once all brokers have other addresses. The client stays the
    same: a consumer remains its group's member, a producer keeps its sequence numbers. Answers False where nobody answers.

    Two requests are ``retry_backoff_ms`` apart, as Kafka's own client has it: aiokafka asks thousands of times a second for
    as long as a batch's partition has no leader.
    """
    state = _states.setdefault(client, _ClientState())
    await asyncio.sleep(max(0.0, state.metadata_due_at - time.monotonic()))
    state.metadata_due_at = time.monotonic() + client._retry_backoff
    state.heard_at = max([state.heard_at, *(connection._last_action for connection in client._conns.values())])
    left_s = state.heard_at + timeout_s - time.monotonic()
    try:
        if await within(max(left_s, timeout_s * LEAST_SHARE), _ask_known_brokers(client, cluster, topics)):
            return True
    except TimeoutError:
        pass
    newcomer = copy.copy(client)  # the same settings, and nothing of what is known or connected
    newcomer.cluster, newcomer._conns = ClusterMetadata(), {}
    newcomer._sync_task = asyncio.current_task()  # else it would start a task of its own
    try:
        await newcomer.bootstrap()
        if not await _ask_known_brokers(newcomer, cluster, topics):
            return False
    except KafkaError:
        return False
    finally:
        _disconnect(newcomer._conns.values())
    moved = [connection for (node, _), connection in client._conns.items() if not _leads_to(node, connection, client)]
    _disconnect(moved)  # requests there fail now, not when they time out
    return True


def _leads_to(node: Any, connection: Any, client: AIOKafkaClient) -> bool:
    broker = client.cluster.broker_metadata(node)
    return broker is not None and (broker.host, broker.port) == (connection.host, connection.port)


_connection_to = AIOKafkaClient._get_conn


async def connection_to(
    client: AIOKafkaClient, node: Any, *, group: Any = ConnectionGroup.DEFAULT, **options: Any
) -> Any:
    """A client's connection to a broker, which is opened if there is none; None if that fails.

    There is one lock for each broker and address. aiokafka has one lock for all brokers: a caller that waits for a silent
    broker holds up all others, and they then go to the old address. Upstream would need a lock for each, too.
    """
    connection = client._conns.get((node, group))
    if connection is not None and connection.connected():
        return connection
    locks = _states.setdefault(client, _ClientState()).locks
    while True:
        broker = client.cluster.broker_metadata(node)
        async with locks[node, group, broker]:
            if broker == client.cluster.broker_metadata(node):
                return await _connection_to(client, node, group=group, **options)


AIOKafkaClient._metadata_update = update_metadata
AIOKafkaClient._get_conn = connection_to
AIOKafkaClient._get_conn_lock = contextlib.nullcontext()


# Passwords and certificates in files that change. aiokafka is given them once, for all connections of a client. Upstream
# would have to take functions that return them.

_connect = AIOKafkaConnection.connect


async def connect(connection: AIOKafkaConnection) -> Any:
    """Opens a connection with what the files have now, where password or TLS context are a FileValue."""
    connection._ssl_context = present(connection._ssl_context)
    connection._sasl_plain_password = present(connection._sasl_plain_password)
    return await _connect(connection)


AIOKafkaConnection.connect = connect


# Writes to a connection that was just reset. uvloop raises RuntimeError there, and aiokafka expects OSError alone.
# Upstream would have to expect it, too.


def _unless_closing(send: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(send)
    def checked(connection: AIOKafkaConnection, *arguments: Any, **options: Any) -> Any:
        if connection._writer is not None and connection._writer.is_closing():
            connection.close(reason=CloseReason.CONNECTION_BROKEN)
            raise KafkaConnectionError(f"Connection at {connection.host}:{connection.port} broken")
        return send(connection, *arguments, **options)

    return checked


AIOKafkaConnection.send = _unless_closing(AIOKafkaConnection.send)
AIOKafkaConnection._send_sasl_token = _unless_closing(AIOKafkaConnection._send_sasl_token)


# The end of a TLS connection. Its transport waits up to 30 s for the broker to end it, too. The broker's message can be lost
# where the answer to a fetch comes in between. Upstream would have to set a deadline.

_close = AIOKafkaConnection.close


def close(connection: AIOKafkaConnection, reason: Any = None, exc: BaseException | None = None) -> Any:
    """Closes a connection as aiokafka does, and breaks off one by TLS that has not ended after TLS_END_S."""
    transport = connection._writer and connection._writer.transport
    closed = _close(connection, reason, exc)
    if transport is not None and connection._ssl_context is not None:
        connection._loop.call_later(TLS_END_S, transport.abort)
    return closed


AIOKafkaConnection.close = close


# What an interrupted stop leaves behind. Upstream would have to close the inner client and cancel tasks in a `finally`.


async def end_remains(client: Any) -> None:
    """Ends the remaining tasks and connections of a producer, consumer or admin client whose stop was cut short."""
    inner = inner_client(client)
    names = ("_sender", "_message_accumulator", "_coordinator", "_fetcher")
    parts = [part for part in (inner, *(getattr(client, name, None) for name in names)) if part is not None]
    await cancel_all([task for task in asyncio.all_tasks() if _runs_a_method_of(parts, task)])
    _disconnect(inner._conns.values())
    inner._conns.clear()


def _runs_a_method_of(parts: list[Any], task: asyncio.Task[Any]) -> bool:
    """Whether the task's function has the name of a part's method, and refers to that part, as to its ``self``.

    Not by its frame's ``f_locals``: before 3.13 that stores a copy of the locals on the frame, so that a batch stays in
    memory until the task ends.
    """
    coroutine = task.get_coro()
    own = [part for part in parts if hasattr(part, getattr(coroutine, "__name__", ""))]
    return any(held is part for held in gc.get_referents(coroutine) for part in own)


def _disconnect(connections: Iterable[Any]) -> None:
    """Disconnects at once, without waiting for what is still to be written."""
    for connection in list(connections):
        connection.close()
        transport = connection._protocol and connection._protocol._transport
        if transport is not None:
            transport.abort()
