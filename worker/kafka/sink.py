"""Kafka out: publishes results and dead letters in order, and answers when each is acknowledged or refused."""

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import pairwise, starmap, takewhile
from typing import Any, Final, NamedTuple

import numpy as np
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownError,
    UnknownTopicOrPartitionError,
)
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from worker.core.events import Outgoing
from worker.core.partitioner import partitions_for
from worker.kafka.aiokafka_compat import give_up, is_gone, may_be_written, use_topics
from worker.kafka.connection import UNREACHABLE, Backoff, Connection, TopicLimits, read_limits, stopped, unreachable
from worker.reasons import Reason
from worker.runtime.tasks import cancelled, within
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

BATCH_BYTES: Final = 1_000_000
RECORDS_PER_PUBLISH: Final = (
    2_048  # records to publish at once: a round of requests costs as much as some dozens of records
)
STALLED_S: Final = 10.0
LOOK_S: Final = 1.0  # how often an unacknowledged batch's partition is looked for
LIMITS_AGE_S: Final = 30.0
TRUSTED_S: Final = 60.0  # for so long after a refusal this machine's clock decides without the broker
QUIET_S: Final = 60.0  # after so long without a refusal it has ended
SLACK_MS: Final = 60_000.0  # by which timestamps of the same clock may differ
LONGEST_VARINT: Final = 5  # bytes of a length
RECORDS_PER_PRODUCER: Final = 2**30  # aiokafka's sequence numbers wrap wrongly at 2**31 records of one partition

REFUSALS: Final[dict[type[BaseException], Reason]] = {
    MessageSizeTooLargeError: "result_too_large",
    RecordListTooLargeError: "result_too_large",
    InvalidTimestampError: "invalid_timestamp",
}
# After these errors the topic's limits may have changed. UnknownError is Kafka's code 87, which aiokafka does not know: a
# compacted topic refuses a record without a key.
TELLING: Final = {*REFUSALS, UnknownError}


class ProducerRecord(NamedTuple):
    """A record to publish. ``origin`` is the input partition, which decides where a record without a key goes.

    ``offset`` is the input record's, by which transactions recognise it.
    """

    topic: str
    record: Outgoing
    origin: int
    offset: int = -1


Lane = tuple[str, int]  # an output topic's partition, whose records stay in order
Header = tuple[str, bytes | None]
Load = list[int]  # producer_records that go as one batch, by their index


class Columns(NamedTuple):
    """The fields of N producer_records by columns, so that one pass over the records serves all checks."""

    topics: Sequence[str]
    origins: Sequence[int]
    timestamps: Sequence[int | None]
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    headers: Sequence[list[Header]]
    most_bytes: int
    in_doubt: set[int]  # indexes of those whose timestamp is beyond the limits by this machine's clock

    @classmethod
    def of(cls, producer_records: Sequence[ProducerRecord]) -> "Columns":
        """Of one producer_record or more."""
        topics, records, origins, _ = zip(*producer_records, strict=True)
        keys, values, headers, timestamps = zip(*records, strict=True)
        return cls(topics, origins, timestamps, keys, values, headers, most_bytes(keys, values, headers), set())

    @property
    def record(self) -> tuple[Sequence[Any], ...]:
        """The columns that a batch takes, in its order."""
        return self.timestamps, self.keys, self.values, self.headers

    def record_bytes(self, place: int) -> int:
        return record_bytes(self.keys[place], self.values[place], self.headers[place])


def most_bytes(keys: Sequence[bytes | None], values: Sequence[bytes | None], headers: Sequence[list[Header]]) -> int:
    """Upper bound of ``record_bytes`` for each of N records, at a tenth of the cost, for most share their headers."""
    shared = {id(some): some for some in headers}.values()
    rest = max(record_bytes(b"", b"", some) for some in shared)
    return rest + _longest(keys) + _longest(values) + 2 * LONGEST_VARINT


def _longest(column: Sequence[bytes | None]) -> int:
    return max(map(len, filter(None, column) if None in column else column), default=0)  # type: ignore[arg-type]


def record_bytes(key: bytes | None, value: bytes | None, headers: list[Header]) -> int:
    """Upper bound of a record's bytes as a batch of its own, uncompressed."""
    size: int = DefaultRecordBatchBuilder.estimate_size_in_bytes(key, value, headers)
    return size


