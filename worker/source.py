"""Kafka in: assignment, reading with backpressure, commit, lag.

The event loop owns everything here. A partition's records are tied to its ``Assignment``, from the moment the group gives
it to this process until it takes it away: what is read under one assignment is never committed under another.
"""

import asyncio
import contextlib
import logging
import struct
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import (
    CommitFailedError,
    CorruptRecordException,
    GroupAuthorizationFailedError,
    IllegalStateError,
    InvalidSessionTimeoutError,
    KafkaError,
    KafkaTimeoutError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    RecordTooLargeError,
    TopicAuthorizationFailedError,
)

from worker.batching import MicroBatcher
from worker.cluster import UNREACHABLE, Backoff, Connection, unreachable
from worker.health import Health
from worker.metrics import Metrics
from worker.settings import WrongSetting

log = logging.getLogger(__name__)

READ_TIMEOUT_MS: Final = 1_000
READ_RECORDS: Final = 1_000
LAG_INTERVAL_S: Final = 1.0
SILENCE_S: Final = 60.0
EVICTIONS: Final = 3
LAG_TIMEOUT_S: Final = 3.0
NO_PARTITION: Final = 2**31 - 1
LONGEST_POLL_INTERVAL_MS: Final = 2**31 - 1  # health looks after the pipeline; Kafka's own idea of it would evict us
# what aiokafka raises where the bytes of a record or a batch are not as they should be
UNREADABLE: Final = (
    CorruptRecordException,
    RecordTooLargeError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    struct.error,
)


class UnreadableRecord(Exception):
    """A record cannot be read from Kafka; the message says where it is. Exit code 1."""


class Rejoin(Exception):
    """The consumer has to be made anew; the message says why."""


@dataclass(eq=False, slots=True)
class Assignment:
    """One partition, for as long as the group leaves it to this process.

    ``accepts``: its records may set out; ``is_owned``: they may be published and committed. A revocation ends the first
    at once and the second when what is under way has arrived, or the deadline has passed.
    """

    tp: TopicPartition
    accepts: bool = True
    is_owned: bool = True
    delivered: int | None = None  # the next offset to read; None until it is known where to begin
    acknowledged: int | None = None  # the next offset to commit
    committed: int | None = None
    under_way: int = 0  # records taken by the pipeline, and neither acknowledged nor dropped
    uncommitted: int = 0  # records acknowledged since the last commit
    is_out_of_range: bool = False  # the offset to read next is gone
    careful_reads: int = 0  # so many reads of one record each, to find the one that cannot be read
    heard_at: float = field(default_factory=time.monotonic)
    waiting: deque[tuple[int, int]] = field(
        default_factory=deque
    )  # (offset, timestamp) of the first record of each read

    def is_idle(self) -> bool:
        """Nothing read is still to be acknowledged."""
        return self.delivered is not None and self.acknowledged == self.delivered


Chunk = tuple[Assignment, list[ConsumerRecord]]


