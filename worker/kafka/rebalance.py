"""What happens when the group assigns partitions to this process, and when it revokes them."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from aiokafka import TopicPartition

from worker.kafka.assignment import Assignment, Assignments, partition_names
from worker.kafka.commits import Commits
from worker.kafka.delivery import Delivery
from worker.kafka.group_consumer import GroupConsumer, Rejoin
from worker.kafka.partition_reader import PartitionReader
from worker.kafka.read_ahead import ReadAhead
from worker.kafka.read_errors import MEMBERSHIP, ReadErrors
from worker.kafka.standstill import StandstillDetector
from worker.kafka.topic_identity import TopicIdentity
from worker.runtime.file_descriptors import check_limit
from worker.runtime.tasks import cancel_all, within
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

IN_FLIGHT_SHARE: Final = 0.75  # of a revocation's time, for what is under way; the rest is for the commit


class RebalanceHandler:
    """Begins assignments and ends them, each with the task that reads it. ``fail`` ends the session with an error."""

    def __init__(
        self,
        consumer: GroupConsumer,
        delivery: Delivery,
        assignments: Assignments,
        read_ahead: ReadAhead,
        topic_identity: TopicIdentity,
        partition_reader: PartitionReader,
        commits: Commits,
        errors: ReadErrors,
        standstill: StandstillDetector,
        *,
        fail: Callable[[BaseException], None],
        revoke_timeout_s: float,
        metrics: Metrics,
        health: Health,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._consumer = consumer
        self._delivery = delivery
        self._assignments = assignments
        self._read_ahead = read_ahead
        self._topic_identity = topic_identity
        self._partition_reader = partition_reader
        self._commits = commits
        self._errors = errors
        self._standstill = standstill
        self._fail = fail
        self._revoke_timeout_s = revoke_timeout_s
        self._metrics = metrics
        self._health = health
        self._clock = clock
        self._readers: dict[Assignment, asyncio.Task[None]] = {}
        self._cancelled_readers: set[asyncio.Task[None]] = set()  # of assignments that were restarted, until they end
        self._revoking = asyncio.Lock()
        self._has_joined = False
        self.rejoining_since: float | None = None  # by the clock; None while this process is a member of the group

    def is_revoking(self) -> bool:
        return self._revoking.locked()

    def session_started(self) -> None:
        """A new consumer joins the group."""
        self.rejoining_since = self._clock() if self._has_joined else None

    def stop_reading(self) -> None:
        """Ends the readers, and discards what no micro-batch has."""
        for reader in self._readers.values():
            reader.cancel()
        for assignment in self._assignments.values():
            self._discard(assignment)

    def release_all(self) -> None:
        """Releases all partitions without waiting for what is under way, at the end of the process."""
        for assignment in list(self._assignments.values()):
            self._release(assignment)

    async def on_assigned(self, partitions: set[TopicPartition]) -> None:
        """The group has assigned these partitions, and no others: starts to read them."""
        self._metrics.rebalances.inc()
        self._metrics.assigned_partitions.set(len(partitions))
        self._has_joined, self.rejoining_since = True, None
        if not partitions:
            self._standstill.partition_started()
        if self._assignments.is_draining or not self._consumer.is_live:
            return
        self._topic_identity.ask_again(tp.topic for tp in partitions)
        self._errors.clear(MEMBERSHIP)
        membership = self._consumer.live.membership()
        for tp in sorted(partitions):
            self._start_reader(Assignment(tp, membership))
        self._health.working("group")
        log.info("assigned", extra={"partitions": partition_names(partitions)})
        is_enough, files = check_limit(self._consumer.live.brokers())
        if not is_enough:
            log.warning("%s", files)

    async def on_revoked(self, partitions: set[TopicPartition]) -> None:
        """Ends reading these partitions; publishes and commits what is under way, at most until the revoke deadline."""
        if self.rejoining_since is None and self._has_joined:
            self.rejoining_since = self._clock()
        async with self._revoking:  # the group and the end of a session may both call
            await self._revoke([self._assignments[tp] for tp in partitions if tp in self._assignments])

    async def revoke_all(self) -> None:
        """Gives all partitions up, as if the group had revoked them."""
        while self._assignments:
            await self.on_revoked(set(self._assignments))

    def restart(self, assignment: Assignment) -> None:
        """Discards what was read of a partition, and begins again at its committed offset.

        During a revocation or drain, it only discards.
        """
        if self._assignments.get(assignment.tp) is not assignment:
            return
        will_continue = assignment.accepts and not self._assignments.is_draining
        if not will_continue:
            self._release(assignment)  # the revocation finds nothing to release any more
        else:
            self._delivery.abandon(assignment)
            self._assignments.count_duplicates(assignment.uncommitted)
        self._end(assignment)
        self._discard(assignment)
        self._read_ahead.admit_if_room()
        self._assignments.pop(assignment.tp, None)
        reader = self._readers.pop(assignment, None)
        if reader is not None:
            reader.cancel()
            self._cancelled_readers.add(reader)
            reader.add_done_callback(self._cancelled_readers.discard)
        if will_continue:
            self._start_reader(Assignment(assignment.tp, assignment.membership), reader)
        self._assignments.settled.set()

    def _start_reader(self, assignment: Assignment, after: asyncio.Task[None] | None = None) -> None:
        """Begins an assignment, which is read once the task ``after``, its reader until now, has ended."""
        self._assignments[assignment.tp] = assignment
        reader = self._readers[assignment] = asyncio.create_task(self._partition_reader.run(assignment, after))
        reader.add_done_callback(self._reader_ended)

    def _reader_ended(self, reader: asyncio.Task[None]) -> None:
        if reader.cancelled():
            if reader in self._readers.values() and not self._assignments.is_draining:
                self._fail(Rejoin("a reader was cancelled, and not by this worker"))
        elif (error := reader.exception()) is not None:
            self._fail(error)

    async def _revoke(self, assignments: list[Assignment]) -> None:
        if not assignments:
            return
        partitions = [assignment.tp for assignment in assignments]
        started = time.monotonic()
        for assignment in assignments:
            assignment.accepts = False
        # Readers end first: one that lives on would take records of the next assignment.
        # A revocation that the end of a session cut short has already taken them from the dict.
        readers = [self._readers.pop(assignment) for assignment in assignments if assignment in self._readers]
        if await cancel_all([*readers, *self._cancelled_readers]):
            self._fail(Rejoin("a reader does not end"))
        for assignment in assignments:
            self._discard(assignment)
        self._read_ahead.admit()
        self._delivery.flush(assignments)
        await self._until_nothing_under_way(assignments, started + self._revoke_timeout_s * IN_FLIGHT_SHARE)
        await self._commits.commit_before(started + self._revoke_timeout_s)
        for assignment in assignments:
            self._release(assignment)
        log.info("revoked", extra={"partitions": partition_names(partitions)})

    async def _until_nothing_under_way(self, assignments: list[Assignment], deadline: float) -> None:
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
        """Drops what was read of a partition and not taken by the pipeline."""
        self._read_ahead.discard(assignment)
        self._consumer.release(assignment.tp)

    def _end(self, assignment: Assignment) -> None:
        """A drain owes nothing of an assignment that ended before it: what is dropped of it is read by others."""
        assignment.accepts = assignment.is_owned = False
        assignment.is_lost = assignment.is_lost or not self._assignments.is_draining

    def _release(self, assignment: Assignment) -> None:
        """Ends an assignment: nothing of it is published or committed from now on."""
        if not assignment.is_owned:
            return
        self._end(assignment)
        self._delivery.release(assignment)
        self._assignments.count_duplicates(assignment.uncommitted)
        self._metrics.forget_partition(assignment.tp.topic, assignment.tp.partition)
        if self._assignments.get(assignment.tp) is assignment:
            del self._assignments[assignment.tp]
        self._metrics.assigned_partitions.set(len(self._assignments))
        self._errors.clear(assignment.tp)
        if not self._assignments:
            self._health.working("commit")