class TimestampCheck:
    """Which timestamps a topic refuses, by this machine's clock as far as the broker has confirmed it.

    A record's excess is by how many ms its timestamp is beyond the topic's limits. A record whose excess is larger than
    what the broker is known to take is in doubt, and is sent alone. Once the broker has refused one, none in doubt is sent
    for a minute. Where this machine's clock is fast, so is what the broker refuses within the limits, and its like: it is in
    doubt from then on, until the broker takes one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refuses_until = -math.inf
        self.taken_ms = 0.0  # an excess up to which the broker takes records, as far as is known

    def refuses(self) -> bool:
        """Whether records in doubt are refused without being sent."""
        return self._clock() < self._refuses_until

    def learn(self, excess_ms: float, *, is_refused: bool, is_one_sided: bool = True) -> None:
        """What the broker has said of a record. With two limits a fast clock does not tell which one was meant."""
        if not is_refused:
            self.taken_ms = max(self.taken_ms, excess_ms + SLACK_MS if excess_ms > self.taken_ms else 0.0)
        elif excess_ms > self.taken_ms:
            self._refuses_until = self._clock() + TRUSTED_S
        else:  # this machine's clock is fast, or was set meanwhile
            self.taken_ms = min(0.0, excess_ms - SLACK_MS) if is_one_sided else 0.0


class RefusalLog:
    """Logs when a topic begins to refuse results, and when it has refused none for a minute."""

    def __init__(self, topic: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._topic = topic
        self._clock = clock
        self._refused: Counter[Reason] = Counter()
        self._last_at = 0.0

    @property
    def is_active(self) -> bool:
        """Whether a result was refused within the last minute."""
        return bool(self._refused)

    def note(self, reasons: Mapping[Reason, int]) -> None:
        """Takes how many of the records just published were refused, by reason; none if all were taken."""
        for reason in reasons.keys() - self._refused.keys():
            log.warning("results are refused, and become dead letters", extra={"topic": self._topic, "reason": reason})
        self._refused.update(reasons)
        if reasons:
            self._last_at = self._clock()
        elif self._refused and self._clock() - self._last_at >= QUIET_S:
            log.info(
                "no result has been refused for a minute", extra={"topic": self._topic, "were": dict(self._refused)}
            )
            self._refused.clear()


class Sink:
    """An idempotent producer, acks=all. ``publish`` is for one caller at a time.

    A timeout is no failure: the batch may still be on its way, so ``publish`` waits for it as long as it takes. When a
    batch fails for good, the producer's sequence numbers are no longer right; it is replaced before anything is sent again.

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
        checks: defaultdict[str, TimestampCheck] | None = None,
    ) -> None:
        self._connection = connection
        self._limits = limits
        self._topics = set(limits)  # all that are published to
        self._checks = defaultdict(TimestampCheck) if checks is None else checks  # by topic
        self._limits_at = time.monotonic()
        self._metrics = metrics
        self._health = health
        self._compression_type = None if compression_type == "none" else compression_type
        self._records_per_producer = records_per_producer
        self._producer: AIOKafkaProducer | None = None
        self._records_sent = 0
        self._who: Hashable = None  # which of several sinks this is, for health

    async def start(self) -> None:
        """Connects; waits for as long as the brokers are away."""
        self._producer = await self._started_producer()

    async def close(self, timeout_s: float) -> None:
        """Disconnects, within ``timeout_s``."""
        await self._discard_producer(timeout_s)

    async def publish(self, producer_records: Sequence[ProducerRecord]) -> list[Reason | None]:
        """Publishes N records, those of one output partition in their order.

        Answers for each with None when it has been acknowledged by all in-sync replicas, or with the reason why the
        topic refuses it. Waits, without end, for brokers that are away.
        """
        if not producer_records:
            return []
        columns = Columns.of(producer_records)
        answers = await self._refused_by_limits(columns)
        lanes = await self._lanes(columns, unanswered(answers))
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
                errors = {type(error) for _, error in failures.values()}
                if not errors <= REFUSALS.keys():
                    await backoff.wait()
                lanes = await self._left(columns, lanes, errors, answers)
        self._health.well("publish", self._who)
        return answers

    # Where records go.

    async def _refused_by_limits(self, columns: Columns) -> list[Reason | None]:
        """Answers for what the topics are known to refuse, so that it is not sent: each refusal costs a producer."""
        answers: list[Reason | None] = [None] * len(columns.topics)
        places = unanswered(answers)
        refused = self._limited(columns, places)
        if refused and await self._refresh_limits(LIMITS_AGE_S):
            refused = self._limited(columns, places)
        for place, reason in refused.items():
            answers[place] = reason
        return answers

    async def _left(
        self,
        columns: Columns,
        lanes: dict[Lane, list[Load]],
        errors: set[type[BaseException]],
        answers: list[Reason | None],
    ) -> dict[Lane, list[Load]]:
        """What to send again after these failures, and where; answers for what the topics are now known to refuse."""
        if errors & TELLING:
            await self._refresh_limits(1.0)
        places = sorted(place for loads in lanes.values() for load in loads for place in load)
        for place, reason in self._limited(columns, places).items():
            answers[place] = reason
        if not errors <= REFUSALS.keys():  # a topic may have been made anew, with other partitions
            return await self._lanes(columns, [place for place in places if answers[place] is None])
        kept = {lane: [[place for place in load if answers[place] is None] for load in lanes[lane]] for lane in lanes}
        return {lane: list(filter(None, loads)) for lane, loads in kept.items() if any(loads)}

    def _limited(self, columns: Columns, places: Load) -> dict[int, Reason]:
        """Which of the places are known to be refused, and why; notes those that may be as in doubt."""
        columns.in_doubt.clear()
        refused: dict[int, Reason] = {}
        for topic, some in _by_topic(columns.topics, places).items():
            limits = self._limits.get(topic, TopicLimits())
            if limits.is_known:
                refused |= self._beyond(topic, limits, columns, some)
        return refused

    async def _refresh_limits(self, older_than_s: float) -> bool:
        """Reads the topics' limits again if they are older than that; answers whether it tried."""
        if time.monotonic() - self._limits_at <= older_than_s:
            return False
        self._limits_at = time.monotonic()
        try:
            self._limits = await read_limits(self._connection, self._limits)
        except UNREACHABLE as error:
            log.debug("the topics' limits could not be read again", extra={"error": type(error).__name__})
        return True

    def _beyond(self, topic: str, limits: TopicLimits, columns: Columns, places: Load) -> Iterator[tuple[int, Reason]]:
        """Which of the places are beyond a topic's limits, and why."""
        if not limits.is_log_append_time:
            check = self._checks[topic]
            known = [timestamp for timestamp in columns.timestamps if timestamp is not None]
            if known and max(limits.excess_ms(min(known)), limits.excess_ms(max(known))) > check.taken_ms:
                beyond = [place for place in places if self._excess_ms(topic, columns, place) > check.taken_ms]
                if check.refuses():
                    yield from ((place, "invalid_timestamp") for place in beyond)
                else:
                    columns.in_doubt.update(beyond)
        if limits.is_compacted and None in columns.keys:
            yield from ((place, "key_required") for place in places if columns.keys[place] is None)
        if self._compression_type is None and columns.most_bytes > limits.max_message_bytes:
            for place in places:
                if columns.record_bytes(place) > limits.max_message_bytes:
                    yield place, "result_too_large"

    def _excess_ms(self, topic: str, columns: Columns, place: int) -> float:
        timestamp = columns.timestamps[place]
        return -math.inf if timestamp is None else self._limits[topic].excess_ms(timestamp)

    async def _lanes(self, columns: Columns, all_places: Load) -> dict[Lane, list[Load]]:
        lanes: dict[Lane, list[Load]] = {}
        for topic, places in _by_topic(columns.topics, all_places).items():
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
        self._topics.add(topic)
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
        """Sends all lanes concurrently; answers for each that failed with what has to be sent again, and why."""
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
        """Sends one batch after the other, so that none overtakes an earlier one that has to be sent again."""
        waiting = loads[::-1]
        try:
            while waiting:
                load = waiting.pop()
                batch = producer.create_batch()
                taken = self._fill(batch, columns, self._until_doubt(columns, lane[0], load))
                if len(taken) < len(load):
                    waiting.append(load[len(taken) :])
                waiting.append(taken)
                error = await self._outcome(producer, lane, await self._enqueue(producer, batch, lane))
                self._learn(columns, lane[0], taken, error)
                if error is not None:
                    if may_be_written(batch, error):
                        self._note_in_doubt(len(taken))
                    return waiting[::-1], error
                waiting.pop()
        except UNREACHABLE as problem:
            return waiting[::-1], problem
        return None

    def _until_doubt(self, columns: Columns, topic: str, load: Load) -> Load:
        """The part of a load before its first record in doubt, or that record alone if it comes first."""
        if columns.in_doubt:
            taken_ms = self._checks[topic].taken_ms
            for count, place in enumerate(load):
                if place in columns.in_doubt and self._excess_ms(topic, columns, place) > taken_ms:
                    return load[: max(1, count)]
        return load

    def _learn(self, columns: Columns, topic: str, sent: Load, error: BaseException | None) -> None:
        """Learns from a batch's outcome how far this machine's clock is right about timestamps."""
        is_refused = isinstance(error, InvalidTimestampError)
        if topic in self._limits and (is_refused or (error is None and not columns.in_doubt.isdisjoint(sent))):
            excess_ms = max(self._excess_ms(topic, columns, place) for place in sent)
            self._checks[topic].learn(excess_ms, is_refused=is_refused, is_one_sided=self._limits[topic].is_one_sided)

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
            except KafkaTimeoutError as error:  # the previous batch is still waiting, and this one was not accepted
                self._tell("publishing is stalled", error)
            except AssertionError:  # aiokafka's word for it
                raise UnknownTopicOrPartitionError(f"{lane[0]}-{lane[1]}") from None
            else:
                self._records_sent += batch.record_count()
                return future

    async def _outcome(
        self, producer: AIOKafkaProducer, lane: Lane, future: asyncio.Future[object]
    ) -> BaseException | None:
        """Waits until a batch is acknowledged (None) or has failed for good."""
        began, tp = time.monotonic(), TopicPartition(*lane)
        was_gone = False
        while not future.done():
            await asyncio.wait({future}, timeout=LOOK_S)
            gone = None if future.done() else await is_gone(producer, tp, future)
            if gone and was_gone:  # one broker may not know a new partition for a moment
                give_up(producer, tp)
            was_gone = was_gone if gone is None else gone
            if not future.done() and time.monotonic() - began >= STALLED_S:
                self._health.trouble("publish", "publishing is stalled: the brokers acknowledge nothing", self._who)
        return future.exception()

    def _note_in_doubt(self, records: int) -> None:
        """Counts records that may have been written and are sent again by a new producer, which brokers cannot recognise."""
        self._metrics.duplicates_possible.inc(records)

    def _settle_failure(
        self, lane: Lane, loads: list[Load], error: BaseException, answers: list[Reason | None]
    ) -> list[Load]:
        """What of a failed lane to send again. A refused batch is halved until the refused record is alone."""
        reason = REFUSALS.get(type(error))
        first, rest = loads[0], loads[1:]
        if reason is None:
            hint = " (is it compacted? Then it takes no record without a key)" if type(error) is UnknownError else ""
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
        """A connected producer; ``options`` are aiokafka's. Raises what is in UNREACHABLE."""
        producer = AIOKafkaProducer(
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
            await stopped(producer, "producer", 5)
            raise
        return producer

    async def _discard_producer(self, timeout_s: float) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await stopped(producer, "producer", timeout_s)


def _by_topic(topics: Sequence[str], places: Load) -> dict[str, Load]:
    """The places by topic; topics without a place are left out."""
    if places and topics.count(topics[0]) == len(topics):
        return {topics[0]: places}
    found: dict[str, Load] = defaultdict(list)
    for place in places:
        found[topics[place]].append(place)
    return found


def unanswered(answers: Sequence[Reason | None]) -> Load:
    """The places that have no answer yet, and so are to be sent."""
    return [place for place, answer in enumerate(answers) if answer is None]


def _picked(column: Sequence[Any], places: Load) -> Sequence[Any]:
    return column if len(places) == len(column) else [column[place] for place in places]
