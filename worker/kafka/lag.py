"""How far this process is behind the ends of its partitions, and what is wrong where that cannot be measured."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final

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

from worker.core.timestamps import age_s
from worker.kafka.aiokafka_compat.metadata import knows_topic
from worker.kafka.assignment import Assignment, Assignments, partition_names
from worker.kafka.connection import Connection, unreachable
from worker.kafka.group_consumer import ENDS_TIMEOUT_S, GroupConsumer, Rejoin
from worker.kafka.read_ahead import ReadAhead
from worker.kafka.read_errors import MEMBERSHIP, KnownOutages, ReadErrors
from worker.kafka.subscription import Subscription
from worker.printable import counted
from worker.runtime.tasks import within
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

LAG_INTERVAL_S: Final = 1.0
LAG_TIMEOUT_S: Final = ENDS_TIMEOUT_S  # also how long a partition's end may be unknown, as while its leader moves
REPLICA_SILENCE_S: Final = 15.0  # a follower that has records and sends none for so long: they are read from the leader
SILENCE_S: Final = 60.0  # a partition that has records and sends none for so long: the consumer is replaced
MAX_NAMED: Final = 5  # partitions that a message names
UNANSWERED: Final = (KafkaConnectionError, NodeNotReadyError, RequestTimedOutError, OSError, asyncio.TimeoutError)


class LagWatcher:
    """Asks for the end offsets of the partitions, sets the lag metrics, and tells health which partitions are unavailable.

    It also notices a partition that has records and sends none, and group errors while there is no partition to read.
    """

    def __init__(
        self,
        connection: Connection,
        subscription: Subscription,
        consumer: GroupConsumer,
        assignments: Assignments,
        read_ahead: ReadAhead,
        errors: ReadErrors,
        outages: KnownOutages,
        *,
        metrics: Metrics,
        health: Health,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._subscription = subscription
        self._consumer = consumer
        self._assignments = assignments
        self._read_ahead = read_ahead
        self._errors = errors
        self._outages = outages
        self._metrics = metrics
        self._health = health
        self._clock = clock
        self._answered_at = clock()

    async def run(self) -> None:
        """Measures every second until it is cancelled. Raises Rejoin and WrongSetting."""
        while True:
            await asyncio.sleep(LAG_INTERVAL_S)
            if not self._consumer.is_live:
                continue
            partitions = list(self._assignments) or [TopicPartition(self._existing_topic(), 0)]
            ends = await self._consumer.live.ends(partitions, LAG_TIMEOUT_S)
            errors = {tp: end for tp, end in ends.items() if isinstance(end, Exception)}
            self._report_ends(errors, is_answered=len(errors) < len(ends))
            if all(assignment.is_finished() for assignment in self._assignments.values()):
                await self._check_membership()
            for tp, end in ends.items():
                if tp in self._assignments and not isinstance(end, Exception):
                    await self.measure(self._assignments[tp], end)

    def _report_ends(self, errors: Mapping[TopicPartition, Exception], *, is_answered: bool) -> None:
        """Tells health whether the brokers answer and which partitions have no known end; removes the lag of those."""
        now = self._clock()
        if errors:
            self._metrics.kafka_errors.labels("lag").inc()
        overdue = [
            tp for tp in errors if tp in self._assignments and now - self._assignments[tp].end_known_at > LAG_TIMEOUT_S
        ]
        for tp in overdue:
            self._metrics.forget_partition(tp.topic, tp.partition)
            self._assignments[tp].silent_since = now  # its silence counts from when its end is known again
        if not is_answered and all(isinstance(error, UNANSWERED) for error in errors.values()):
            self._outages.brokers_away_at = now
            if now - self._answered_at > LAG_TIMEOUT_S:
                self._health.failing("kafka", unreachable(self._connection, next(iter(errors.values()))), "lag")
            return  # all brokers are away: naming partitions adds nothing
        self._answered_at = now
        self._health.working("kafka", "lag")
        if errors and now - self._outages.brokers_away_at <= LAG_TIMEOUT_S:
            return  # the brokers are just back, and their leaders may not be
        lost = {tp: errors[tp] for tp in overdue if not isinstance(errors[tp], TopicAuthorizationFailedError)}
        self._outages.partitions = lost
        if lost:  # a missing permission is reported by the partition's reader
            self._health.failing("partitions", _unavailable_sentence(lost))
        else:
            self._health.working("partitions")

    def _existing_topic(self) -> str:
        """An input topic that exists: asking for a deleted one would look like an outage."""
        consumer, topics = self._consumer.live, self._subscription.topics
        return next((name for name in topics if knows_topic(consumer, name)), topics[0])

    async def _check_membership(self) -> None:
        """Asks for the group's error, which nobody else meets where nothing is left to read."""
        try:
            await within(LAG_TIMEOUT_S, self._consumer.live.raise_group_error(self._subscription.topics[0]))
        except (TimeoutError, IllegalStateError):
            return  # a rebalance is going on
        except KafkaError as error:
            self._errors.handle(error, MEMBERSHIP)
        else:
            self._errors.clear(MEMBERSHIP)

    async def measure(self, assignment: Assignment, end: int) -> None:
        """Sets a partition's lag by its end offset. Raises Rejoin where it has had records and sent none for too long."""
        if not self._consumer.is_live:
            return
        assignment.end_known_at = self._clock()
        assignment.log_end = max(end, self._consumer.live.written_to(assignment.tp))
        end = assignment.within_bound(end)
        if assignment.acknowledged is None:
            return
        if assignment.is_idle():
            self._skip_transaction_markers(assignment, await self._consumer.position(assignment.tp))
        lag = max(0, end - assignment.acknowledged)
        age_s = self._age_s(assignment) if lag else 0.0
        if assignment.is_owned:
            self._metrics.lag(assignment.tp.topic, assignment.tp.partition, lag, age_s)
        now = self._clock()
        unpacking_since = self._note_unpacking(assignment, now)
        if unpacking_since is not None and now - unpacking_since > SILENCE_S:  # joining again would not make room
            why = f"{assignment.name} has waited {SILENCE_S:g} s for room to unpack a batch (max_unpacked_bytes)"
            self._health.failing("read", why, assignment.tp)
        if not lag or not assignment.is_idle() or not self._read_ahead.has_room() or unpacking_since is not None:
            assignment.silent_since = now
        elif now - assignment.silent_since > SILENCE_S:
            raise Rejoin(f"{assignment.name} has {counted(lag, 'record')} and has sent none for {SILENCE_S:g} s")
        elif now - assignment.silent_since > REPLICA_SILENCE_S:
            self._consumer.live.leave_replica(assignment.tp)

    def _note_unpacking(self, assignment: Assignment, now: float) -> float | None:
        """Since when the partition's reader waits for a batch to be unpacked; None if it does not."""
        is_unpacking = self._consumer.is_unpacking(assignment.tp)
        since = now if assignment.unpacking_since is None else assignment.unpacking_since
        assignment.unpacking_since = since if is_unpacking else None
        return assignment.unpacking_since

    def _skip_transaction_markers(self, assignment: Assignment, position: int | None) -> None:
        """Moves on past transaction markers, which have offsets and are not records.

        It does not do so during a revocation or drain: then the position may be past records that were read and discarded.
        """
        if not assignment.accepts or self._assignments.is_draining:
            return
        position = None if position is None else assignment.within_bound(position)
        if position is not None and assignment.is_idle() and position > (assignment.delivered or 0):
            assignment.delivered = assignment.acknowledged = position
            self._assignments.commit_due.set()

    @staticmethod
    def _age_s(assignment: Assignment) -> float:
        """The age of the first unacknowledged read that has a plausible timestamp; 0 if there is none."""
        now = time.time()
        ages = (age_s(timestamp, now) for _, timestamp in assignment.unacknowledged_reads)
        return next((age for age in ages if age is not None), 0.0)


def _unavailable_sentence(partitions: Mapping[TopicPartition, Exception]) -> str:
    """A sentence that groups the partitions by reason, and names a few of each."""
    by_reason: dict[str, list[TopicPartition]] = {}
    for tp, error in sorted(partitions.items()):
        has_no_leader = isinstance(error, LeaderNotAvailableError)
        reason = "no leader" if has_no_leader else f"no broker that answers for it ({type(error).__name__})"
        by_reason.setdefault(reason, []).append(tp)
    return "; ".join(f"partition {_first_names(tps)} has {reason}" for reason, tps in by_reason.items())


def _first_names(partitions: list[TopicPartition]) -> str:
    more = len(partitions) - MAX_NAMED
    return partition_names(partitions[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
