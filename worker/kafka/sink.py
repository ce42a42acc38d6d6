"""Kafka out: publishes results and dead letters in order, and returns when each is acknowledged or refused."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    KafkaTimeoutError,
    UnknownError,
    UnknownTopicOrPartitionError,
)
from aiokafka.producer.message_accumulator import BatchBuilder

from worker.kafka.aiokafka_compat.metadata import use_topics
from worker.kafka.aiokafka_compat.producer import give_up, is_gone, may_be_written, reuse_sequence_numbers
from worker.kafka.clients import stop_client
from worker.kafka.connection import UNREACHABLE, Connection, error_name, unreachable
from worker.kafka.output_limits import OutputLimits
from worker.kafka.permissions import add_the_acl, missing_permission
from worker.kafka.producer_records import (
    Columns,
    Indexes,
    ProducerRecord,
    filled,
    indexes_by_partition,
    indexes_by_topic,
    unanswered,
)
from worker.kafka.refusals import LIMITS_MAY_HAVE_CHANGED, REFUSALS
from worker.kafka.topics import TopicLimits
from worker.reasons import Reason
from worker.runtime.backoff import Backoff
from worker.runtime.tasks import cancel_all, within
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

BATCH_BYTES: Final = 1_000_000
RECORDS_PER_PUBLISH: Final = 2_048  # to publish at once: a round of requests costs as much as some dozens of records
STALLED_S: Final = 10.0
PARTITION_CHECK_S: Final = 1.0  # how often brokers are asked whether an unacknowledged batch's partition still exists
RECORDS_PER_PRODUCER: Final = 2**30  # aiokafka's sequence numbers wrap wrongly at 2**31 records of one partition

Pending = dict[TopicPartition, list[Indexes]]  # what is to be sent to each partition, one batch after the other
Failures = dict[TopicPartition, tuple[list[Indexes], BaseException]]  # what has to be sent again, and why


class Sink:
    """An idempotent producer, acks=all. ``publish`` is for one caller at a time.

    A timeout is no failure: the batch may still be on its way, so ``publish`` waits for it as long as it takes. When a
    batch fails for good, and not because it is refused, the producer is replaced before anything is sent again.

    ``limits`` are those of the topics that are published to, as far as they are known.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        limits: Mapping[str, TopicLimits],
        metrics: Metrics,
        health: Health,
        compression_type: str = "none",
        records_per_producer: int = RECORDS_PER_PRODUCER,
    ) -> None:
        self._connection = connection
        self._compression_type = None if compression_type == "none" else compression_type
        self._limits = OutputLimits(connection, limits, compression_type=self._compression_type)
        self._topics = set(limits)  # all that are published to
        self._metrics = metrics
        self._health = health
        self._records_per_producer = records_per_producer
        self._producer: AIOKafkaProducer | None = None
        self._records_sent = 0
        self._unacknowledged: set[TopicPartition] = set()

    async def start(self) -> None:
        """Connects; waits for as long as the brokers are away."""
        self._producer = await self._started_producer()

    async def close(self, timeout_s: float) -> None:
        """Disconnects, within ``timeout_s``."""
        await self._discard_producer(timeout_s)

    async def known_refusals(self, producer_records: Sequence[ProducerRecord]) -> list[Reason | None]:
        """For each of N records, one or more, the reason why its topic is known to refuse it, else None. Sends nothing."""
        return await self._refused_by_limits(Columns.of(producer_records))

    async def publish(self, producer_records: Sequence[ProducerRecord]) -> list[Reason | None]:
        """Publishes N records, those of one output partition in their order.

        Returns for each None when it has been acknowledged by all in-sync replicas, or the reason why the topic refuses it.
        Waits without end for brokers that are away.
        """
        if not producer_records:
            return []
        columns = Columns.of(producer_records)
        answers = await self._refused_by_limits(columns)
        pending = await self._pending(columns, unanswered(answers))
        backoff = Backoff()
        while pending:
            producer = await self._fresh_producer(sum(len(batch) for batches in pending.values() for batch in batches))
            failures = await self._send(producer, columns, pending)
            errors = {type(error) for _, error in failures.values()}
            if not errors <= REFUSALS.keys():
                await self._replace_producer([error for _, error in failures.values()])
            pending = {}
            for tp, (batches, error) in failures.items():
                if rest := self._after_failure(tp.topic, batches, error, answers):
                    pending[tp] = rest
            if failures:
                if not errors <= REFUSALS.keys():
                    await backoff.wait()
                pending = await self._still_pending(columns, pending, errors, answers)
        self._health.working("publish")
        return answers

    # Where records go.

    async def _refused_by_limits(self, columns: Columns) -> list[Reason | None]:
        """For each record the reason why its topic is known to refuse it, else None."""
        answers: list[Reason | None] = [None] * len(columns.topics)
        for index, reason in (await self._limits.refused_by_fresh_limits(columns, unanswered(answers))).items():
            answers[index] = reason
        return answers

    async def _still_pending(
        self,
        columns: Columns,
        pending: Pending,
        errors: set[type[BaseException]],
        answers: list[Reason | None],
    ) -> Pending:
        """What to send again after these failures; notes in ``answers`` what the topics are now known to refuse."""
        if errors & LIMITS_MAY_HAVE_CHANGED:
            await self._limits.refresh(1.0)
        indexes = sorted(index for batches in pending.values() for batch in batches for index in batch)
        for index, reason in self._limits.refused(columns, indexes).items():
            answers[index] = reason
        if not errors <= REFUSALS.keys():  # a topic may have been created again, with other partitions
            return await self._pending(columns, [index for index in indexes if answers[index] is None])
        kept = {
            tp: [[index for index in batch if answers[index] is None] for batch in batches]
            for tp, batches in pending.items()
        }
        return {tp: list(filter(None, batches)) for tp, batches in kept.items() if any(batches)}

    async def _pending(self, columns: Columns, all_indexes: Indexes) -> Pending:
        """These records by the partition that each goes to, as one batch for each partition."""
        pending: Pending = {}
        for topic, indexes in indexes_by_topic(columns.topics, all_indexes).items():
            partitions = await self._partitions(topic)
            for partition, batch in indexes_by_partition(columns, indexes, partitions).items():
                pending[TopicPartition(topic, partition)] = [batch]
        return pending

    async def _partitions(self, topic: str) -> int:
        backoff = Backoff()
        self._topics.add(topic)
        while True:
            producer = await self._fresh_producer(0)
            try:
                return len(await within(self._connection.request_timeout_s, producer.partitions_for(topic)))
            except UNREACHABLE as error:
                self._report(f"no metadata of topic {topic}", error)
                await backoff.wait()

    # Sending.

    async def _send(self, producer: AIOKafkaProducer, columns: Columns, pending: Pending) -> Failures:
        """Sends to all partitions concurrently; returns for each that failed what has to be sent again, and why."""
        sending = [
            asyncio.create_task(self._send_to(producer, columns, tp, batches)) for tp, batches in pending.items()
        ]
        try:
            failures = await asyncio.gather(*sending)
        finally:
            await cancel_all(sending)
        return {tp: failure for tp, failure in zip(pending, failures, strict=True) if failure}

    async def _send_to(
        self, producer: AIOKafkaProducer, columns: Columns, tp: TopicPartition, batches: list[Indexes]
    ) -> tuple[list[Indexes], BaseException] | None:
        """Sends one batch after the other, so that none overtakes an earlier one that has to be sent again.

        Returns None, or what has to be sent again, and why.
        """
        waiting = batches[::-1]
        try:
            while waiting:
                indexes = waiting.pop()
                batch = producer.create_batch()
                room = min(BATCH_BYTES, self._limits.max_message_bytes(tp.topic))
                sent = filled(batch, columns, self._limits.until_doubt(columns, tp.topic, indexes), room)
                if len(sent) < len(indexes):
                    waiting.append(indexes[len(sent) :])
                waiting.append(sent)
                error = await self._delivery_error(producer, tp, await self._enqueue(producer, batch, tp))
                self._limits.learn(columns, tp.topic, sent, error)
                if error is not None:
                    if may_be_written(batch, error):
                        self._handle_doubt(len(sent), error)
                    elif type(error) in REFUSALS:
                        reuse_sequence_numbers(producer, tp, len(sent))
                    return waiting[::-1], error
                waiting.pop()
        except UNREACHABLE as problem:
            return waiting[::-1], problem
        return None

    async def _enqueue(
        self, producer: AIOKafkaProducer, batch: BatchBuilder, tp: TopicPartition
    ) -> asyncio.Future[object]:
        """Hands a batch to aiokafka, once the previous one for this partition has left its queue."""
        batch.close()
        while True:
            try:
                future: asyncio.Future[object] = await producer.send_batch(batch, tp.topic, partition=tp.partition)
            except KafkaTimeoutError as error:  # the previous batch is still waiting, and this one was not accepted
                self._report("publishing is stalled", error)
            except AssertionError:  # aiokafka raises it where the metadata have no such partition
                raise UnknownTopicOrPartitionError(f"{tp.topic}-{tp.partition}") from None
            else:
                self._records_sent += batch.record_count()
                return future

    async def _delivery_error(
        self, producer: AIOKafkaProducer, tp: TopicPartition, future: asyncio.Future[object]
    ) -> BaseException | None:
        """Waits until a batch is acknowledged (None) or has failed for good."""
        began = time.monotonic()
        was_gone = False
        self._unacknowledged.add(tp)
        while not future.done():
            await asyncio.wait({future}, timeout=PARTITION_CHECK_S)
            gone = None if future.done() else await is_gone(producer, tp, future)
            if gone and was_gone:  # one broker may not know a new partition for a moment
                give_up(producer, tp)
            was_gone = was_gone if gone is None else gone
            if not future.done() and time.monotonic() - began >= STALLED_S:
                self._health.failing("publish", "publishing is stalled: the brokers acknowledge nothing")
        self._unacknowledged.discard(tp)
        return future.exception()

    def _handle_doubt(self, records: int, error: BaseException) -> None:
        """Counts records that failed and yet may have been written. Sent again, they may be there twice."""
        self._metrics.duplicates_possible.inc(records)

    def _after_failure(
        self, topic: str, batches: list[Indexes], error: BaseException, answers: list[Reason | None]
    ) -> list[Indexes]:
        """What of a failed partition to send again. A refused batch is halved until the refused record is alone."""
        reason = REFUSALS.get(type(error))
        first, rest = batches[0], batches[1:]
        if reason is None:
            hint = " (is it compacted? Then it takes no record without a key)" if type(error) is UnknownError else ""
            self._report(f"cannot publish to topic {topic}{hint}", error)
            return batches
        self._metrics.kafka_errors.labels("publish").inc()
        if len(first) == 1:
            answers[first[0]] = reason
            return rest
        half = len(first) // 2
        return [first[:half], first[half:], *rest]

    def _report(self, what: str, error: BaseException) -> None:
        """Counts an error, and tells health."""
        self._metrics.kafka_errors.labels("publish").inc()
        self._health.failing("publish", f"{what}: {missing_permission(error, 'WRITE') or error_name(error)}")

    # Producers.

    async def _fresh_producer(self, records: int) -> AIOKafkaProducer:
        """The producer; a new one if there is none, or if its sequence numbers do not suffice for ``records`` more."""
        if self._records_sent + records > self._records_per_producer:
            await self._discard_producer(self._connection.request_timeout_s)
        if self._producer is None:
            self._producer = await self._started_producer()
        return self._producer

    async def _started_producer(self) -> AIOKafkaProducer:
        backoff = Backoff()
        while True:
            try:
                producer = await self._new_producer()
            except ClusterAuthorizationFailedError:  # so brokers refuse a producer that may write to no topic at all
                lacking = f"WRITE on topic {', '.join(sorted(self._topics))}"
                self._health.failing("producer", f"cannot publish: {add_the_acl(lacking)}")
                await backoff.wait()
            except UNREACHABLE as error:
                self._health.failing("producer", unreachable(self._connection, error))
                await backoff.wait()
            else:
                self._health.working("producer")
                self._records_sent = 0
                return producer

    async def _replace_producer(self, errors: Sequence[BaseException]) -> None:
        """Batches have failed with these errors, so the producer's sequence numbers are no longer right."""
        await self._discard_producer(self._connection.request_timeout_s)

    async def _new_producer(self, kind: type[AIOKafkaProducer] = AIOKafkaProducer, **options: Any) -> AIOKafkaProducer:
        """A connected producer; ``options`` are aiokafka's. Raises what is in UNREACHABLE."""
        producer = kind(
            **self._connection.options(),
            acks="all",
            enable_idempotence=True,
            compression_type=self._compression_type,
            max_batch_size=BATCH_BYTES,
            linger_ms=0,
            **options,
        )
        use_topics(producer, self._topics)  # else it asks for all of the cluster's until it sends something
        try:
            await within(self._connection.request_timeout_s, producer.start())
        except BaseException:
            await stop_client(producer, "producer", 5)
            raise
        return producer

    async def _discard_producer(self, timeout_s: float) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await stop_client(producer, "producer", timeout_s)
