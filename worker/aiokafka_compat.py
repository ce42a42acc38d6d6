"""What aiokafka 0.14 lacks: requests of our own, and what is done to its private attributes.

Each item says why it is here, and what upstream would have to do for it to go.
"""

import asyncio
import contextlib
import copy
import time
from collections.abc import Iterable
from typing import Any, Final

import aiokafka.producer.producer
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.cluster import ClusterMetadata
from aiokafka.errors import BrokerResponseError, KafkaError
from aiokafka.producer.message_accumulator import BatchBuilder, MessageAccumulator

from worker.tasks import cancelled, within

SILENT_BROKERS_S: Final = 60.0
LEAST_SHARE: Final = 1 / 6  # of it, for who has asked for nothing in so long


# Brokers under other addresses. Upstream would have to bootstrap again, as the Java client does (KIP-899, KIP-1102).

_ask_known_brokers = AIOKafkaClient._metadata_update


async def update_metadata(
    client: AIOKafkaClient, cluster: ClusterMetadata, topics: Iterable[str] | None, timeout_s: float = SILENT_BROKERS_S
) -> bool:
    """Asks the brokers that a client knows for metadata, and where none has answered for so long ``bootstrap_servers``.

    aiokafka asks ``bootstrap_servers`` at the start alone, and waits for ever once all brokers have other addresses. The
    client stays the same: a consumer its group's member, a producer with its sequence numbers. False: nobody answers.
    """
    answers = [connection._last_action for connection in client._conns.values()]
    client.heard_at = max([getattr(client, "heard_at", 0.0), *answers])
    left_s = client.heard_at + timeout_s - time.monotonic()
    try:
        if await within(max(left_s, timeout_s * LEAST_SHARE), _ask_known_brokers(client, cluster, topics)):
            return True
    except TimeoutError:
        pass
    newcomer = copy.copy(client)  # the same settings, and nothing of what is known or connected
    newcomer.cluster, newcomer._conns, newcomer.locks = ClusterMetadata(), {}, {}
    newcomer._sync_task = asyncio.current_task()  # or it would start one
    try:
        await newcomer.bootstrap()
        if not await _ask_known_brokers(newcomer, cluster, topics):
            return False
    except KafkaError:
        return False
    finally:
        _disconnect(newcomer._conns.values())
    moved = [connection for (node, _), connection in client._conns.items() if not _leads_to(node, connection, client)]
    _disconnect(moved)  # what is asked there fails now, not when its time is up
    return True


def _leads_to(node: Any, connection: Any, client: AIOKafkaClient) -> bool:
    broker = client.cluster.broker_metadata(node)
    return broker is not None and (broker.host, broker.port) == (connection.host, connection.port)


_connection_to = AIOKafkaClient._get_conn


async def connection_to(
    client: AIOKafkaClient, node: Any, *, group: Any = ConnectionGroup.DEFAULT, **options: Any
) -> Any:
    """A client's connection to a broker, made where there is none; None where that fails.

    One at a time for each broker and address. aiokafka has one lock for all: whoever waits for a broker that is silent holds
    up the others, and those that wait behind it go to the old address. Upstream would have to have a lock for each, too.
    """
    connection = client._conns.get((node, group))
    if connection is not None and connection.connected():
        return connection
    locks = vars(client).setdefault("locks", {})
    while True:
        broker = client.cluster.broker_metadata(node)
        async with locks.setdefault((node, group, broker), asyncio.Lock()):
            if broker == client.cluster.broker_metadata(node):
                return await _connection_to(client, node, group=group, **options)


AIOKafkaClient._metadata_update = update_metadata
AIOKafkaClient._get_conn = connection_to
AIOKafkaClient._get_conn_lock = contextlib.nullcontext()


# What a stop leaves behind. Upstream would have to close the inner client, and to cancel tasks, in a `finally`.


async def end_remains(client: Any) -> None:
    """Ends the tasks and connections that are left of a producer, consumer or admin client whose stop was cut short."""
    inner = getattr(client, "client", None) or client._client
    names = ("_sender", "_message_accumulator", "_coordinator", "_fetcher")
    parts = [part for part in (inner, *(getattr(client, name, None) for name in names)) if part is not None]
    await cancelled([task for task in asyncio.all_tasks() if _runs_a_method_of(parts, task)])
    _disconnect(inner._conns.values())
    inner._conns.clear()


def _runs_a_method_of(parts: list[Any], task: asyncio.Task[Any]) -> bool:
    frame = getattr(task.get_coro(), "cr_frame", None)
    return frame is not None and any(frame.f_locals.get("self") is part for part in parts)


def _disconnect(connections: Iterable[Any]) -> None:
    """At once, also where what is still to be written finds nobody."""
    for connection in list(connections):
        connection.close()
        transport = connection._protocol and connection._protocol._transport
        if transport is not None:
            transport.abort()


# Batches that may have been written. Upstream: an idempotent producer never gives up a batch that it has sent.


class PatientAccumulator(MessageAccumulator):  # type: ignore[misc]
    """Batches that wait, for as long as it takes, for their partition to have a leader.

    aiokafka gives one up after ``request_timeout_ms``, though it may have been written before the leader went: sent again
    with other sequence numbers, it would be there twice. That time now runs while the metadata do not know the partition
    at all, and for a transaction, whose abort would wait, too.
    """

    def drain_by_nodes(self, *arguments: Any, **options: Any) -> Any:
        if not (self._txn_manager and self._txn_manager.transactional_id):
            for tp, batches in self._batches.items():
                if self._cluster.leader_for_partition(tp) is not None:
                    batches[0]._ctime = time.monotonic()
        return super().drain_by_nodes(*arguments, **options)


aiokafka.producer.producer.MessageAccumulator = PatientAccumulator


def may_be_written(batch: BatchBuilder, error: BaseException) -> bool:
    """Whether a batch that failed for good may be in its partition: it was sent, and no broker has refused it."""
    is_refused = isinstance(error, BrokerResponseError) and not error.retriable
    return batch._buffer is not None and not is_refused
