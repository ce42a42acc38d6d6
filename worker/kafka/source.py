"""The input of the pipeline: a member of the consumer group that reads the input topics and commits offsets.

The event loop owns everything here. An ``Assignment`` lasts from the moment the group assigns a partition to this process
until it is revoked, and each record belongs to one: what is read under one assignment is never committed under another.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from worker.core.batching import TokenLimit
from worker.kafka.aiokafka_compat.group import CoordinatorAnswers
from worker.kafka.assignment import Assignment, Assignments, Chunk
from worker.kafka.bounded_run import BoundedRun, Until
from worker.kafka.commits import Commits
from worker.kafka.committed_offsets import CommittedOffsets
from worker.kafka.connection import Connection
from worker.kafka.delivery import Delivery
from worker.kafka.group_consumer import GroupConsumer, GroupTimeouts, Rejoin
from worker.kafka.group_health import GroupHealth
from worker.kafka.lag import LagWatcher
from worker.kafka.partition_reader import PartitionReader
from worker.kafka.read_ahead import ReadAhead
from worker.kafka.read_errors import KnownOutages, ReadErrors
from worker.kafka.reader import FetchedRecord
from worker.kafka.rebalance import RebalanceHandler
from worker.kafka.standstill import StandstillDetector
from worker.kafka.subscription import RebalanceListener, Subscription
from worker.kafka.topic_identity import TopicIdentity
from worker.runtime.backoff import Backoff
from worker.runtime.loop_budget import TurnBudget
from worker.runtime.tasks import cancel_all
from worker.telemetry.health import Health
from worker.telemetry.logs import error_fields
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)


class Source:
    """Reads the input topics as a member of the group, and commits what the pipeline says has been acknowledged.

    ``run`` does the work; the pipeline calls ``next_batch`` and ``drop``, the delivery what ``Owner`` lists. A revocation
    drops the records that have not reached the model; the others are published and committed, within its deadline.

    Each part of the work has a class of its own. This one puts them together and runs them, session by session: a session
    lasts as long as one consumer, which is replaced where it no longer works.
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
        since_ms: int | None = None,
        until: Until | None = None,
        isolation_level: str = "read_committed",
        client_rack: str | None = None,
        session_timeout_ms: int = 45_000,
        fetch_max_wait_ms: int = 500,
        max_batch_texts: int = 512,
        linger_s: float = 0.01,
        token_limit: TokenLimit[FetchedRecord] | None = None,
        max_unpacked_bytes: int = 256 * 2**20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._subscription = Subscription(topics, pattern, request_timeout_s=connection.request_timeout_s)
        self._metrics = metrics
        self._health = health
        self._clock = clock
        self._fault: asyncio.Future[None] | None = None  # what ends the session
        self._stopping = asyncio.Event()
        timeouts = GroupTimeouts.of(
            request_timeout_ms=connection.request_timeout_ms, session_timeout_ms=session_timeout_ms
        )
        self._read_ahead = ReadAhead(
            max_batch_texts=max_batch_texts, linger_s=linger_s, token_limit=token_limit, metrics=metrics, clock=clock
        )
        self._consumer = GroupConsumer(
            connection,
            self._subscription,
            group_id=group_id,
            group_instance_id=group_instance_id,
            timeouts=timeouts,
            isolation_level=isolation_level,
            client_rack=client_rack,
            fetch_max_wait_ms=fetch_max_wait_ms,
            max_unpacked_bytes=max_unpacked_bytes,
            metrics=metrics,
            health=health,
        )
        self._assignments = Assignments(metrics)
        self._topic_identity = TopicIdentity(
            self._consumer, self._assignments, auto_offset_reset=auto_offset_reset, metrics=metrics, health=health
        )
        self._commits = Commits(self._consumer, delivery, self._assignments, connection.request_timeout_s)
        self._outages = KnownOutages()
        self._errors = ReadErrors(
            connection,
            self._outages,
            group_id=group_id,
            group_instance_id=group_instance_id,
            session_timeout_ms=session_timeout_ms,
            health=health,
        )
        self._standstill = StandstillDetector(self._consumer, self._assignments)
        self._committed_offsets = CommittedOffsets(
            self._consumer,
            require_stable=delivery.requires_stable_offsets,
            request_timeout_s=connection.request_timeout_s,
            health=health,
        )
        self._bounded_run: BoundedRun | None = None
        if until is not None:
            self._bounded_run = BoundedRun(
                until, self._consumer, self._subscription, self._assignments, connection.request_timeout_s
            )
        self._partition_reader = PartitionReader(
            self._consumer,
            delivery,
            self._assignments,
            self._read_ahead,
            self._topic_identity,
            self._committed_offsets,
            self._errors,
            self._standstill,
            restart=self.restart,
            auto_offset_reset=auto_offset_reset,
            since_ms=since_ms,
            bounded_run=self._bounded_run,
            request_timeout_s=connection.request_timeout_s,
            turn_budget=turn_budget,
            metrics=metrics,
            clock=clock,
        )
        self._rebalances = RebalanceHandler(
            self._consumer,
            delivery,
            self._assignments,
            self._read_ahead,
            self._topic_identity,
            self._partition_reader,
            self._commits,
            self._errors,
            self._standstill,
            fail=self._fail,
            revoke_timeout_s=timeouts.revoke_s,
            metrics=metrics,
            health=health,
            clock=clock,
        )
        self._lag = LagWatcher(
            connection,
            self._subscription,
            self._consumer,
            self._assignments,
            self._read_ahead,
            self._errors,
            self._outages,
            metrics=metrics,
            health=health,
            clock=clock,
        )
        self._group_health = GroupHealth(
            self._rebalances,
            self._assignments,
            self._outages,
            group_id=group_id,
            heartbeat_ms=timeouts.heartbeat_ms,
            health=health,
            clock=clock,
        )
        health.not_ready("group", "not joined yet")

    # For the pipeline.

    async def next_batch(self) -> list[Chunk] | None:
        """The next micro-batch, as runs of records of one assignment each; None once ``stop_taking`` was called.

        Waits for records, and then until the batch is full or its oldest record has lingered.
        """
        return await self._read_ahead.next_batch()

    def records_held(self) -> int:
        """How many have been read and are neither dropped nor acknowledged."""
        return len(self._read_ahead) + self._assignments.under_way()

    def stop_taking(self) -> None:
        """Ends reading; ``next_batch`` then answers None. What no micro-batch has is left to the partition's next owner."""
        self._assignments.is_draining = True
        self._rebalances.stop_reading()
        self._read_ahead.end()

    # For the delivery: as of ``Owner``.

    def acknowledge(self, assignment: Assignment, next_offset: int, records: int) -> None:
        self._assignments.acknowledge(assignment, next_offset, records)

    def advance(self, assignment: Assignment, next_offset: int, records: int) -> None:
        self._assignments.advance(assignment, next_offset, records)

    def drop(self, assignment: Assignment, records: int) -> None:
        self._assignments.drop(assignment, records)

    def restart(self, assignment: Assignment) -> None:
        self._rebalances.restart(assignment)

    async def committed_offset(self, tp: TopicPartition) -> OffsetAndMetadata:
        return await self._committed_offsets.of(tp)

    async def commit_offsets(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> None:
        await self._consumer.commit_offsets(offsets)

    # The session.

    async def run(self) -> None:
        """Keeps a consumer in the group until ``close``.

        Raises UnreadableRecord, Standstill, TopicRecreated and WrongSetting.
        """
        backoff = Backoff()
        while not self._stopping.is_set():
            try:
                await self._session()
            except Rejoin as reason:
                self._metrics.kafka_errors.labels("consume").inc()
                self._health.failing("group", f"joining the group again: {reason}")
                await backoff.wait()

    async def close(self, timeout_s: float) -> int:
        """Commits what has been acknowledged and leaves the group; ``run`` then ends. At most ``timeout_s``.

        Answers with the number of records that were taken and not committed; the next owner reads them again.
        """
        self.stop_taking()
        self._stopping.set()
        deadline = time.monotonic() + timeout_s
        await self._commits.commit_before(deadline)
        uncommitted = self._assignments.uncommitted()
        self._rebalances.release_all()
        await self._consumer.stop(max(1.0, deadline - time.monotonic()))
        return uncommitted

    async def _session(self) -> None:
        """Runs one consumer until ``close``, or until it has to be replaced: then it raises Rejoin."""
        self._fault = asyncio.get_running_loop().create_future()
        consumer = await self._consumer.start()
        listener = RebalanceListener(self._rebalances.on_revoked, self._rebalances.on_assigned, self._fail)
        self._subscription.subscribe(consumer, listener)
        answers = CoordinatorAnswers(consumer, self._clock)
        self._rebalances.session_started()
        steps = [
            self._commits.run(),
            self._lag.run(),
            self._group_health.watch(answers),
            self._topic_identity.watch(consumer),
        ]
        if self._subscription.pattern is not None:
            steps.append(self._subscription.watch(consumer, listener, self._rebalances.revoke_all))
        if self._bounded_run:
            steps.append(self._bounded_run.watch())
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
                self._fault.exception()  # else asyncio says on stderr that nobody has retrieved it
            await cancel_all((stopping, *tasks))
            if not self._stopping.is_set():
                await self._rebalances.on_revoked(set(self._assignments))
                await self._consumer.stop(self._connection.request_timeout_s)

    def _fail(self, error: BaseException) -> None:
        """Ends the session with an error. If several are reported, the session ends with the first one."""
        if self._fault is not None and not self._fault.done():
            self._fault.set_exception(error)


def _raise_ended(tasks: "Mapping[str, asyncio.Future[Any]]") -> None:
    """Raises Rejoin if one of the consumer's own tasks has ended, and names its error."""
    for name, task in tasks.items():
        if task.done():
            error = None if task.cancelled() else task.exception()
            where = error_fields(error.__cause__ or error) if error else {"error": "cancelled", "at": ""}
            raise Rejoin(f"the consumer's {name} task has ended: {where['error']} at {where['at'].partition(' ')[0]}")
