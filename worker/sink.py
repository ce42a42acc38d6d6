"""Kafka out: publishes results and dead letters, in order, and answers when every one is acknowledged or refused."""

import asyncio
import logging
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import pairwise, starmap, takewhile
from typing import Any, Final, NamedTuple

import numpy as np
from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from worker.aiokafka_compat import may_be_written
from worker.cluster import UNREACHABLE, Backoff, Connection, TopicLimits, read_limits, stopped, unreachable
from worker.events import Outgoing, Reason
from worker.health import Health
from worker.metrics import Metrics
from worker.partitioner import partitions_for
from worker.tasks import cancelled, within

log = logging.getLogger(__name__)

BATCH_BYTES: Final = 1_000_000
ROUND: Final = 2_048  # records to publish at once: a round of requests costs what some dozens of them do
STALLED_S: Final = 10.0
LIMITS_AGE_S: Final = 30.0
LONGEST_VARINT: Final = 5  # bytes of a length
RECORDS_PER_PRODUCER: Final = 2**30  # aiokafka's sequence numbers wrap wrongly at 2**31 records of one partition

REFUSALS: Final[dict[type[BaseException], Reason]] = {
    MessageSizeTooLargeError: "result_too_large",
    RecordListTooLargeError: "result_too_large",
    InvalidTimestampError: "invalid_timestamp",
}


class Parcel(NamedTuple):
    """A record on its way out. ``origin`` is the input partition, which places a record that has no key.

    ``offset`` is the input record's, by which transactions know it again.
    """

    topic: str
    record: Outgoing
    origin: int
    offset: int = -1


Lane = tuple[str, int]  # an output topic's partition: what is in one lane stays in order
Header = tuple[str, bytes | None]
Load = list[int]  # parcels that go as one batch, by their place


class Columns(NamedTuple):
    """What N parcels hold, by columns: one pass over the records, instead of one for each question about them."""

    topics: Sequence[str]
    origins: Sequence[int]
    timestamps: Sequence[int | None]
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    headers: Sequence[list[Header]]
    most_bytes: int

    @classmethod
    def of(cls, parcels: Sequence[Parcel]) -> "Columns":
        """Of one parcel or more."""
        topics, records, origins, _ = zip(*parcels, strict=True)
        keys, values, headers, timestamps = zip(*records, strict=True)
        return cls(topics, origins, timestamps, keys, values, headers, most_bytes(keys, values, headers))

    @property
    def record(self) -> tuple[Sequence[Any], ...]:
        """What a batch takes of a record, in its order."""
        return self.timestamps, self.keys, self.values, self.headers

    def record_bytes(self, place: int) -> int:
        return record_bytes(self.keys[place], self.values[place], self.headers[place])


def most_bytes(keys: Sequence[bytes | None], values: Sequence[bytes | None], headers: Sequence[list[Header]]) -> int:
    """Upper bound of ``record_bytes`` for any of N records, at a tenth of the cost: most share their headers."""
    shared = {id(some): some for some in headers}.values()
    rest = max(record_bytes(b"", b"", some) for some in shared)
    return rest + _longest(keys) + _longest(values) + 2 * LONGEST_VARINT


def _longest(column: Sequence[bytes | None]) -> int:
    return max(map(len, filter(None, column) if None in column else column), default=0)  # type: ignore[arg-type]


def record_bytes(key: bytes | None, value: bytes | None, headers: list[Header]) -> int:
    """Upper bound of a record's bytes as a batch of its own, uncompressed."""
    size: int = DefaultRecordBatchBuilder.estimate_size_in_bytes(key, value, headers)
    return size


