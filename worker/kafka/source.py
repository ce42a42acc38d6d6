"""Kafka in: assignment, reading with backpressure, commit, lag.

The event loop owns everything here. An ``Assignment`` lasts from the moment the group assigns a partition to this process
until it is revoked, and each record belongs to one: what is read under one assignment is never committed under another.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka.errors import (
    IllegalStateError,
    KafkaConnectionError,
    KafkaError,
    LeaderNotAvailableError,
    NodeNotReadyError,
    RequestTimedOutError,
    TopicAuthorizationFailedError,
)

from worker.core.events import age_s
from worker.kafka.aiokafka_compat import (
    CoordinatorAnswers,
)
from worker.kafka.assignment import Assignment, Assignments, Chunk, partition_names
from worker.kafka.commits import Commits
from worker.kafka.connection import Backoff, Connection, unreachable
from worker.kafka.delivery import Delivery
from worker.kafka.group_consumer import ENDS_TIMEOUT_S, GroupConsumer, GroupTimeouts, Rejoin
from worker.kafka.partition_reader import PartitionReader
from worker.kafka.read_ahead import ReadAhead
from worker.kafka.read_errors import MEMBERSHIP, KnownOutages, ReadErrors
from worker.kafka.standstill import StandstillDetector
from worker.kafka.subscription import RebalanceListener, Subscription
from worker.kafka.topic_identity import TopicIdentity
from worker.runtime.file_descriptors import compared
from worker.runtime.loop_budget import TurnBudget
from worker.runtime.tasks import cancelled, within
from worker.telemetry.health import Health
from worker.telemetry.logs import whereabouts
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

LAG_INTERVAL_S: Final = 1.0
SILENCE_S: Final = 60.0  # without a record although a partition has some: the consumer is replaced
SETTLING_SHARE: Final = 0.75  # of a revocation's time, for what is under way; the rest is for the commit
LAG_TIMEOUT_S: Final = ENDS_TIMEOUT_S  # also how long a partition's end may be unknown, as while its leader moves
GROUP_INTERVAL_S: Final = 1.0
REJOINING_S: Final = 5.0  # a rebalance that lasts longer makes the worker not ready
COORDINATOR_S: Final = 3.0  # the coordinator is away when it has not answered for so long, and for so many
MISSED_HEARTBEATS: Final = 3  # heartbeats, whichever is longer
LISTED: Final = 5  # partitions that a sentence names
UNANSWERED: Final = (KafkaConnectionError, NodeNotReadyError, RequestTimedOutError, OSError, asyncio.TimeoutError)
NO_PARTITION: Final = 2**31 - 1


class Source:
    """Reads the input topics as a member of the group, and commits what the pipeline says has been acknowledged.

    ``run`` does the work; the pipeline calls ``next_batch``, ``acknowledge`` and ``drop``. A revocation drops the records
    that have not reached the network; the others are published and committed, within its deadline.

    How results are published and offsets committed is the delivery's to know.
    """

    def __init__(
        self,
        connection: Connection,
        delivery: Delivery,
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._subscription = Subscription(topics, pattern, request_timeout_s=connection.request_timeout_s)
        self._group_id = group_id
        self._metrics = metrics
        self._health = health
        self._delivery = delivery
        self._clock = clock
        timeouts = GroupTimeouts.of(
            request_timeout_ms=connection.request_timeout_ms, session_timeout_ms=session_timeout_ms
        )
        self._revoke_timeout_s = timeouts.revoke_s
        self._heartbeat_ms = timeouts.heartbeat_ms
        self._read_ahead = ReadAhead(max_batch_texts=max_batch_texts, linger_s=linger_s, metrics=metrics, clock=clock)
        self._consumer = GroupConsumer(
            connection,
            self._subscription,
            group_id=group_id,
            group_instance_id=group_instance_id,
            timeouts=timeouts,
            isolation_level=isolation_level,
            fetch_max_wait_ms=fetch_max_wait_ms,
            max_unpacked_bytes=max_unpacked_bytes,
            metrics=metrics,
            health=health,
        )
        self._assignments = Assignments(metrics)
        self._readers: dict[Assignment, asyncio.Task[None]] = {}
        self._retiring: set[asyncio.Task[None]] = set()  # readers of assignments that were begun anew
        self._topic_identity = TopicIdentity(
            self._consumer, self._assignments, auto_offset_reset=auto_offset_reset, metrics=metrics, health=health
        )
        self._commits = Commits(self._consumer, delivery, self._assignments, connection.request_timeout_s)
        self._revoking = asyncio.Lock()
        self._fault: asyncio.Future[None] | None = None
        self._stopping = asyncio.Event()
        self._has_joined = False
        self._rejoining_since: float | None = None
        self._outages = KnownOutages()
        self._errors = ReadErrors(
            connection,
            self._subscription,
            self._outages,
            group_id=group_id,
            group_instance_id=group_instance_id,
            session_timeout_ms=session_timeout_ms,
            health=health,
        )
        self._answered_at = clock()
        self._standstill = StandstillDetector(self._consumer, self._assignments)
        self._partition_reader = PartitionReader(
            self._consumer,
            delivery,
            self._assignments,
            self._read_ahead,
            self._topic_identity,
            self._errors,
            self._standstill,
            restart=self.restart,
            auto_offset_reset=auto_offset_reset,
            request_timeout_s=connection.request_timeout_s,
            turn_budget=turn_budget,
            metrics=metrics,
            clock=clock,
        )
        health.hold("group", "not joined yet")

    # For the pipeline.

    async def next_batch(self) -> list[Chunk] | None:
        """The next micro-batch, as runs of records of one assignment each; None once ``stop_taking`` was called.

        Waits for records, and then until the batch is full or its oldest record has lingered.
        """
        return await self._read_ahead.next_batch()

    def acknowledge(self, assignment: Assignment, next_offset: int, records: int) -> None:
        """Everything of this partition before ``next_offset`` has been published, the last ``records`` records just now."""
        self._assignments.acknowledge(assignment, next_offset, records)

    def advance(self, assignment: Assignment, next_offset: int, records: int) -> None:
        """Everything of this partition before ``next_offset`` has been published and committed."""
        self._assignments.advance(assignment, next_offset, records)

    def drop(self, assignment: Assignment, records: int) -> None:
        """These records are discarded, as their partition is revoked or begins again, and will be read again."""
        self._assignments.drop(assignment, records)

    def records_held(self) -> int:
        """How many have been read and are neither dropped nor acknowledged."""
        return len(self._read_ahead) + sum(assignment.under_way for assignment in self._assignments.values())

    def stop_taking(self) -> None:
        """Ends reading; ``next_batch`` then answers None. What no micro-batch has is left to the partition's next owner."""
        self._assignments.is_draining = True
        for reader in self._readers.values():
            reader.cancel()
        for assignment in self._assignments.values():
            self._discard(assignment)
        self._read_ahead.end()

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
        await self._commits.commit_before(deadline)
        uncommitted = sum(assignment.uncommitted + assignment.under_way for assignment in self._assignments.values())
        uncommitted += self._assignments.read_again
        for assignment in list(self._assignments.values()):
            self._release(assignment)
        await self._consumer.stop(max(1.0, deadline - time.monotonic()))
        return uncommitted

    async def _session(self) -> None:
        self._fault = asyncio.get_running_loop().create_future()
        consumer = await self._consumer.start()
        listener = RebalanceListener(self._on_revoked, self._on_assigned, self._fail)
        self._subscription.subscribe(consumer, listener)
        answers = CoordinatorAnswers(consumer, self._clock)
        self._rejoining_since = self._clock() if self._has_joined else None
        steps = [
            self._commits.run(),
            self._watch_lag(),
            self._watch_group(answers),
            self._topic_identity.watch(consumer),
        ]
        if (pattern := self._subscription.pattern) is not None:
            steps.append(self._subscription.watch(consumer, pattern, listener, self._revoke_all))
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
            await self._standstill.check(reason)
            raise
        finally:
            if not self._fault.cancel():
                self._fault.exception()  # taken, or asyncio says on stderr that nobody has
            await cancelled((stopping, *tasks))
            if not self._stopping.is_set():
                await self._on_revoked(set(self._assignments))
                await self._consumer.stop(self._connection.request_timeout_s)

    def _fail(self, error: BaseException) -> None:
        if self._fault is not None and not self._fault.done():
            self._fault.set_exception(error)

    # Rebalances.

    async def _on_assigned(self, partitions: set[TopicPartition]) -> None:
        self._metrics.rebalances.inc()
        self._metrics.assigned_partitions.set(len(partitions))
        self._has_joined, self._rejoining_since = True, None
        if not partitions:
            self._standstill.has_begun()
        if self._assignments.is_draining or not self._consumer.is_live:
            return
        self._topic_identity.ask_again(tp.topic for tp in partitions)
        self._errors.clear(MEMBERSHIP)
        for tp in sorted(partitions):
            self._accept(tp)
        self._health.well("group")
        log.info("assigned", extra={"partitions": partition_names(partitions)})
        exactly_once = self._delivery.has_producer_per_partition
        is_enough, files = compared(len(partitions), self._consumer.live.brokers(), exactly_once=exactly_once)
        if not is_enough:
            log.warning("%s", files)

    def _accept(self, tp: TopicPartition, after: asyncio.Task[None] | None = None) -> None:
        """Begins to read a partition; ``after`` its reader until now has ended."""
        assignment = self._assignments[tp] = Assignment(tp)
        reader = self._readers[assignment] = asyncio.create_task(self._partition_reader.run(assignment, after))
        reader.add_done_callback(self._reader_ended)

    def restart(self, assignment: Assignment) -> None:
        """Discards what was read of a partition, and begins again at its committed offset.

        During a revocation or drain, it only discards.
        """
        if self._assignments.get(assignment.tp) is not assignment:
            return
        is_to_go_on = assignment.accepts and not self._assignments.is_draining
        if not is_to_go_on:
            self._release(assignment)  # the revocation finds nothing to release any more
        else:
            self._delivery.abandon(assignment)
            self._assignments.repeat(assignment.uncommitted)
        assignment.accepts = assignment.is_owned = False
        self._discard(assignment)
        self._read_ahead.admit_if_room()
        self._assignments.pop(assignment.tp, None)
        reader = self._readers.pop(assignment, None)
        if reader is not None:
            reader.cancel()
            self._retiring.add(reader)
            reader.add_done_callback(self._retiring.discard)
        if is_to_go_on:
            self._accept(assignment.tp, reader)
        self._assignments.settled.set()

    async def _revoke_all(self) -> None:
        while self._assignments:
            await self._on_revoked(set(self._assignments))

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
        self._read_ahead.admit()
        self._delivery.flush(assignments)
        await self._until_settled(assignments, started + self._revoke_timeout_s * SETTLING_SHARE)
        await self._commits.commit_before(started + self._revoke_timeout_s)
        for assignment in assignments:
            self._release(assignment)
        log.info("revoked", extra={"partitions": partition_names(partitions)})

    async def _until_settled(self, assignments: list[Assignment], deadline: float) -> None:
        while any(assignment.under_way for assignment in assignments):
            self._assignments.settled.clear()
            try:
                await within(deadline - time.monotonic(), self._assignments.settled.wait())
            except TimeoutError:
                log.warning(
                    "revoked before everything under way was published",
                    extra={"records": sum(assignment.under_way for assignment in assignments)},
                )
                return

    def _discard(self, assignment: Assignment) -> None:
        self._read_ahead.discard(assignment)
        self._consumer.release(assignment.tp)

    def _release(self, assignment: Assignment) -> None:
        if not assignment.is_owned:
            return
        assignment.accepts = assignment.is_owned = False
        self._delivery.release(assignment)
        self._assignments.repeat(assignment.uncommitted)
        self._metrics.forget_partition(assignment.tp.topic, assignment.tp.partition)
        if self._assignments.get(assignment.tp) is assignment:
            del self._assignments[assignment.tp]
        self._metrics.assigned_partitions.set(len(self._assignments))
        self._errors.clear(assignment.tp)
        if not self._assignments:
            self._health.well("commit")

    # Reading.

    def _reader_ended(self, reader: asyncio.Task[None]) -> None:
        if reader.cancelled():
            if reader in self._readers.values() and not self._assignments.is_draining:
                self._fail(Rejoin("a reader was cancelled, and not by this worker"))
        elif (error := reader.exception()) is not None:
            self._fail(error)

    async def confirm_membership(self) -> None:
        """Returns if the coordinator says that this process is a member of the group; raises a KafkaError otherwise."""
        await self._consumer.confirm_membership()

    async def commit_offsets(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> None:
        """Commits offsets with their metadata as a member of the group; raises the KafkaError of what fails."""
        await self._consumer.commit_offsets(offsets)

    # Lag.

    async def _watch_lag(self) -> None:
        while True:
            await asyncio.sleep(LAG_INTERVAL_S)
            if not self._consumer.is_live:
                continue
            partitions = list(self._assignments) or [TopicPartition(self._known_topic(), 0)]
            ends = await self._consumer.live.ends(partitions, LAG_TIMEOUT_S)
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
            self._outages.brokers_away_at = now
            if now - self._answered_at > LAG_TIMEOUT_S:
                self._health.trouble("kafka", unreachable(self._connection, next(iter(errors.values()))), "lag")
            return  # single partitions add nothing
        self._answered_at = now
        self._health.well("kafka", "lag")
        if errors and now - self._outages.brokers_away_at <= LAG_TIMEOUT_S:
            return  # the brokers are just back, and their leaders may not be
        lost = {tp: errors[tp] for tp in overdue if not isinstance(errors[tp], TopicAuthorizationFailedError)}
        self._outages.partitions = lost
        if lost:  # who reads tells of a missing permission
            self._health.trouble("partitions", _why_lost(lost))
        else:
            self._health.well("partitions")

    async def _watch_group(self, answers: CoordinatorAnswers) -> None:
        """Tells health that the group's coordinator is away, or that a rebalance, in which nobody reads, takes long."""
        patience_s = max(COORDINATOR_S, MISSED_HEARTBEATS * self._heartbeat_ms / 1000)
        while True:
            await asyncio.sleep(GROUP_INTERVAL_S)
            now = self._clock()
            if answers.has_answered and now - answers.at <= patience_s:
                self._outages.is_coordinator_away = False
                self._health.well("coordinator")
            elif not answers.is_joining and now - max(answers.at, self._outages.brokers_away_at) > patience_s:
                self._outages.is_coordinator_away = True
                self._health.trouble(
                    "coordinator", f"the coordinator of group {self._group_id} has not answered for {patience_s:g} s"
                )
            since = self._rejoining_since
            is_rebalancing = answers.is_joining or self._revoking.locked()
            is_known_why = not is_rebalancing and now - answers.at > REJOINING_S  # the coordinator, or Kafka, is away
            if (
                since is not None
                and not is_known_why
                and not self._assignments.is_draining
                and now - since > REJOINING_S
            ):
                self._health.trouble("group", f"rejoining for more than {REJOINING_S:g} s: a member is gone or busy")

    def _known_topic(self) -> str:
        """An input topic that exists: asking for a deleted one would look like an outage."""
        cluster, topics = self._consumer.live._client.cluster, self._subscription.topics
        return next((name for name in topics if cluster.partitions_for_topic(name)), topics[0])

    async def _look_after_membership(self) -> None:
        """Asks aiokafka for group errors, which it raises only to readers: without a partition nobody reads."""
        nowhere = TopicPartition(self._subscription.topics[0], NO_PARTITION)
        try:
            await within(LAG_TIMEOUT_S, self._consumer.live.getmany(nowhere, timeout_ms=0))
        except (TimeoutError, IllegalStateError):
            return  # a rebalance is going on
        except KafkaError as error:
            self._errors.handle(error, MEMBERSHIP)
        else:
            self._errors.clear(MEMBERSHIP)

    async def _measure(self, assignment: Assignment, end: int) -> None:
        assignment.measured_at = self._clock()
        if assignment.acknowledged is None or not self._consumer.is_live:
            return
        if assignment.is_idle():
            self._skip_markers(assignment, await self._consumer.position(assignment.tp))
        lag = max(0, end - assignment.acknowledged)
        age_s = self._age_s(assignment) if lag else 0.0
        if assignment.is_owned:
            self._metrics.lag(assignment.tp.topic, assignment.tp.partition, lag, age_s)
        now = self._clock()
        unpacks_since = self._unpacks_since(assignment, now)
        if unpacks_since is not None and now - unpacks_since > SILENCE_S:  # joining again would not make room
            why = f"{assignment.name} has waited {SILENCE_S:g} s for room to unpack a batch (max_unpacked_bytes)"
            self._health.trouble("read", why, assignment.tp)
        if not lag or not assignment.is_idle() or not self._read_ahead.has_room() or unpacks_since is not None:
            assignment.heard_at = now
        elif now - assignment.heard_at > SILENCE_S:
            raise Rejoin(f"{assignment.name} has {lag} records and has sent none for {SILENCE_S:g} s")

    def _unpacks_since(self, assignment: Assignment, now: float) -> float | None:
        is_unpacking = self._consumer.is_unpacking(assignment.tp)
        since = now if assignment.unpacks_since is None else assignment.unpacks_since
        assignment.unpacks_since = since if is_unpacking else None
        return assignment.unpacks_since

    def _skip_markers(self, assignment: Assignment, position: int | None) -> None:
        """Moves on past transaction markers, which have offsets and are not records.

        Not during a revocation or drain: then the position may be past records that were read and discarded.
        """
        if not assignment.accepts or self._assignments.is_draining:
            return
        if position is not None and assignment.is_idle() and position > (assignment.delivered or 0):
            assignment.delivered = assignment.acknowledged = position
            self._assignments.acknowledged.set()

    @staticmethod
    def _age_s(assignment: Assignment) -> float:
        """By the first unacknowledged read with a plausible timestamp; 0 if there is none."""
        now = time.time()
        return next((age for _, timestamp in assignment.waiting if (age := age_s(timestamp, now)) is not None), 0.0)


def _raise_ended(tasks: "Mapping[str, asyncio.Future[Any]]") -> None:
    """Raises Rejoin if one of the consumer's own tasks has ended, and names its error."""
    for name, task in tasks.items():
        if task.done():
            error = None if task.cancelled() else task.exception()
            where = whereabouts(error.__cause__ or error) if error else {"error": "cancelled", "at": ""}
            raise Rejoin(f"the consumer's {name} task has ended: {where['error']} at {where['at'].partition(' ')[0]}")


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
    return partition_names(partitions[:LISTED]) + (f" and {more} more" if more > 0 else "")
