"""Batches whose partition has no leader: how long they wait, and what counts as possibly written."""

import asyncio
import contextlib
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
    RequestTimedOutError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.producer.transaction_manager import TransactionManager
from aiokafka.structs import PartitionMetadata

from tests.unit.test_exactly_once import producer_record
from worker.kafka.aiokafka_compat import producer as module
from worker.kafka.aiokafka_compat.producer import PatientAccumulator, can_retry, give_up, is_gone, may_be_written
from worker.kafka.connection import Connection
from worker.kafka.producer_records import Columns
from worker.kafka.sink import Sink
from worker.kafka.transactional_sink import TransactionalSink, TransactionFailed
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

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
        self._txn_manager = self
        self.taken_back = 0

    def increment_sequence_number(self, _: TopicPartition, records: int) -> None:
        self.taken_back -= records

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
    producer, columns = FailingProducer(error, is_sent), Columns.of([producer_record(1), producer_record(2)])
    shared: Any = {"limits": {}, "metrics": Metrics(""), "health": Health()}
    sink = Sink(Connection(("x:1",)), **shared)
    assert await sink._send_to(producer, columns, TP, [[0, 1]]) == ([[0, 1]], error)  # type: ignore[arg-type]
    assert shared["metrics"].duplicates_possible._value.get() == in_doubt
    assert producer.taken_back == (2 if isinstance(error, MessageSizeTooLargeError) else 0)

    transactional = TransactionalSink(Connection(("x:1",)), transactional_id="id", **shared)
    transactional._began_at = 0.0
    with pytest.raises(TransactionFailed) if in_doubt else contextlib.nullcontext():
        await transactional._send_to(producer, columns, TP, [[0, 1]])  # type: ignore[arg-type]
    assert shared["metrics"].duplicates_possible._value.get() == in_doubt, "a transaction is aborted, and adds none"


# Batches that were sent, and sent again.


async def sent_again(error: KafkaError) -> tuple[Any, Any]:
    """A producer and a batch of it, which waits for its second try after this answer to its first one."""
    cluster, manager = ClusterMetadata(), TransactionManager(None, 60_000)
    manager.set_pid_and_epoch(1, 0)
    cluster._partitions = {"t": {0: PartitionMetadata("t", 0, 1, [], [], 0)}}
    accumulator = PatientAccumulator(cluster, 1_000, 0, TTL_S, txn_manager=manager)
    builder = accumulator.create_builder()
    builder.append(timestamp=1, key=None, value=b"x")
    await accumulator.add_batch(builder, TP, 1)
    nodes, _ = accumulator.drain_by_nodes(set())
    batch = nodes[1][TP]
    batch.get_data_buffer()
    assert can_retry(SimpleNamespace(_sender=SimpleNamespace(_txn_manager=manager)), error, batch)  # type: ignore[arg-type]
    accumulator.reenqueue(batch)
    return SimpleNamespace(_message_accumulator=accumulator), batch


@pytest.mark.parametrize(
    ("first", "is_in_doubt"), [(RequestTimedOutError(), True), (UnknownTopicOrPartitionError(), False)]
)
async def test_a_refusal_of_the_second_try_says_nothing_of_the_first(first: KafkaError, is_in_doubt: bool) -> None:
    _, batch = await sent_again(first)
    assert may_be_written(batch._builder, TopicAuthorizationFailedError("t")) is is_in_doubt


@pytest.mark.parametrize(
    ("first", "is_given_up"), [(RequestTimedOutError(), False), (UnknownTopicOrPartitionError(), True)]
)
async def test_a_batch_that_may_be_written_is_not_given_up(first: KafkaError, is_given_up: bool) -> None:
    """aiokafka's own list of what is under way stays right, too."""
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
    producer, batch = await sent_again(first)
    give_up(producer, TP)
    await asyncio.sleep(0)
    assert batch.future.done() is is_given_up
    assert not faults
    if is_given_up:
        assert isinstance(batch.future.exception(), UnknownTopicOrPartitionError)


@pytest.mark.parametrize(("answer", "gone"), [(True, True), (False, None), (None, None)])
async def test_a_partition_is_gone_by_a_brokers_answer_alone(
    answer: bool | None, gone: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by what was known before: where no broker answers, or the update hangs, there is no verdict."""
    monkeypatch.setattr(module, "METADATA_WAIT_S", 0.01)
    update, cluster = asyncio.get_running_loop().create_future(), ClusterMetadata()
    cluster._partitions = {"t": {1: PartitionMetadata("t", 1, 1, [], [], 0)}}
    if answer is not None:
        update.set_result(answer)
    producer: Any = SimpleNamespace(client=SimpleNamespace(cluster=cluster, force_metadata_update=lambda: update))
    assert await is_gone(producer, TP, asyncio.get_running_loop().create_future()) is gone
