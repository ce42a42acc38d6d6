"""Batches whose partition has no leader: how long they wait, and what counts as possibly written."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.cluster import ClusterMetadata
from aiokafka.errors import (
    KafkaError,
    LeaderNotAvailableError,
    MessageSizeTooLargeError,
    NotLeaderForPartitionError,
    TopicAuthorizationFailedError,
)
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.producer.transaction_manager import TransactionManager
from aiokafka.structs import PartitionMetadata

from tests.unit.test_transactions import parcel
from worker.aiokafka_compat import PatientAccumulator
from worker.cluster import Connection
from worker.health import Health
from worker.metrics import Metrics
from worker.sink import Columns, Sink
from worker.transactions import PartitionSink, Refusals

TP = TopicPartition("t", 0)
TTL_S = 30.0


async def batch_of(leader: int | None, transactional_id: str | None) -> Any:
    """A batch that is past its time, in an accumulator that has looked for its leader."""
    cluster, manager = ClusterMetadata(), TransactionManager(transactional_id, 60_000)
    manager.set_pid_and_epoch(1, 0)
    if transactional_id:
        manager.begin_transaction()
    if leader is not None:
        cluster._partitions = {"t": {0: PartitionMetadata("t", 0, leader, [], [], 0)}}
    accumulator = PatientAccumulator(cluster, 1_000, 0, TTL_S, txn_manager=manager)
    builder = accumulator.create_builder()
    builder.append(timestamp=1, key=None, value=b"x")
    future = await accumulator.add_batch(builder, TP, 1)
    accumulator._batches[TP][0]._ctime -= 60
    accumulator.drain_by_nodes(set())
    await asyncio.wait({future}, timeout=0.01)
    return future


async def test_a_batch_waits_for_a_leader() -> None:
    assert not (await batch_of(-1, None)).done()


@pytest.mark.parametrize(
    ("leader", "transactional_id", "error"),
    [(None, None, NotLeaderForPartitionError), (-1, "id", LeaderNotAvailableError)],
    ids=["a partition that is gone", "a transaction"],
)
async def test_but_not_for_ever(leader: int | None, transactional_id: str | None, error: type[KafkaError]) -> None:
    assert isinstance((await batch_of(leader, transactional_id)).exception(), error)


class FailingProducer:
    """Has sent each batch, or not, and gives it up with this error."""

    def __init__(self, error: KafkaError, is_sent: bool) -> None:
        self._error = error
        self._is_sent = is_sent

    def create_batch(self) -> BatchBuilder:
        return BatchBuilder(1_000, 0)

    async def send_batch(self, batch: BatchBuilder, topic: str, partition: int) -> Any:
        if self._is_sent:
            batch._build()
        return SimpleNamespace(done=lambda: True, exception=lambda: self._error)


@pytest.mark.parametrize(
    ("error", "is_sent", "in_doubt"),
    [
        (NotLeaderForPartitionError(), True, 2),
        (NotLeaderForPartitionError(), False, 0),
        (KafkaError("Unexpected error during batch delivery"), True, 2),
        (MessageSizeTooLargeError(), True, 0),
        (TopicAuthorizationFailedError("t"), True, 0),
    ],
)
async def test_what_may_be_there_and_is_sent_again_counts(error: KafkaError, is_sent: bool, in_doubt: int) -> None:
    producer, columns = FailingProducer(error, is_sent), Columns.of([parcel(1), parcel(2)])
    shared: Any = {"limits": {}, "metrics": Metrics(""), "health": Health()}
    sinks = [
        Sink(Connection(("x:1",)), **shared),
        PartitionSink(Connection(("x:1",)), tp=TP, transactional_id="id", refusals=Refusals(), **shared),
    ]
    counted = []
    for sink in sinks:
        assert await sink._send_lane(producer, columns, ("t", 0), [[0, 1]]) == ([[0, 1]], error)  # type: ignore[arg-type]
        counted.append(shared["metrics"].duplicates_possible._value.get())
    assert counted == [in_doubt, in_doubt], "a transaction is aborted, and adds none"