class Source:
    """Reads the input topics as a member of the group, and commits what the pipeline says has been acknowledged.

    ``run`` does the work; ``next_batch``, ``acknowledge`` and ``drop`` are for the pipeline. On a revocation the records
    that have not set out are dropped, those under way are waited for and committed, within ``revoke_timeout_s``.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        topics: Iterable[str],
        group_id: str,
        metrics: Metrics,
        health: Health,
        group_instance_id: str | None = None,
        auto_offset_reset: str = "earliest",
        isolation_level: str = "read_committed",
        session_timeout_ms: int = 45_000,
        fetch_max_wait_ms: int = 500,
        max_batch_texts: int = 512,
        linger_s: float = 0.01,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._topics = tuple(topics)
        self._group_id = group_id
        self._metrics = metrics
        self._health = health
        self._group_instance_id = group_instance_id
        self._auto_offset_reset = auto_offset_reset
        self._isolation_level = isolation_level
        self._session_timeout_ms = session_timeout_ms
        self._fetch_max_wait_ms = fetch_max_wait_ms
        self._clock = clock
        # revoke deadline < rebalance timeout < request timeout, for JoinGroup waits in a request for the slowest member
        self._rebalance_timeout_ms = int(connection.request_timeout_ms * 0.8)
        self._revoke_timeout_s = connection.request_timeout_s * 0.6
        self._batcher: MicroBatcher[Assignment, ConsumerRecord] = MicroBatcher(max_batch_texts, linger_s)
        self._capacity = 2 * max_batch_texts
        self._consumer: AIOKafkaConsumer | None = None
        self._assignments: dict[TopicPartition, Assignment] = {}
        self._readers: dict[Assignment, asyncio.Task[None]] = {}
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._settled = asyncio.Event()
        self._acknowledged = asyncio.Event()
        self._commit_lock = asyncio.Lock()
        self._fault: asyncio.Future[None] | None = None
        self._is_stopping = False
        self._stopping = asyncio.Event()
        self._evictions: deque[float] = deque(maxlen=EVICTIONS)
        health.hold("group", "not joined yet")

    # For the pipeline.

    async def next_batch(self) -> list[Chunk] | None:
        """The next micro-batch, as runs of records of one assignment each; None once ``stop_taking`` was called.

        Waits for records, and then until the batch is full or its oldest record has lingered.
        """
        while not self._is_stopping:
            closes_at = self._batcher.closes_at()
            now = self._clock()
            if closes_at is not None and closes_at <= now:
                return self._taken(now)
            await self._wait_for_arrival(None if closes_at is None else closes_at - now)
        return None

    def acknowledge(self, assignment: Assignment, next_offset: int, records: int) -> None:
        """Everything of this partition before ``next_offset`` has been published; ``records`` of it just now."""
        assignment.under_way -= records
        if assignment.is_owned:
            assignment.acknowledged = next_offset
            assignment.uncommitted += records
            while assignment.waiting and len(assignment.waiting) > 1 and assignment.waiting[1][0] <= next_offset:
                assignment.waiting.popleft()
            self._acknowledged.set()
        else:
            self._metrics.duplicates_possible.inc(records)
        self._settled.set()

    def drop(self, assignment: Assignment, records: int) -> None:
        """These records go no further, for their partition is being taken away; the next owner reads them again."""
        assignment.under_way -= records
        self._settled.set()

    def stop_taking(self) -> None:
        """No more batches: what has not set out is left to whoever reads the partition next."""
        self._is_stopping = True
        for reader in self._readers.values():
            reader.cancel()
        for assignment in self._assignments.values():
            self._batcher.discard(assignment)
        self._arrived.set()

    # The consumer's life.

    async def run(self) -> None:
        """Keeps a consumer in the group until ``close``. Raises UnreadableRecord, WrongSetting."""
        backoff = Backoff()
        while not self._stopping.is_set():
            try:
                await self._session()
            except Rejoin as reason:
                self._metrics.kafka_errors.labels("consume").inc()
                self._health.trouble("group", f"joining the group again: {reason}")
                await backoff.wait()

    async def close(self, timeout_s: float) -> None:
        """Commits what has been acknowledged and leaves the group; ``run`` then ends. At most ``timeout_s``."""
        self.stop_taking()
        self._stopping.set()
        deadline = time.monotonic() + timeout_s
        await self._commit_before(deadline)
        for assignment in list(self._assignments.values()):
            self._release(assignment)
        await self._stop_consumer(max(1.0, deadline - time.monotonic()))

    async def _session(self) -> None:
        self._fault = asyncio.get_running_loop().create_future()
        consumer = await self._started_consumer()
        self._consumer = consumer
        consumer.subscribe(topics=self._topics, listener=_Listener(self._on_revoked, self._on_assigned))
        tasks = [asyncio.create_task(step) for step in (self._commit_as_acknowledged(), self._watch_lag())]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            ends: list[asyncio.Future[Any]] = [self._fault, *tasks]
            await asyncio.wait([stopping, *ends], return_when=asyncio.FIRST_COMPLETED)
            for done in ends:
                if done.done():
                    done.result()
        finally:
            for task in (stopping, *tasks):
                task.cancel()
            await asyncio.gather(stopping, *tasks, return_exceptions=True)
            if not self._stopping.is_set():
                await self._on_revoked(set(self._assignments))
                await self._stop_consumer(self._connection.request_timeout_s)

    async def _started_consumer(self) -> AIOKafkaConsumer:
        backoff = Backoff()
        while True:
            consumer = AIOKafkaConsumer(
                **self._connection.options(),
                group_id=self._group_id,
                group_instance_id=self._group_instance_id,
                enable_auto_commit=False,
                auto_offset_reset="none",  # aiokafka would reset in silence
                isolation_level=self._isolation_level,
                session_timeout_ms=self._session_timeout_ms,
                heartbeat_interval_ms=min(3_000, self._session_timeout_ms // 3),
                rebalance_timeout_ms=self._rebalance_timeout_ms,
                max_poll_interval_ms=LONGEST_POLL_INTERVAL_MS,
                fetch_max_wait_ms=self._fetch_max_wait_ms,
            )
            try:
                await asyncio.wait_for(consumer.start(), self._connection.request_timeout_s)
            except UNREACHABLE as error:
                self._metrics.kafka_errors.labels("connect").inc()
                self._health.trouble("kafka", unreachable(self._connection, error))
                await _stopped(consumer, 5)
                await backoff.wait()
            except asyncio.CancelledError:
                await _stopped(consumer, 5)
                raise
            else:
                self._health.well("kafka")
                return consumer

    async def _stop_consumer(self, timeout_s: float) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await _stopped(consumer, timeout_s)

    def _fail(self, error: BaseException) -> None:
        if self._fault is not None and not self._fault.done():
            self._fault.set_exception(error)

    # Rebalances.

    async def _on_assigned(self, partitions: set[TopicPartition]) -> None:
        self._metrics.rebalances.inc()
        self._metrics.assigned_partitions.set(len(partitions))
        if self._is_stopping:
            return
        for tp in sorted(partitions):
            assignment = self._assignments[tp] = Assignment(tp)
            reader = self._readers[assignment] = asyncio.create_task(self._read_forever(assignment))
            reader.add_done_callback(self._reader_ended)
        self._health.well("group")
        log.info("assigned", extra={"partitions": _named(partitions)})

    async def _on_revoked(self, partitions: set[TopicPartition]) -> None:
        assignments = [self._assignments[tp] for tp in partitions if tp in self._assignments]
        if not assignments:
            return
        self._look_for_twin()
        deadline = time.monotonic() + self._revoke_timeout_s
        for assignment in assignments:
            assignment.accepts = False
            self._readers.pop(assignment).cancel()
            self._batcher.discard(assignment)
        self._room.set()
        await self._until_settled(assignments, deadline)
        await self._commit_before(deadline)
        for assignment in assignments:
            self._release(assignment)
        log.info("revoked", extra={"partitions": _named(partitions)})

    async def _until_settled(self, assignments: list[Assignment], deadline: float) -> None:
        while any(assignment.under_way for assignment in assignments):
            self._settled.clear()
            try:
                await asyncio.wait_for(self._settled.wait(), deadline - time.monotonic())
            except TimeoutError:
                log.warning(
                    "revoked before everything under way was published",
                    extra={"records": sum(assignment.under_way for assignment in assignments)},
                )
                return

    def _release(self, assignment: Assignment) -> None:
        assignment.accepts = assignment.is_owned = False
        self._metrics.duplicates_possible.inc(assignment.uncommitted)
        self._metrics.forget_partition(assignment.tp.topic, assignment.tp.partition)
        if self._assignments.get(assignment.tp) is assignment:
            del self._assignments[assignment.tp]
        self._metrics.assigned_partitions.set(len(self._assignments))

    def _look_for_twin(self) -> None:
        """Two processes with one instance id throw each other out of the group for ever; one of them has to notice."""
        coordinator = getattr(self._consumer, "_coordinator", None)
        if self._group_instance_id is None or coordinator is None or coordinator.generation > 0:
            return
        now = self._clock()
        self._evictions.append(now)
        if len(self._evictions) == EVICTIONS and now - self._evictions[0] < self._session_timeout_ms / 1000:
            self._fail(
                WrongSetting(
                    f"group_instance_id {self._group_instance_id!r} is used by another process of this group; each "
                    "needs one of its own"
                )
            )

    # Reading.

    def _reader_ended(self, reader: asyncio.Task[None]) -> None:
        if not reader.cancelled() and reader.exception() is not None:
            self._fail(reader.exception())  # type: ignore[arg-type]

    async def _read_forever(self, assignment: Assignment) -> None:
        backoff = Backoff()
        while assignment.accepts:
            try:
                await self._find_place(assignment)
                await self._room.wait()
                await self._read(assignment)
                backoff = Backoff()
            except IllegalStateError:
                return  # a rebalance has begun
            except OffsetOutOfRangeError:
                assignment.is_out_of_range = True
            except NoOffsetForPartitionError:
                assignment.delivered = None
            except UNREADABLE as error:
                self._be_careful(assignment, error)
            except UNREACHABLE as error:
                self._judge(error)
                await backoff.wait()

    def _judge(self, error: BaseException) -> None:
        """What a failed call means: returns where it will do to try again, else raises Rejoin or WrongSetting."""
        if isinstance(error, GroupAuthorizationFailedError):
            self._health.trouble("read", f"no permission to read as group {self._group_id} (ACL)")
        elif isinstance(error, TopicAuthorizationFailedError):
            self._health.trouble("read", f"no permission to read {', '.join(self._topics)} (ACL)")
        elif isinstance(error, InvalidSessionTimeoutError):
            raise WrongSetting(
                f"session_timeout_ms = {self._session_timeout_ms} is outside of what the broker allows "
                "(group.min.session.timeout.ms to group.max.session.timeout.ms)"
            ) from None
        elif isinstance(error, KafkaError) and not isinstance(error, KafkaTimeoutError) and not error.retriable:
            raise Rejoin(_one_line(error)) from error  # the coordination has ended
        else:
            self._health.trouble("kafka", unreachable(self._connection, error))

    async def _find_place(self, assignment: Assignment) -> None:
        if assignment.delivered is None:
            await self._begin(assignment)
        elif assignment.is_out_of_range:
            await self._reset(assignment)

    async def _begin(self, assignment: Assignment) -> None:
        """Where to begin: the committed offset, else as ``auto_offset_reset`` says; records are accepted from there on."""
        consumer = self._live_consumer()
        timeout_s = self._connection.request_timeout_s
        committed = await asyncio.wait_for(consumer.committed(assignment.tp), timeout_s)
        if committed is None:
            offset = await self._end_to_begin_at(assignment.tp)
            log.info("no committed offset", extra={"partition": _name(assignment.tp), "begin_at": offset})
        else:
            offset = committed
        consumer.seek(assignment.tp, offset)
        assignment.delivered = assignment.acknowledged = assignment.committed = offset
        if committed is None and self._auto_offset_reset == "latest":
            assignment.committed = None  # where this process began holds, also if it dies before its first result
            self._acknowledged.set()

    async def _reset(self, assignment: Assignment) -> None:
        gone = assignment.delivered
        offset = await self._end_to_begin_at(assignment.tp)
        self._metrics.offset_resets.inc()
        log.error(
            "the offset to resume from is gone: records may have been deleted before they were read",
            extra={"partition": _name(assignment.tp), "offset": gone, "resume_at": offset},
        )
        self._live_consumer().seek(assignment.tp, offset)
        assignment.is_out_of_range = False
        assignment.delivered = offset
        if not assignment.under_way:
            assignment.acknowledged = offset

    async def _end_to_begin_at(self, tp: TopicPartition) -> int:
        consumer = self._live_consumer()
        find = consumer.beginning_offsets if self._auto_offset_reset == "earliest" else consumer.end_offsets
        offsets: dict[TopicPartition, int] = await asyncio.wait_for(find([tp]), self._connection.request_timeout_s)
        return offsets[tp]

    async def _read(self, assignment: Assignment) -> None:
        # One partition at a time: over several, aiokafka moves one on, raises for the next and loses the first's records.
        # Nothing may be awaited between getmany and what follows: its position has moved.
        limit = 1 if assignment.careful_reads else READ_RECORDS
        fetched = await self._live_consumer().getmany(assignment.tp, timeout_ms=READ_TIMEOUT_MS, max_records=limit)
        self._health.well("read")
        records = fetched.get(assignment.tp)
        if not records or not assignment.accepts or self._is_stopping:
            return
        now = self._clock()
        assignment.careful_reads = max(0, assignment.careful_reads - 1)
        assignment.delivered = records[-1].offset + 1
        assignment.heard_at = now
        assignment.waiting.append((records[0].offset, records[0].timestamp))
        self._batcher.add(assignment, records, now)
        self._metrics.queue_depth["gather"].set(len(self._batcher))
        if len(self._batcher) >= self._capacity:
            self._room.clear()
        self._arrived.set()

    def _be_careful(self, assignment: Assignment, error: Exception) -> None:
        """Back to the next undelivered record, for the position has moved; the second time it is known which one it is."""
        self._metrics.kafka_errors.labels("read").inc()
        if assignment.careful_reads:
            raise UnreadableRecord(
                f"the record of {_name(assignment.tp)} at offset {assignment.delivered}, or in the batch that begins there, "
                f"cannot be read ({type(error).__name__})"
            ) from error
        assignment.careful_reads = READ_RECORDS
        if assignment.delivered is not None and self._consumer is not None:
            self._consumer.seek(assignment.tp, assignment.delivered)

    def _live_consumer(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise IllegalStateError("the consumer has been stopped")
        return self._consumer

    # Micro-batches.

    def _taken(self, now: float) -> list[Chunk]:
        self._metrics.stage_seconds["wait"].observe(now - (self._batcher.oldest() or now))
        chunks = self._batcher.take()
        for assignment, records in chunks:
            assignment.under_way += len(records)
        if len(self._batcher) < self._capacity:
            self._room.set()
        self._metrics.queue_depth["gather"].set(len(self._batcher))
        return chunks

    async def _wait_for_arrival(self, timeout_s: float | None) -> None:
        self._arrived.clear()
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout_s)
        except TimeoutError:
            return

    # Commits.

    async def _commit_as_acknowledged(self) -> None:
        backoff = Backoff()
        while True:
            await self._acknowledged.wait()
            self._acknowledged.clear()
            if await self._commit(self._connection.request_timeout_s):
                backoff = Backoff()
            else:
                await backoff.wait()
                self._acknowledged.set()

    async def _commit_before(self, deadline: float) -> None:
        """A last commit, which may have to wait for one that hangs."""
        with contextlib.suppress(TimeoutError):
            timeout_s = max(0.1, deadline - time.monotonic())
            await asyncio.wait_for(self._commit(timeout_s), timeout_s)

    async def _commit(self, timeout_s: float) -> bool:
        """Commits all that is acknowledged, newest offset alone; one commit at a time. False: to be tried again."""
        async with self._commit_lock:
            due = [
                (assignment, assignment.acknowledged, assignment.uncommitted)
                for assignment in self._assignments.values()
                if assignment.acknowledged is not None and assignment.acknowledged != assignment.committed
            ]
            if not due or self._consumer is None:
                return True
            started = time.monotonic()
            try:
                offsets = {assignment.tp: offset for assignment, offset, _ in due}
                await asyncio.wait_for(self._consumer.commit(offsets), max(0.1, timeout_s))
            except (CommitFailedError, IllegalStateError):
                self._metrics.kafka_errors.labels("commit").inc()
                return True  # the group is rebalancing: the revocation decides
            except UNREACHABLE as error:
                self._metrics.kafka_errors.labels("commit").inc()
                self._health.trouble("commit", f"cannot commit offsets ({type(error).__name__})")
                return False
            self._health.well("commit")
            self._metrics.stage_seconds["commit"].observe(time.monotonic() - started)
            for assignment, offset, records in due:
                assignment.committed = offset
                assignment.uncommitted -= records
            return True

    # Lag.

    async def _watch_lag(self) -> None:
        while True:
            await asyncio.sleep(LAG_INTERVAL_S)
            if self._consumer is None:
                continue
            partitions = list(self._assignments) or [TopicPartition(self._topics[0], 0)]
            try:
                ends = await asyncio.wait_for(self._consumer.end_offsets(partitions), LAG_TIMEOUT_S)
            except UNREACHABLE as error:
                self._metrics.kafka_errors.labels("lag").inc()
                self._health.trouble("kafka", unreachable(self._connection, error))
                continue
            self._health.well("kafka")
            if not self._assignments:
                await self._look_after_membership()
            for tp, end in ends.items():
                if tp in self._assignments:
                    await self._measure(self._assignments[tp], end)

    async def _look_after_membership(self) -> None:
        """Without a partition nobody reads, and aiokafka tells its troubles with the group to readers alone."""
        nowhere = TopicPartition(self._topics[0], NO_PARTITION)
        try:
            await asyncio.wait_for(self._live_consumer().getmany(nowhere, timeout_ms=0), LAG_TIMEOUT_S)
        except (TimeoutError, IllegalStateError):
            return  # a rebalance is going on
        except KafkaError as error:
            self._judge(error)

    async def _measure(self, assignment: Assignment, end: int) -> None:
        if assignment.acknowledged is None or self._consumer is None:
            return
        if assignment.is_idle():
            self._skip_markers(assignment, await self._position(assignment))
        lag = max(0, end - assignment.acknowledged)
        age_s = self._age_s(assignment) if lag else 0.0
        if assignment.is_owned:
            self._metrics.lag(assignment.tp.topic, assignment.tp.partition, lag, age_s)
        now = self._clock()
        if not lag or not assignment.is_idle() or not self._room.is_set():
            assignment.heard_at = now
        elif now - assignment.heard_at > SILENCE_S:
            raise Rejoin(f"{_name(assignment.tp)} has {lag} records and has sent none for {SILENCE_S:g} s")

    async def _position(self, assignment: Assignment) -> int | None:
        try:
            position: int = await asyncio.wait_for(self._live_consumer().position(assignment.tp), 1)
        except (*UNREACHABLE, IllegalStateError):
            return None
        return position

    def _skip_markers(self, assignment: Assignment, position: int | None) -> None:
        """The ends of transactions take up offsets and hold no record: past them, they count as committed."""
        if position is not None and assignment.is_idle() and position > (assignment.delivered or 0):
            assignment.delivered = assignment.acknowledged = position
            self._acknowledged.set()

    @staticmethod
    def _age_s(assignment: Assignment) -> float:
        timestamp = assignment.waiting[0][1] if assignment.waiting else -1
        return max(0.0, time.time() - timestamp / 1000) if timestamp >= 0 else 0.0


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """aiokafka only logs what a listener raises; here it must not raise."""

    def __init__(
        self,
        on_revoked: Callable[[set[TopicPartition]], Coroutine[Any, Any, None]],
        on_assigned: Callable[[set[TopicPartition]], Coroutine[Any, Any, None]],
    ) -> None:
        self._on_revoked = on_revoked
        self._on_assigned = on_assigned

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._on_revoked(revoked)

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        await self._on_assigned(assigned)


async def _stopped(consumer: AIOKafkaConsumer, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(consumer.stop(), timeout_s)
    except UNREACHABLE as error:
        log.warning("the consumer did not stop in time", extra={"error": type(error).__name__})


def _name(tp: TopicPartition) -> str:
    return f"{tp.topic}-{tp.partition}"


def _named(partitions: Iterable[TopicPartition]) -> str:
    return ",".join(_name(tp) for tp in sorted(partitions))


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