class Sink:
    """An idempotent producer, acks=all. ``publish`` is for one caller at a time.

    A timeout is no failure: a batch may still be on its way, so its own future is waited for, for as long as it takes. A
    producer whose batch failed for good has lost count of its sequence numbers; it is replaced before anything is sent
    again.
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
        self._limits = limits
        self._limits_at = time.monotonic()
        self._metrics = metrics
        self._health = health
        self._compression_type = None if compression_type == "none" else compression_type
        self._records_per_producer = records_per_producer
        self._producer: AIOKafkaProducer | None = None
        self._records_sent = 0
        self._who: Hashable = None  # of several sinks, for health

    async def start(self) -> None:
        """Connects; waits for as long as the brokers are away."""
        self._producer = await self._started_producer()

    async def close(self, timeout_s: float) -> None:
        """Disconnects, within ``timeout_s``."""
        await self._discard_producer(timeout_s)

    async def publish(self, parcels: Sequence[Parcel]) -> list[Reason | None]:
        """Publishes N records, those of one output partition in their order.

        Answers for each with None when it has been acknowledged by all in-sync replicas, or with the reason why the
        topic refuses it. Waits, without end, for brokers that are away.
        """
        if not parcels:
            return []
        columns = Columns.of(parcels)
        answers = await self._refused_by_limits(columns)
        lanes = await self._lanes(columns, answers)
        backoff = Backoff()
        while lanes:
            producer = await self._fresh_producer(sum(len(load) for loads in lanes.values() for load in loads))
            failures = await self._send(producer, columns, lanes)
            lanes = {}
            for lane, (loads, error) in failures.items():
                rest = self._settle_failure(lane, loads, error, answers)
                if rest:
                    lanes[lane] = rest
            if failures:
                await self._discard_producer(self._connection.request_timeout_s)
            if any(type(error) not in REFUSALS for _, error in failures.values()):
                await backoff.wait()
        self._health.well("publish", self._who)
        return answers

    # Where records go.

    async def _refused_by_limits(self, columns: Columns) -> list[Reason | None]:
        """What the topics are known to refuse is not sent, for a refusal costs the producer its sequence numbers."""
        answers = self._limited(columns)
        if any(answers) and time.monotonic() - self._limits_at > LIMITS_AGE_S:
            await self._refresh_limits()
            answers = self._limited(columns)
        return answers

    def _limited(self, columns: Columns) -> list[Reason | None]:
        answers: list[Reason | None] = [None] * len(columns.topics)
        for topic, places in _by_topic(columns.topics).items():
            limits = self._limits.get(topic, TopicLimits())
            if limits.is_known:
                for place, reason in self._beyond(limits, columns, places):
                    answers[place] = reason
        return answers

    async def _refresh_limits(self) -> None:
        self._limits_at = time.monotonic()
        try:
            self._limits = await read_limits(self._connection, self._limits)
        except UNREACHABLE as error:
            log.debug("the topics' limits could not be read again", extra={"error": type(error).__name__})

    def _beyond(self, limits: TopicLimits, columns: Columns, places: Load) -> Iterator[tuple[int, Reason]]:
        """Those of the places whose records are beyond a topic's limits, and why."""
        if not limits.is_log_append_time:
            now = time.time() * 1000
            oldest, newest = now - limits.timestamp_before_max_ms, now + limits.timestamp_after_max_ms
            known = [now if timestamp is None else timestamp for timestamp in columns.timestamps]
            if min(known) < oldest or max(known) > newest:
                for place in places:
                    timestamp = columns.timestamps[place]
                    if timestamp is not None and not oldest <= timestamp <= newest:
                        yield place, "invalid_timestamp"
        if self._compression_type is None and columns.most_bytes > limits.max_message_bytes:
            for place in places:
                if columns.record_bytes(place) > limits.max_message_bytes:
                    yield place, "result_too_large"

    async def _lanes(self, columns: Columns, answers: list[Reason | None]) -> dict[Lane, list[Load]]:
        lanes: dict[Lane, list[Load]] = {}
        for topic, all_places in _by_topic(columns.topics).items():
            places = [place for place in all_places if answers[place] is None] if any(answers) else all_places
            if not places:
                continue
            keys, origins = (_picked(column, places) for column in (columns.keys, columns.origins))
            partitions = partitions_for(keys, origins, await self._partitions(topic))
            order = np.argsort(partitions, kind="stable")
            partitions = partitions[order]
            begins = [0, *(np.flatnonzero(np.diff(partitions)) + 1).tolist(), len(order)]
            ordered = np.array(places)[order].tolist()
            for begin, end in pairwise(begins):
                lanes[topic, int(partitions[begin])] = [ordered[begin:end]]
        return lanes

    async def _partitions(self, topic: str) -> int:
        backoff = Backoff()
        while True:
            producer = await self._fresh_producer(0)
            try:
                return len(await within(self._connection.request_timeout_s, producer.partitions_for(topic)))
            except UNREACHABLE as error:
                self._tell(f"no metadata of topic {topic}", error)
                await backoff.wait()

    # Sending.

    async def _send(
        self, producer: AIOKafkaProducer, columns: Columns, lanes: Mapping[Lane, list[Load]]
    ) -> dict[Lane, tuple[list[Load], BaseException]]:
        """Sends all lanes side by side; answers with the lanes that failed: what has to be sent again, and why."""
        sending = [
            asyncio.create_task(self._send_lane(producer, columns, lane, loads)) for lane, loads in lanes.items()
        ]
        try:
            outcomes = await asyncio.gather(*sending)
        finally:
            await cancelled(sending)
        return {lane: failure for lane, failure in zip(lanes, outcomes, strict=True) if failure}

    async def _send_lane(
        self, producer: AIOKafkaProducer, columns: Columns, lane: Lane, loads: list[Load]
    ) -> tuple[list[Load], BaseException] | None:
        """One batch after the other: none may overtake what has to be sent again of the one before."""
        waiting = loads[::-1]
        try:
            while waiting:
                load = waiting.pop()
                batch = producer.create_batch()
                taken = self._fill(batch, columns, load)
                if len(taken) < len(load):
                    waiting.append(load[len(taken) :])
                waiting.append(taken)
                error = await self._outcome(await self._enqueue(producer, batch, lane))
                if error is not None:
                    if may_be_written(batch, error):
                        self._note_in_doubt(len(taken))
                    return waiting[::-1], error
                waiting.pop()
        except UNREACHABLE as problem:
            return waiting[::-1], problem
        return None

    def _fill(self, batch: BatchBuilder, columns: Columns, load: Load) -> Load:
        """Puts as much of a load into a batch as the topic takes at once; at least one record."""
        room = min(BATCH_BYTES, self._limits.get(columns.topics[load[0]], TopicLimits()).max_message_bytes)
        append = batch._builder.append
        records = zip(range(len(load)), *(map(column.__getitem__, load) for column in columns.record), strict=True)
        if len(load) * columns.most_bytes <= room:
            taken = len(list(takewhile(bool, starmap(append, records))))
            batch._relative_offset = taken
            return load[:taken]
        for count, record in enumerate(records):
            room -= columns.record_bytes(load[count])
            if (count and room < 0) or append(*record) is None:
                return load[:count]
            batch._relative_offset = count + 1
        return load

    async def _enqueue(self, producer: AIOKafkaProducer, batch: BatchBuilder, lane: Lane) -> asyncio.Future[object]:
        batch.close()
        while True:
            try:
                future: asyncio.Future[object] = await producer.send_batch(batch, lane[0], partition=lane[1])
            except KafkaTimeoutError as error:  # the batch before is still waiting, and this one was not taken
                self._tell("publishing is stalled", error)
            else:
                self._records_sent += batch.record_count()
                return future

    async def _outcome(self, future: asyncio.Future[object]) -> BaseException | None:
        """Waits until a batch is acknowledged or has failed for good."""
        while not future.done():
            await asyncio.wait({future}, timeout=STALLED_S)
            if not future.done():
                self._health.trouble("publish", "publishing is stalled: the brokers acknowledge nothing", self._who)
        return future.exception()

    def _note_in_doubt(self, records: int) -> None:
        """So many may be there, and are sent again by a producer that the brokers do not know."""
        self._metrics.duplicates_possible.inc(records)

    def _settle_failure(
        self, lane: Lane, loads: list[Load], error: BaseException, answers: list[Reason | None]
    ) -> list[Load]:
        """What of a failed lane to send again. A batch that was refused is halved until the refused record is alone."""
        reason = REFUSALS.get(type(error))
        first, rest = loads[0], loads[1:]
        if reason is None:
            is_compacted = self._limits.get(lane[0], TopicLimits()).is_compacted
            hint = " (it is compacted, and takes no record without a key)" if is_compacted else ""
            self._tell(f"cannot publish to topic {lane[0]}{hint}", error)
            return loads
        self._metrics.kafka_errors.labels("publish").inc()
        if len(first) == 1:
            answers[first[0]] = reason
            return rest
        half = len(first) // 2
        return [first[:half], first[half:], *rest]

    def _tell(self, what: str, error: BaseException) -> None:
        self._metrics.kafka_errors.labels("publish").inc()
        why = "no permission (ACL)" if isinstance(error, TopicAuthorizationFailedError) else type(error).__name__
        self._health.trouble("publish", f"{what}: {why}", self._who)

    # Producers.

    async def _fresh_producer(self, records: int) -> AIOKafkaProducer:
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
            except UNREACHABLE as error:
                self._health.trouble("producer", unreachable(self._connection, error))
                await backoff.wait()
            else:
                self._health.well("producer")
                self._records_sent = 0
                return producer

    async def _new_producer(self, **options: Any) -> AIOKafkaProducer:
        """A producer that is connected; ``options`` as of aiokafka. Raises what is in UNREACHABLE."""
        producer = AIOKafkaProducer(
            **self._connection.options(),
            acks="all",
            enable_idempotence=True,
            compression_type=self._compression_type,
            max_batch_size=BATCH_BYTES,
            linger_ms=0,
            **options,
        )
        try:
            await within(self._connection.request_timeout_s, producer.start())
        except BaseException:
            await stopped(producer, "producer", 5)
            raise
        return producer

    async def _discard_producer(self, timeout_s: float) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await stopped(producer, "producer", timeout_s)


def _by_topic(topics: Sequence[str]) -> dict[str, Load]:
    """Where in the topics of N parcels each of them is."""
    if topics.count(topics[0]) == len(topics):
        return {topics[0]: list(range(len(topics)))}
    return {topic: [place for place, name in enumerate(topics) if name == topic] for topic in set(topics)}


def _picked(column: Sequence[Any], places: Load) -> Sequence[Any]:
    return column if len(places) == len(column) else [column[place] for place in places]
