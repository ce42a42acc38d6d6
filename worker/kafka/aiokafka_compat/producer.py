"""The producer: batches that may have been written, partitions that are gone, transactions that have failed."""

import asyncio
import time
from collections.abc import Iterable
from itertools import count, starmap, takewhile
from typing import Any, Final
from weakref import WeakSet

import aiokafka.producer.producer
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import BrokerResponseError, KafkaError, NodeNotReadyError, UnknownTopicOrPartitionError
from aiokafka.producer.message_accumulator import BatchBuilder, MessageAccumulator
from aiokafka.producer.sender import SendProduceReqHandler

LARGEST_BATCH_BYTES: Final = 2**31 - 1

# Batches that may have been written. Upstream would never have to give up a batch that an idempotent producer has sent.


class PatientAccumulator(MessageAccumulator):  # type: ignore[misc]
    """Keeps batches, for as long as it takes, until their partition has a leader.

    aiokafka gives a batch up after ``request_timeout_ms``, though it may have been written before the leader went: sent
    again with other sequence numbers, it would be there twice. Here that time runs only while the metadata do not have
    the partition at all, and in transactions, whose abort would wait, too.
    """

    def drain_by_nodes(self, *arguments: Any, **options: Any) -> Any:
        if not (self._txn_manager and self._txn_manager.transactional_id):
            for tp, batches in self._batches.items():
                if self._cluster.leader_for_partition(tp) is not None:
                    batches[0]._ctime = time.monotonic()
        return super().drain_by_nodes(*arguments, **options)


aiokafka.producer.producer.MessageAccumulator = PatientAccumulator


NOT_WRITTEN: Final = (NodeNotReadyError, UnknownTopicOrPartitionError)  # not sent; or refused, or gone with its topic
_in_doubt: WeakSet[BatchBuilder] = WeakSet()
_can_retry = SendProduceReqHandler._can_retry


def can_retry(handler: SendProduceReqHandler, error: KafkaError, batch: Any) -> bool:
    """Notes the batches that may have been written by a try whose response was lost, or said so."""
    if error.retriable and not isinstance(error, NOT_WRITTEN):
        _in_doubt.add(batch._builder)
    may_be: bool = _can_retry(handler, error, batch)
    return may_be


SendProduceReqHandler._can_retry = can_retry


def may_be_written(batch: BatchBuilder, error: BaseException) -> bool:
    """Whether a batch that failed for good may be in its partition: a refusal tells of its last try alone."""
    is_refused = isinstance(error, BrokerResponseError) and not error.retriable
    return batch in _in_doubt or (batch._buffer is not None and not is_refused)


def append_records(
    batch: BatchBuilder,
    timestamps: Iterable[int | None],
    keys: Iterable[bytes | None],
    values: Iterable[bytes | None],
    headers: Iterable[list[tuple[str, bytes | None]]],
) -> int:
    """Appends records, given by columns, to an empty batch until one does not fit; answers how many it took.

    ``BatchBuilder.append`` costs more than twice as much, for it makes a metadata object of each record. Upstream would
    have to take several records at a time.
    """
    records = zip(count(), timestamps, keys, values, headers, strict=False)
    batch._relative_offset = taken = len(list(takewhile(bool, starmap(batch._builder.append, records))))
    return taken


def reuse_sequence_numbers(producer: AIOKafkaProducer, tp: TopicPartition, records: int) -> None:
    """The last batch for a partition was refused and so is not written: the next one takes its sequence numbers.

    Without this the brokers refuse all later batches. Upstream would have to do it, as the Java client does.
    """
    producer._txn_manager.increment_sequence_number(tp, -records)


def batch_bytes(
    compression_type: str | None,
    timestamp: int | None,
    key: bytes | None,
    value: bytes | None,
    headers: list[tuple[str, bytes | None]],
) -> int:
    """The size of a batch of this record alone, compressed as a producer does it; as it is with None."""
    attributes = AIOKafkaProducer._COMPRESSORS[compression_type][1] if compression_type else 0
    batch = BatchBuilder(LARGEST_BATCH_BYTES, attributes)
    append_records(batch, [timestamp], [key], [value], [headers])
    return len(batch._build())


# Partitions that are gone.

METADATA_WAIT_S: Final = 1.0


async def is_gone(producer: AIOKafkaProducer, tp: TopicPartition, unless: asyncio.Future[object]) -> bool | None:
    """Whether a topic is known, and has no such partition any more, by a broker that is asked now.

    None where none answers within METADATA_WAIT_S, or ``unless`` is done before. Upstream would have to ask for
    metadata after an AddPartitionsToTxn that names an unknown partition, which it repeats without end.
    """
    update = producer.client.force_metadata_update()
    await asyncio.wait({unless, update}, timeout=METADATA_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    if unless.done() or not update.done() or not update.result():
        return None
    partitions = producer.client.cluster.partitions_for_topic(tp.topic)
    return partitions is not None and tp.partition not in partitions


def give_up(producer: AIOKafkaProducer, tp: TopicPartition) -> None:
    """Fails what waits for a partition that is gone, but for batches that may have been written: brokers may be wrong.

    Those wait for as long as aiokafka has it, which is ``request_timeout_ms``. Upstream would have to fail the others once
    its metadata say it.
    """
    accumulator = producer._message_accumulator
    while (waiting := accumulator._batches.get(tp)) and waiting[0]._builder not in _in_doubt:
        accumulator._pop_batch(tp).failure(UnknownTopicOrPartitionError(f"{tp.topic}-{tp.partition}"))


# Producers that have failed.


def forget_transaction_error(producer: AIOKafkaProducer) -> None:
    """Keeps asyncio from logging a transaction's error for which nobody waits any more, as one that was never retrieved.

    Upstream would have to retrieve it when the producer stops.
    """
    waiter = producer._txn_manager._transaction_waiter
    if waiter is not None and waiter.done() and not waiter.cancelled():
        waiter.exception()
