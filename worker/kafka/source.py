"""Kafka in: assignment, reading with backpressure, commit, lag.

The event loop owns everything here. An ``Assignment`` lasts from the moment the group assigns a partition to this process
until it is revoked, and each record belongs to one: what is read under one assignment is never committed under another.
"""

import asyncio
import contextlib
import logging
import math
import struct
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.client import ConnectionGroup
from aiokafka.errors import (
    CommitFailedError,
    CorruptRecordException,
    GroupAuthorizationFailedError,
    GroupCoordinatorNotAvailableError,
    IllegalStateError,
    InconsistentGroupProtocolError,
    InvalidSessionTimeoutError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    LeaderNotAvailableError,
    NodeNotReadyError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    RecordTooLargeError,
    RequestTimedOutError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.structs import OffsetAndMetadata

from worker.core.batching import MicroBatcher
from worker.core.events import age_s
from worker.core.topic_ids import TopicIds, is_of, with_topic_id, without_topic_id
from worker.errors import WrongSetting
from worker.kafka.aiokafka_compat.group import NOT_THE_COORDINATOR, CoordinatorAnswers, InstanceIdTaken, StaticMember
from worker.kafka.aiokafka_compat.metadata import use_topics
from worker.kafka.clients import stop_client
from worker.kafka.connection import UNREACHABLE, Backoff, Connection, unreachable
from worker.kafka.consumer import Consumer
from worker.kafka.decompression import Budget
from worker.kafka.exactly_once import Transactions
from worker.kafka.reader import Reader, Record
from worker.kafka.topics import matching
from worker.runtime.file_descriptors import compared
from worker.runtime.loop_budget import TurnBudget
from worker.runtime.tasks import cancelled, within
from worker.telemetry.health import Health
from worker.telemetry.logs import whereabouts
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

READ_TIMEOUT_MS: Final = 1_000
READ_RECORDS: Final = 1_000
LAG_INTERVAL_S: Final = 1.0
TOPICS_INTERVAL_S: Final = 15.0  # how often a pattern is compared with the cluster's topics, at most
LONGEST_TOPICS_INTERVAL_S: Final = 300.0
TOPICS_SHARE: Final = 200  # or so many times as long as the request took, if that is more: it lists all partitions
TOPIC_IDS_INTERVAL_S: Final = 3.0  # how often the ids of input topics are compared
TOPIC_IDS_DOUBT_S: Final = 1.0  # and while one answer had another id, in which time nothing is read
SILENCE_S: Final = 60.0  # without a record although a partition has some: the consumer is replaced
REJOINS: Final = 3  # in a row without progress in a partition that has records: the process ends
SETTLING_SHARE: Final = 0.75  # of a revocation's time, for what is under way; the rest is for the commit
LEAST_READ: Final = 16
SHARES: Final = 4  # one read takes at most this part of what is read ahead
LEAVE_S: Final = 1.0
LAG_TIMEOUT_S: Final = 3.0  # of a request; also how long a partition's end may be unknown, as while its leader moves
GROUP_INTERVAL_S: Final = 1.0
REJOINING_S: Final = 5.0  # a rebalance that lasts longer makes the worker not ready
COORDINATOR_S: Final = 3.0  # the coordinator is away when it has not answered for so long, and for so many
MISSED_HEARTBEATS: Final = 3  # heartbeats, whichever is longer
REBALANCE_SHARE: Final = 0.4  # of a request's timeout: as long as the group waits for a member to join again
HEARTBEAT_SHARE: Final = 0.25  # of the rebalance's time, until a heartbeat tells the member of it
REVOKE_SHARE: Final = 0.65  # of the rebalance's time, to finish and commit what is under way; the rest is for the join
LISTED: Final = 5  # partitions that a sentence names
MEMBERSHIP: Final = "membership"  # who has the trouble, where no partition does
UNANSWERED: Final = (KafkaConnectionError, NodeNotReadyError, RequestTimedOutError, OSError, asyncio.TimeoutError)
NO_PARTITION: Final = 2**31 - 1
LONGEST_POLL_INTERVAL_MS: Final = 2**31 - 1  # no limit: health watches the pipeline, and Kafka's limit would evict us
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
    """A record cannot be read from Kafka; the message says which. Exit code 1."""


class Rejoin(Exception):
    """The consumer has to be replaced and the group joined again; the message says why."""


class Standstill(Exception):
    """There are records, none is read, and joining the group again did not help; the message says why. Exit code 1."""


@dataclass(eq=False, slots=True)
class Assignment:
    """One partition, for as long as the group assigns it to this process.

    ``accepts``: its records may enter the network; ``is_owned``: they may be published and committed. A revocation ends
    the first at once, and the second when everything under way is committed or the deadline has passed.
    """

    tp: TopicPartition
    accepts: bool = True
    is_owned: bool = True
    delivered: int | None = None  # the next offset to read; None until it is known where to begin
    acknowledged: int | None = None  # the next offset to commit
    committed: int | None = None
    metadata: str = ""  # of each commit: which topic of this name it is
    under_way: int = 0  # records taken by the pipeline, and neither acknowledged nor dropped
    uncommitted: int = 0  # records acknowledged since the last commit
    is_out_of_range: bool = False  # the offset to read next is gone
    careful_reads: int = 0  # so many reads of one record each, to find the one that cannot be read
    heard_at: float = field(default_factory=time.monotonic)
    measured_at: float = field(default_factory=time.monotonic)  # when its end was known the last time
    unpacks_since: float | None = None  # that it has been seen to wait for room to unpack a batch, or for that itself
    # of each read that is not acknowledged: the offset after it, and its first record's timestamp
    waiting: deque[tuple[int, int | None]] = field(default_factory=deque)

    def reach(self, next_offset: int) -> None:
        """Notes that everything before ``next_offset`` is acknowledged."""
        self.acknowledged = next_offset
        while self.waiting and self.waiting[0][0] <= next_offset:
            self.waiting.popleft()

    def is_idle(self) -> bool:
        """Whether everything that was read is acknowledged."""
        return self.delivered is not None and self.acknowledged == self.delivered


Chunk = tuple[Assignment, list[Record]]


class Source:
    """Reads the input topics as a member of the group, and commits what the pipeline says has been acknowledged.

    ``run`` does the work; the pipeline calls ``next_batch``, ``acknowledge`` and ``drop``. A revocation drops the records
    that have not reached the network; the others are published and committed, within its deadline.

    With ``transactions``, these commit instead, and call ``advance`` in place of ``acknowledge``.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        topics: Iterable[str],
        pattern: str | None = None,
        group_id: str,
        turn_budget: TurnBudget,
        metrics: Metrics,
        health: Health,
        group_instance_id: str | None = None,
        auto_offset_reset: str = "earliest",
        isolation_level: str = "read_committed",
        session_timeout_ms: int = 45_000,
        fetch_max_wait_ms: int = 500,
        max_batch_texts: int = 512,
        linger_s: float = 0.01,
        max_unpacked_bytes: int = 256 * 2**20,
        transactions: Transactions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._topics = tuple(topics)
        self._pattern = pattern
        self._group_id = group_id
        self._turn_budget = turn_budget
        self._metrics = metrics
        self._health = health
        self._group_instance_id = group_instance_id
        self._static_member = StaticMember(group_instance_id) if group_instance_id else None
        self._auto_offset_reset = auto_offset_reset
        self._isolation_level = isolation_level
        self._session_timeout_ms = session_timeout_ms
        self._fetch_max_wait_ms = fetch_max_wait_ms
        self._transactions = transactions
        self._clock = clock
        # JoinGroup waits in a request for the slowest member: heartbeat + revoke deadline < rebalance timeout < request
        # timeout. One that was killed and is back makes all others wait for the whole rebalance timeout.
        self._rebalance_timeout_ms = int(connection.request_timeout_ms * REBALANCE_SHARE)
        self._revoke_timeout_s = self._rebalance_timeout_ms / 1000 * REVOKE_SHARE
        self._heartbeat_ms = min(3_000, session_timeout_ms // 3, int(self._rebalance_timeout_ms * HEARTBEAT_SHARE))
        self._batcher: MicroBatcher[Assignment, Record] = MicroBatcher(max_batch_texts, linger_s)
        self._capacity = 2 * max_batch_texts
        self._unpacking = Budget(max_unpacked_bytes)
        self._consumer: AIOKafkaConsumer | None = None
        self._reader: Reader | None = None
        self._assignments: dict[TopicPartition, Assignment] = {}
        self._readers: dict[Assignment, asyncio.Task[None]] = {}
        self._retiring: set[asyncio.Task[None]] = set()  # readers of assignments that were begun anew
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._settled = asyncio.Event()
        self._acknowledged = asyncio.Event()
        self._topic_ids, self._identifying = TopicIds(), asyncio.Lock()
        self._confirming: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._confirmed: Counter[str] = Counter()  # by topic: times that the brokers agreed on the id that is known
        self._commit_lock = asyncio.Lock()
        self._revoking = asyncio.Lock()
        self._fault: asyncio.Future[None] | None = None
        self._is_stopping = False
        self._read_again = 0  # records that were under way when the drain began, and were not committed
        self._stopping = asyncio.Event()
        self._has_joined = False
        self._rejoining_since: float | None = None
        self._away_at = -math.inf  # when no broker answered the last time
        self._answered_at = clock()
        self._is_coordinator_away = False
        self._lost: Mapping[TopicPartition, Exception] = {}  # partitions whose end is not known
        self._positions: dict[TopicPartition, int] = {}  # when the group was last joined again
        self._fruitless: Counter[TopicPartition] = Counter()  # times in a row that this has not moved it, with records
        self._placeless = 0  # sessions in a row in which no place to read from was found
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
        """Everything of this partition before ``next_offset`` has been published, the last ``records`` records just now."""
        assignment.under_way -= records
        if assignment.is_owned:
            assignment.reach(next_offset)
            assignment.uncommitted += records
            self._acknowledged.set()
        else:
            self._repeat(records)
        self._settled.set()

    def advance(self, assignment: Assignment, next_offset: int, records: int) -> None:
        """Everything of this partition before ``next_offset`` has been published and committed."""
        assignment.under_way -= records
        if records:  # an offset alone is acknowledged already, and perhaps a later one too
            assignment.reach(next_offset)
        assignment.committed = next_offset
        self._settled.set()

    def drop(self, assignment: Assignment, records: int) -> None:
        """These records are discarded, as their partition is revoked or begins again, and will be read again."""
        assignment.under_way -= records
        if self._is_stopping:
            self._read_again += records
        self._settled.set()

    def records_held(self) -> int:
        """How many have been read and are neither dropped nor acknowledged."""
        return len(self._batcher) + sum(assignment.under_way for assignment in self._assignments.values())

    def stop_taking(self) -> None:
        """Ends reading; ``next_batch`` then answers None. What no micro-batch has is left to the partition's next owner."""
        self._is_stopping = True
        for reader in self._readers.values():
            reader.cancel()
        for assignment in self._assignments.values():
            self._discard(assignment)
        self._arrived.set()

    # The consumer's life.

    async def run(self) -> None:
        """Keeps a consumer in the group until ``close``. Raises UnreadableRecord, Standstill, TopicRecreated,
        WrongSetting.
        """
        backoff = Backoff()
        while not self._stopping.is_set():
            try:
                await self._session()
            except Rejoin as reason:
                self._metrics.kafka_errors.labels("consume").inc()
                self._health.trouble("group", f"joining the group again: {reason}")
                await backoff.wait()

    async def close(self, timeout_s: float) -> int:
        """Commits what has been acknowledged and leaves the group; ``run`` then ends. At most ``timeout_s``.

        Answers with the number of records that were taken and not committed; the next owner reads them again.
        """
        self.stop_taking()
        self._stopping.set()
        deadline = time.monotonic() + timeout_s
        await self._commit_before(deadline)
        uncommitted = sum(assignment.uncommitted + assignment.under_way for assignment in self._assignments.values())
        uncommitted += self._read_again
        for assignment in list(self._assignments.values()):
            self._release(assignment)
        await self._stop_consumer(max(1.0, deadline - time.monotonic()))
        return uncommitted

    async def _session(self) -> None:
        self._fault = asyncio.get_running_loop().create_future()
        consumer = await self._started_consumer()
        self._consumer, self._reader = consumer, Reader(consumer, self._unpacking)
        self._subscribe(consumer)
        answers = CoordinatorAnswers(consumer, self._clock)
        self._rejoining_since = self._clock() if self._has_joined else None
        steps = [
            self._commit_as_acknowledged(),
            self._watch_lag(),
            self._watch_group(answers),
            self._watch_topic_ids(consumer),
        ]
        if self._pattern is not None:
            steps.append(self._watch_topics(consumer, self._pattern))
        tasks = [asyncio.create_task(step) for step in steps]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            ends: list[asyncio.Future[Any]] = [self._fault, *tasks]
            background = consumer.background_tasks()
            await asyncio.wait([stopping, *ends, *background.values()], return_when=asyncio.FIRST_COMPLETED)
            for done in ends:
                if done.done():
                    done.result()
            if not self._stopping.is_set():
                _raise_ended(background)
        except Rejoin as reason:
            await self._look_for_standstill(reason)
            raise
        finally:
            if not self._fault.cancel():
                self._fault.exception()  # taken, or asyncio says on stderr that nobody has
            await cancelled((stopping, *tasks))
            if not self._stopping.is_set():
                await self._on_revoked(set(self._assignments))
                await self._stop_consumer(self._connection.request_timeout_s)

    async def _look_for_standstill(self, reason: Rejoin) -> None:
        """Raises Standstill where joining again has not moved a partition for REJOINS times, and it has records to read.

        Or has led to none at all. What is not known of a partition, as its end, changes nothing about it.
        """
        self._placeless += 1
        if self._placeless > REJOINS:
            raise Standstill(f"nothing is read, although the group was joined again {REJOINS} times: {reason}")
        assignments = list(self._assignments.values())
        found = await asyncio.gather(*map(self._position, assignments))
        positions = {each.tp: at for each, at in zip(assignments, found, strict=True) if at is not None}
        for tp, is_behind in (await self._behind(positions)).items():
            is_unmoved = is_behind and self._positions.get(tp) == positions[tp]
            self._fruitless[tp] = self._fruitless[tp] + 1 if is_unmoved else 0
        self._positions |= positions
        stuck = [tp for tp in positions if self._fruitless[tp] == REJOINS]
        if stuck:
            raise Standstill(
                f"nothing of {_named(stuck)} is read any more, although there are records and the group was joined again "
                f"{REJOINS} times: {reason}"
            )

    async def _behind(self, positions: dict[TopicPartition, int]) -> dict[TopicPartition, bool]:
        """Whether partitions have records beyond these positions; without those whose end is not known."""
        ends = await self._live_consumer().ends(list(positions), LAG_TIMEOUT_S)
        return {tp: end > positions[tp] for tp, end in ends.items() if not isinstance(end, Exception)}

    def _subscribe(self, consumer: AIOKafkaConsumer) -> None:
        consumer.subscribe(topics=self._topics, listener=_Listener(self._on_revoked, self._on_assigned, self._fail))

    async def _watch_topics(self, consumer: AIOKafkaConsumer, pattern: str) -> None:
        """Subscribes to new topics that match the pattern. A deleted one stays subscribed, and may come back.

        aiokafka's own patterns give partitions up before the listener hears of it, which then can commit nothing, and
        lose all topics when a partition's leader is not known. So this revokes all partitions itself and then subscribes.
        """
        took_s = 0.0
        while True:
            await asyncio.sleep(min(max(TOPICS_INTERVAL_S, TOPICS_SHARE * took_s), LONGEST_TOPICS_INTERVAL_S))
            started = time.monotonic()
            try:
                names = await within(self._connection.request_timeout_s, consumer.topic_names())
            except UNREACHABLE:
                continue  # who looks at the lag tells
            took_s = time.monotonic() - started
            found = [name for name in matching(pattern, names) if name not in self._topics]
            if found:
                log.info("topics have come that match input_pattern", extra={"topics": ",".join(found)})
                while self._assignments:
                    await self._on_revoked(set(self._assignments))
                self._topics = (*self._topics, *found)
                self._subscribe(consumer)

    async def _watch_topic_ids(self, consumer: AIOKafkaConsumer) -> None:
        """Raises TopicRecreated. Commits until then name the old topic's id, so the next start ignores them."""
        while True:
            await asyncio.sleep(TOPIC_IDS_INTERVAL_S)
            topics = {tp.topic for tp in self._assignments}
            with contextlib.suppress(*UNREACHABLE):  # who looks at the lag tells
                self._topic_ids.note(await consumer.topic_ids(topics) if topics else {})

    async def _started_consumer(self) -> Consumer:
        backoff = Backoff()
        while True:
            consumer = Consumer(
                **self._connection.options(),
                group_id=self._group_id,
                group_instance_id=self._group_instance_id,
                enable_auto_commit=False,
                auto_offset_reset="none",  # aiokafka would reset in silence
                isolation_level=self._isolation_level,
                session_timeout_ms=self._session_timeout_ms,
                heartbeat_interval_ms=self._heartbeat_ms,
                rebalance_timeout_ms=self._rebalance_timeout_ms,
                max_poll_interval_ms=LONGEST_POLL_INTERVAL_MS,
                fetch_max_wait_ms=self._fetch_max_wait_ms,
            )
            use_topics(consumer, self._topics)  # else it asks for all of the cluster's until it has subscribed
            try:
                await within(self._connection.request_timeout_s, consumer.start())
            except UNREACHABLE as error:
                self._metrics.kafka_errors.labels("connect").inc()
                self._health.trouble("kafka", unreachable(self._connection, error))
                await stop_client(consumer, "consumer", 5)
                await backoff.wait()
            except asyncio.CancelledError:
                await stop_client(consumer, "consumer", 5)
                raise
            else:
                self._health.well("kafka")
                if self._static_member:
                    self._static_member.guard(consumer)
                return consumer

    async def _stop_consumer(self, timeout_s: float) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        stopping = asyncio.create_task(stop_client(consumer, "consumer", timeout_s))
        try:
            _, waits = await asyncio.wait({stopping}, timeout=LEAVE_S)
            if waits:  # for a join, which waits for the slowest member of the group
                await _leave(consumer)
            await stopping
        finally:
            await cancelled([stopping])

    def _fail(self, error: BaseException) -> None:
        if self._fault is not None and not self._fault.done():
            self._fault.set_exception(error)

    # Rebalances.

    async def _on_assigned(self, partitions: set[TopicPartition]) -> None:
        self._metrics.rebalances.inc()
        self._metrics.assigned_partitions.set(len(partitions))
        self._has_joined, self._rejoining_since = True, None
        if not partitions:
            self._placeless = 0
        if self._is_stopping or self._consumer is None:
            return
        self._topic_ids.ask_again(tp.topic for tp in partitions)
        self._well(MEMBERSHIP)
        for tp in sorted(partitions):
            self._accept(tp)
        self._health.well("group")
        log.info("assigned", extra={"partitions": _named(partitions)})
        exactly_once = self._transactions is not None
        is_enough, files = compared(len(partitions), self._consumer.brokers(), exactly_once=exactly_once)
        if not is_enough:
            log.warning("%s", files)

    def _accept(self, tp: TopicPartition, after: asyncio.Task[None] | None = None) -> None:
        """Begins to read a partition; ``after`` its reader until now has ended."""
        assignment = self._assignments[tp] = Assignment(tp)
        reader = self._readers[assignment] = asyncio.create_task(self._read_forever(assignment, after))
        reader.add_done_callback(self._reader_ended)

    def restart(self, assignment: Assignment) -> None:
        """Discards what was read of a partition, and begins again at its committed offset.

        During a revocation or drain, it only discards.
        """
        if self._assignments.get(assignment.tp) is not assignment:
            return
        is_to_go_on = assignment.accepts and not self._is_stopping
        if not is_to_go_on:
            self._release(assignment)  # the revocation finds nothing to release any more
        elif self._transactions:
            self._transactions.retire(assignment)
        assignment.accepts = assignment.is_owned = False
        self._discard(assignment)
        if len(self._batcher) < self._capacity:
            self._room.set()
        self._assignments.pop(assignment.tp, None)
        reader = self._readers.pop(assignment, None)
        if reader is not None:
            reader.cancel()
            self._retiring.add(reader)
            reader.add_done_callback(self._retiring.discard)
        if is_to_go_on:
            self._accept(assignment.tp, reader)
        self._settled.set()

    async def _on_revoked(self, partitions: set[TopicPartition]) -> None:
        if self._rejoining_since is None and self._has_joined:
            self._rejoining_since = self._clock()
        async with self._revoking:  # the group and the end of a session may both call
            await self._revoke([self._assignments[tp] for tp in partitions if tp in self._assignments])

    async def _revoke(self, assignments: list[Assignment]) -> None:
        if not assignments:
            return
        partitions = [assignment.tp for assignment in assignments]
        started = time.monotonic()
        for assignment in assignments:
            assignment.accepts = False
        # Readers end first: one that lives on would take records of the next assignment.
        # A revocation that was cut short by a session's end has taken them from the dict already.
        readers = [self._readers.pop(assignment) for assignment in assignments if assignment in self._readers]
        if await cancelled([*readers, *self._retiring]):
            self._fail(Rejoin("a reader does not end"))
        for assignment in assignments:
            self._discard(assignment)
        self._room.set()
        if self._transactions:
            self._transactions.settle(assignments)
        await self._until_settled(assignments, started + self._revoke_timeout_s * SETTLING_SHARE)
        await self._commit_before(started + self._revoke_timeout_s)
        for assignment in assignments:
            self._release(assignment)
        log.info("revoked", extra={"partitions": _named(partitions)})

    async def _until_settled(self, assignments: list[Assignment], deadline: float) -> None:
        while any(assignment.under_way for assignment in assignments):
            self._settled.clear()
            try:
                await within(deadline - time.monotonic(), self._settled.wait())
            except TimeoutError:
                log.warning(
                    "revoked before everything under way was published",
                    extra={"records": sum(assignment.under_way for assignment in assignments)},
                )
                return

    def _discard(self, assignment: Assignment) -> None:
        self._batcher.discard(assignment)
        if self._reader is not None:
            self._reader.release(assignment.tp)
        self._metrics.queue_depth["gather"].set(len(self._batcher))

    def _release(self, assignment: Assignment) -> None:
        if not assignment.is_owned:
            return
        assignment.accepts = assignment.is_owned = False
        if self._transactions:
            self._transactions.release(assignment)
        self._repeat(assignment.uncommitted)
        self._metrics.forget_partition(assignment.tp.topic, assignment.tp.partition)
        if self._assignments.get(assignment.tp) is assignment:
            del self._assignments[assignment.tp]
        self._metrics.assigned_partitions.set(len(self._assignments))
        self._well(assignment.tp)
        if not self._assignments:
            self._health.well("commit")

    def _repeat(self, records: int) -> None:
        """These records are published and not committed: the partition's next owner repeats them."""
        self._metrics.duplicates_possible.inc(records)
        if self._is_stopping:
            self._read_again += records

    # Reading.

    def _reader_ended(self, reader: asyncio.Task[None]) -> None:
        if reader.cancelled():
            if reader in self._readers.values() and not self._is_stopping:
                self._fail(Rejoin("a reader was cancelled, and not by this worker"))
        elif (error := reader.exception()) is not None:
            self._fail(error)

    async def _read_forever(self, assignment: Assignment, after: asyncio.Task[None] | None = None) -> None:
        backoff = Backoff()
        if after is not None and await cancelled([after]):
            raise Rejoin("a reader does not end")  # two of one partition would each lose what the other takes
        while assignment.accepts and not self._is_stopping:
            try:
                await self._find_place(assignment)
                await self._until_room()
                if assignment.accepts and not self._is_stopping:
                    await self._read(assignment)
                self._well(assignment.tp)
                backoff = Backoff()
            except IllegalStateError:
                return  # a rebalance has begun
            except OffsetOutOfRangeError:
                assignment.is_out_of_range = True
            except NoOffsetForPartitionError:
                if self._transactions and assignment.delivered is not None:
                    self.restart(assignment)  # where to begin holds for a producer that has done nothing yet alone
                    return
                assignment.delivered = None
            except UNREACHABLE as error:
                if assignment.accepts:
                    self._judge(error, assignment.tp)
                await backoff.wait()

    def _well(self, who: Hashable) -> None:
        for part in ("kafka", "read"):
            self._health.well(part, who)

    def _judge(self, error: BaseException, who: Hashable) -> None:
        """Decides on a failed call: returns if the caller should try again, else raises Rejoin or WrongSetting.

        Health shows the trouble for ``who``, a partition or MEMBERSHIP, until ``_well``, except what a watcher shows.
        """
        if isinstance(error, GroupAuthorizationFailedError):
            self._health.trouble("read", f"no permission to read as group {self._group_id} (ACL)", who)
        elif isinstance(error, TopicAuthorizationFailedError):
            self._health.trouble("read", f"no permission to read {', '.join(self._topics)} (ACL)", who)
        elif isinstance(error, InvalidSessionTimeoutError):
            raise WrongSetting(
                f"session_timeout_ms = {self._session_timeout_ms} is outside of what the broker allows "
                "(group.min.session.timeout.ms to group.max.session.timeout.ms)"
            ) from None
        elif isinstance(error, InstanceIdTaken):
            raise WrongSetting(
                f"group_instance_id {self._group_instance_id!r} is used by another process of this group, which has joined "
                "later and goes on; each needs one of its own"
            ) from None
        elif isinstance(error, InconsistentGroupProtocolError):
            raise Rejoin(
                f"group {self._group_id} has members that share out partitions in another way: another application uses "
                "this group_id, and one of the two needs one of its own"
            ) from error
        elif isinstance(error, KafkaError) and not isinstance(error, KafkaTimeoutError) and not error.retriable:
            raise Rejoin(_one_line(error)) from error  # the coordination has ended
        elif not (isinstance(error, NOT_THE_COORDINATOR) or self._is_coordinator_away or who in self._lost):
            self._health.trouble("kafka", unreachable(self._connection, error), who)

    async def _find_place(self, assignment: Assignment) -> None:
        await self._identify(assignment.tp)
        if assignment.delivered is None:
            await self._begin(assignment)
        elif assignment.is_out_of_range:
            await self._until_idle(assignment)  # what was read before the gap is published and committed first
            await self._reset(assignment)

    async def _until_idle(self, assignment: Assignment) -> None:
        while not assignment.is_idle():
            self._settled.clear()
            await self._settled.wait()

    async def _begin(self, assignment: Assignment) -> None:
        """Where to begin: the committed offset, else as ``auto_offset_reset`` says; records are accepted from there on."""
        topic_id = self._topic_ids.of(assignment.tp.topic)
        assignment.metadata = with_topic_id(topic_id)
        if self._transactions:
            await self._confirm_membership()
            await self._transactions.take_over(assignment)
        consumer = self._live_consumer()
        found = await within(self._connection.request_timeout_s, consumer.committed_offsets([assignment.tp]))
        commit = found[assignment.tp]
        is_to_be_replaced = commit.offset >= 0 and topic_id != "" and without_topic_id(commit.metadata)[0] != topic_id
        if is_to_be_replaced:
            await self._confirm(assignment.tp)
        committed = self._of_this_topic(assignment.tp, commit)
        if self._transactions:
            self._transactions.found(assignment, committed)
        if committed is None:
            offset = await self._end_to_begin_at(assignment.tp)
            log.info("no committed offset", extra={"partition": _name(assignment.tp), "begin_at": offset})
        else:
            offset = committed
        consumer.seek(assignment.tp, offset)
        self._placeless = 0
        assignment.delivered = assignment.acknowledged = assignment.committed = offset
        if is_to_be_replaced or (committed is None and self._auto_offset_reset == "latest"):
            # Where this process began, and in which topic, holds, also if it dies before its first result.
            assignment.committed = None
            self._acknowledged.set()

    async def _identify(self, tp: TopicPartition, *, anew: bool = False) -> None:
        """Waits until it is certain which topic has this name; it is asked once for all that are read.

        Raises TopicRecreated, and what is in UNREACHABLE.
        """
        topic = tp.topic
        if anew:
            self._topic_ids.ask_again([topic])
        while not self._topic_ids.is_certain(topic):
            async with self._identifying:
                if self._topic_ids.is_certain(topic):
                    return
                answer = await self._live_consumer().topic_ids({topic, *(tp.topic for tp in self._assignments)})
                self._topic_ids.note(answer)
                if topic not in answer:
                    raise UnknownTopicOrPartitionError  # for a moment
                if not self._topic_ids.is_certain(topic):
                    self._tell_of_doubt(tp)
                    await asyncio.sleep(TOPIC_IDS_DOUBT_S)

    async def _confirm(self, tp: TopicPartition) -> None:
        """Waits until the brokers agree that the topic has the id that is known, for one alone may be behind them.

        Raises as ``_identify``. Those who wait for one topic share what is asked after they have come.
        """
        topic, lock = tp.topic, self._confirming[tp.topic]
        due = self._confirmed[topic] + (2 if lock.locked() else 1)
        while self._confirmed[topic] < due:
            async with lock:
                if self._confirmed[topic] >= due:
                    return
                await asyncio.sleep(TOPIC_IDS_DOUBT_S)
                agreed = await self._live_consumer().agreed_topic_id(topic)
                if agreed is not None:
                    self._topic_ids.note({topic: agreed})
                if agreed is not None and self._topic_ids.is_certain(topic):
                    self._confirmed[topic] += 1
                else:
                    self._tell_of_doubt(tp)

    def _tell_of_doubt(self, tp: TopicPartition) -> None:
        self._health.trouble("read", f"the brokers do not agree on which topic has the name {tp.topic}", tp)

    def _of_this_topic(self, tp: TopicPartition, committed: OffsetAndMetadata) -> int | None:
        """A committed offset; None for none, or for one of another topic, which had this name before."""
        if not is_of(self._topic_ids.of(tp.topic), committed.metadata):
            self._metrics.offset_resets.inc()
            log.warning(
                "the input topic was deleted and made again since this offset was committed: it counts as none"
                + ("; auto_offset_reset=latest skips what is in it" if self._auto_offset_reset == "latest" else ""),
                extra={"partition": _name(tp), "offset": committed.offset, "metadata": committed.metadata},
            )
            return None
        return committed.offset if committed.offset >= 0 else None

    async def _confirm_membership(self) -> None:
        """A member that was evicted and has not heard of it yet must not fence the partition's new owner."""
        coordinator = self._live_consumer()._coordinator
        if await within(self._connection.request_timeout_s, coordinator._do_heartbeat()):
            return
        if coordinator.generation <= 0:
            raise IllegalStateError("no longer a member of the group")
        raise GroupCoordinatorNotAvailableError

    async def _reset(self, assignment: Assignment) -> None:
        await self._identify(assignment.tp, anew=True)
        gone = assignment.delivered
        offset = await self._end_to_begin_at(assignment.tp)
        self._metrics.offset_resets.inc()
        log.error(
            "the offset to resume from is gone: records may have been deleted before they were read",
            extra={"partition": _name(assignment.tp), "offset": gone, "resume_at": offset},
        )
        self._live_consumer().seek(assignment.tp, offset)
        assignment.is_out_of_range = False
        assignment.delivered = assignment.acknowledged = offset
        self._acknowledged.set()

    async def _end_to_begin_at(self, tp: TopicPartition) -> int:
        consumer = self._live_consumer()
        find = consumer.beginning_offsets if self._auto_offset_reset == "earliest" else consumer.end_offsets
        offsets: dict[TopicPartition, int] = await within(self._connection.request_timeout_s, find([tp]))
        return offsets[tp]

    async def _read(self, assignment: Assignment) -> None:
        # One partition at a time: with several, aiokafka loses the records of the first if it raises for the next.
        # Nothing may be awaited between the read and what follows, for the position has moved.
        limit = (lambda: 1) if assignment.careful_reads else self._share
        try:
            records = await self._live_reader().read(assignment.tp, timeout_ms=READ_TIMEOUT_MS, limit=limit)
        except UNREADABLE as error:
            self._be_careful(assignment, error)
            return
        self._turn_budget.after(len(records))
        if not records or not assignment.accepts or self._is_stopping:
            return
        now = self._clock()
        assignment.careful_reads = max(0, assignment.careful_reads - 1)
        assignment.delivered = records[-1].offset + 1
        assignment.heard_at = now
        assignment.waiting.append((assignment.delivered, records[0].timestamp))
        self._batcher.add(assignment, records, now)
        self._metrics.queue_depth["gather"].set(len(self._batcher))
        if len(self._batcher) >= self._capacity:
            self._room.clear()
        self._arrived.set()

    async def _until_room(self) -> None:
        """Waits for room. Readers take turns: they wake in the order in which they came; who finds no room queues again.

        Yields even if there is room, for reading what is already fetched never waits.
        """
        await asyncio.sleep(0)
        while not self._room.is_set():
            await self._room.wait()

    def _share(self) -> int:
        """How many records one read takes: small reads cost more per record, large ones make other partitions wait."""
        room = self._capacity - len(self._batcher)
        return min(READ_RECORDS, max(LEAST_READ, min(room, self._capacity // SHARES)))

    def _be_careful(self, assignment: Assignment, error: Exception) -> None:
        """Seeks back to the next undelivered record, to read one by one; raises UnreadableRecord the second time.

        Raises IllegalStateError if the partition is no longer this process's: its next owner meets the record.
        """
        self._metrics.kafka_errors.labels("read").inc()
        self._live_consumer().seek(assignment.tp, assignment.delivered)
        if assignment.careful_reads:
            raise UnreadableRecord(
                f"the record of {_name(assignment.tp)} at offset {assignment.delivered}, or in the batch that begins there, "
                f"cannot be read ({type(error).__name__})"
            ) from error
        assignment.careful_reads = READ_RECORDS

    def _live_consumer(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise IllegalStateError("the consumer has been stopped")
        return self._consumer

    def _live_reader(self) -> Reader:
        if self._consumer is None or self._reader is None:
            raise IllegalStateError("the consumer has been stopped")
        return self._reader

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
            await within(timeout_s, self._arrived.wait())
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
        """The last commit; it may first have to wait for one under way. Raises nothing at the deadline."""
        with contextlib.suppress(TimeoutError):
            timeout_s = max(0.1, deadline - time.monotonic())
            await within(timeout_s, self._commit(timeout_s))

    async def _commit(self, timeout_s: float) -> bool:
        """Commits the newest acknowledged offset of each partition; one commit at a time. False: try again."""
        async with self._commit_lock:
            due = [
                (assignment, assignment.acknowledged, assignment.uncommitted)
                for assignment in self._assignments.values()
                if assignment.acknowledged is not None and assignment.acknowledged != assignment.committed
            ]
            if not due or self._consumer is None:
                return True
            if self._transactions:
                # Offsets without records, by the partitions' producers too: one way for all offsets keeps them in order.
                offsets_alone = self._transactions.commit((assignment, offset) for assignment, offset, _ in due)
                try:
                    await within(timeout_s, offsets_alone)
                except TimeoutError:
                    return False
                return True
            started = time.monotonic()
            try:
                offsets = {assignment.tp: (offset, assignment.metadata) for assignment, offset, _ in due}
                await within(max(0.1, timeout_s), self._consumer.commit(offsets))
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
            partitions = list(self._assignments) or [TopicPartition(self._known_topic(), 0)]
            ends = await self._consumer.ends(partitions, LAG_TIMEOUT_S)
            errors = {tp: end for tp, end in ends.items() if isinstance(end, Exception)}
            self._tell_of_ends(errors, is_answered=len(errors) < len(ends))
            if not self._assignments:
                await self._look_after_membership()
            for tp, end in ends.items():
                if tp in self._assignments and not isinstance(end, Exception):
                    await self._measure(self._assignments[tp], end)

    def _tell_of_ends(self, errors: Mapping[TopicPartition, Exception], *, is_answered: bool) -> None:
        """Tells health whether the brokers answer and which partitions cannot be read; removes their lag."""
        now = self._clock()
        if errors:
            self._metrics.kafka_errors.labels("lag").inc()
        overdue = [
            tp for tp in errors if tp in self._assignments and now - self._assignments[tp].measured_at > LAG_TIMEOUT_S
        ]
        for tp in overdue:
            self._metrics.forget_partition(tp.topic, tp.partition)
            self._assignments[tp].heard_at = now  # its silence counts from when its end is known again
        if not is_answered and all(isinstance(error, UNANSWERED) for error in errors.values()):
            self._away_at = now
            if now - self._answered_at > LAG_TIMEOUT_S:
                self._health.trouble("kafka", unreachable(self._connection, next(iter(errors.values()))), "lag")
            return  # single partitions add nothing
        self._answered_at = now
        self._health.well("kafka", "lag")
        if errors and now - self._away_at <= LAG_TIMEOUT_S:
            return  # the brokers are just back, and their leaders may not be
        self._lost = {tp: errors[tp] for tp in overdue if not isinstance(errors[tp], TopicAuthorizationFailedError)}
        if self._lost:  # who reads tells of a missing permission
            self._health.trouble("partitions", _why_lost(self._lost))
        else:
            self._health.well("partitions")

    async def _watch_group(self, answers: CoordinatorAnswers) -> None:
        """Tells health that the group's coordinator is away, or that a rebalance, in which nobody reads, takes long."""
        patience_s = max(COORDINATOR_S, MISSED_HEARTBEATS * self._heartbeat_ms / 1000)
        while True:
            await asyncio.sleep(GROUP_INTERVAL_S)
            now = self._clock()
            if answers.has_answered and now - answers.at <= patience_s:
                self._is_coordinator_away = False
                self._health.well("coordinator")
            elif not answers.is_joining and now - max(answers.at, self._away_at) > patience_s:
                self._is_coordinator_away = True
                self._health.trouble(
                    "coordinator", f"the coordinator of group {self._group_id} has not answered for {patience_s:g} s"
                )
            since = self._rejoining_since
            is_rebalancing = answers.is_joining or self._revoking.locked()
            is_known_why = not is_rebalancing and now - answers.at > REJOINING_S  # the coordinator, or Kafka, is away
            if since is not None and not is_known_why and not self._is_stopping and now - since > REJOINING_S:
                self._health.trouble("group", f"rejoining for more than {REJOINING_S:g} s: a member is gone or busy")

    def _known_topic(self) -> str:
        """An input topic that exists: asking for a deleted one would look like an outage."""
        cluster = self._live_consumer()._client.cluster
        return next((name for name in self._topics if cluster.partitions_for_topic(name)), self._topics[0])

    async def _look_after_membership(self) -> None:
        """Asks aiokafka for group errors, which it raises only to readers: without a partition nobody reads."""
        nowhere = TopicPartition(self._topics[0], NO_PARTITION)
        try:
            await within(LAG_TIMEOUT_S, self._live_consumer().getmany(nowhere, timeout_ms=0))
        except (TimeoutError, IllegalStateError):
            return  # a rebalance is going on
        except KafkaError as error:
            self._judge(error, MEMBERSHIP)
        else:
            self._well(MEMBERSHIP)

    async def _measure(self, assignment: Assignment, end: int) -> None:
        assignment.measured_at = self._clock()
        if assignment.acknowledged is None or self._consumer is None:
            return
        if assignment.is_idle():
            self._skip_markers(assignment, await self._position(assignment))
        lag = max(0, end - assignment.acknowledged)
        age_s = self._age_s(assignment) if lag else 0.0
        if assignment.is_owned:
            self._metrics.lag(assignment.tp.topic, assignment.tp.partition, lag, age_s)
        now = self._clock()
        unpacks_since = self._unpacks_since(assignment, now)
        if unpacks_since is not None and now - unpacks_since > SILENCE_S:  # joining again would not make room
            why = f"{_name(assignment.tp)} has waited {SILENCE_S:g} s for room to unpack a batch (max_unpacked_bytes)"
            self._health.trouble("read", why, assignment.tp)
        if not lag or not assignment.is_idle() or not self._room.is_set() or unpacks_since is not None:
            assignment.heard_at = now
        elif now - assignment.heard_at > SILENCE_S:
            raise Rejoin(f"{_name(assignment.tp)} has {lag} records and has sent none for {SILENCE_S:g} s")

    def _unpacks_since(self, assignment: Assignment, now: float) -> float | None:
        is_unpacking = self._reader is not None and assignment.tp in self._reader.waiting
        since = now if assignment.unpacks_since is None else assignment.unpacks_since
        assignment.unpacks_since = since if is_unpacking else None
        return assignment.unpacks_since

    async def _position(self, assignment: Assignment) -> int | None:
        try:
            position: int = await within(1, self._live_consumer().position(assignment.tp))
        except (*UNREACHABLE, IllegalStateError):
            return None
        return position

    def _skip_markers(self, assignment: Assignment, position: int | None) -> None:
        """Moves on past transaction markers, which have offsets and are not records.

        Not during a revocation or drain: then the position may be past records that were read and discarded.
        """
        if not assignment.accepts or self._is_stopping:
            return
        if position is not None and assignment.is_idle() and position > (assignment.delivered or 0):
            assignment.delivered = assignment.acknowledged = position
            self._acknowledged.set()

    @staticmethod
    def _age_s(assignment: Assignment) -> float:
        """By the first unacknowledged read with a plausible timestamp; 0 if there is none."""
        now = time.time()
        return next((age for _, timestamp in assignment.waiting if (age := age_s(timestamp, now)) is not None), 0.0)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """aiokafka only logs what a listener raises; here it ends the session."""

    def __init__(
        self,
        on_revoked: Callable[[set[TopicPartition]], Coroutine[Any, Any, None]],
        on_assigned: Callable[[set[TopicPartition]], Coroutine[Any, Any, None]],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._on_revoked = on_revoked
        self._on_assigned = on_assigned
        self._fail = fail

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._called(self._on_revoked(revoked))

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        await self._called(self._on_assigned(assigned))

    async def _called(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - whatever it is, the session must not go on without it
            self._fail(error)


async def _leave(consumer: AIOKafkaConsumer) -> None:
    """Leaves the group on another connection, for the join under way blocks its own."""
    coordinator, client = consumer._coordinator, consumer._client
    if coordinator is None or coordinator.coordinator_id is None or coordinator._group_instance_id is not None:
        return
    request = LeaveGroupRequest(coordinator.group_id, coordinator.member_id)
    with contextlib.suppress(*UNREACHABLE):
        await within(LEAVE_S, client.send(coordinator.coordinator_id, request, group=ConnectionGroup.DEFAULT))


def _raise_ended(tasks: "Mapping[str, asyncio.Future[Any]]") -> None:
    """Raises Rejoin if one of the consumer's own tasks has ended, and names its error."""
    for name, task in tasks.items():
        if task.done():
            error = None if task.cancelled() else task.exception()
            where = whereabouts(error.__cause__ or error) if error else {"error": "cancelled", "at": ""}
            raise Rejoin(f"the consumer's {name} task has ended: {where['error']} at {where['at'].partition(' ')[0]}")


def _name(tp: TopicPartition) -> str:
    return f"{tp.topic}-{tp.partition}"


def _named(partitions: Iterable[TopicPartition]) -> str:
    return ",".join(_name(tp) for tp in sorted(partitions))


def _why_lost(partitions: Mapping[TopicPartition, Exception]) -> str:
    """A sentence that groups the partitions by reason, and names a few of each."""
    by_reason: dict[str, list[TopicPartition]] = {}
    for tp, error in sorted(partitions.items()):
        has_no_leader = isinstance(error, LeaderNotAvailableError)
        reason = "no leader" if has_no_leader else f"no broker that answers for it ({type(error).__name__})"
        by_reason.setdefault(reason, []).append(tp)
    return "; ".join(f"partition {_few(tps)} has {reason}" for reason, tps in by_reason.items())


def _few(partitions: list[TopicPartition]) -> str:
    more = len(partitions) - LISTED
    return _named(partitions[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
