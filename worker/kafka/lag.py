"""How far this process is behind its partitions' ends, and what is wrong where that is not known or does not shrink."""

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

from worker.core.events import age_s
from worker.kafka.aiokafka_compat import knows_topic
from worker.kafka.assignment import Assignment, Assignments, partition_names
from worker.kafka.connection import Connection, unreachable
from worker.kafka.group_consumer import ENDS_TIMEOUT_S, GroupConsumer, Rejoin
from worker.kafka.read_ahead import ReadAhead
from worker.kafka.read_errors import MEMBERSHIP, KnownOutages, ReadErrors
from worker.kafka.subscription import Subscription
from worker.runtime.tasks import within
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

LAG_INTERVAL_S: Final = 1.0
LAG_TIMEOUT_S: Final = ENDS_TIMEOUT_S  # also how long a partition's end may be unknown, as while its leader moves
SILENCE_S: Final = 60.0  # without a record although a partition has some: the consumer is replaced
LISTED: Final = 5  # partitions that a sentence names
UNANSWERED: Final = (KafkaConnectionError, NodeNotReadyError, RequestTimedOutError, OSError, asyncio.TimeoutError)
NO_PARTITION: Final = 2**31 - 1


class LagWatcher:
    """Asks for the ends of partitions, sets the lag's metrics, and tells health of partitions and brokers that are away."""

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
        """Until it is cancelled. Raises Rejoin and WrongSetting."""
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
                    await self.measure(self._assignments[tp], end)

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

    def _known_topic(self) -> str:
        """An input topic that exists: asking for a deleted one would look like an outage."""
        consumer, topics = self._consumer.live, self._subscription.topics
        return next((name for name in topics if knows_topic(consumer, name)), topics[0])

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

    async def measure(self, assignment: Assignment, end: int) -> None:
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
