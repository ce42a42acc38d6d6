"""The loop that reads one partition: where to start, reading while there is room, and what to do where that fails."""

import asyncio
import logging
import struct
import time
from collections.abc import Callable
from typing import Final

from aiokafka import TopicPartition
from aiokafka.errors import (
    CorruptRecordException,
    IllegalStateError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    RecordTooLargeError,
)
from aiokafka.structs import OffsetAndMetadata

from worker.core.bounds import Bound, bound_in
from worker.core.topic_ids import with_topic_id, without_topic_id
from worker.kafka.assignment import Assignment, Assignments
from worker.kafka.backlog import offsets_since
from worker.kafka.bounded_run import BoundedRun
from worker.kafka.committed_offsets import CommittedOffsets
from worker.kafka.connection import UNREACHABLE
from worker.kafka.delivery import Delivery
from worker.kafka.group_consumer import GroupConsumer, Rejoin
from worker.kafka.read_ahead import MAX_READ_RECORDS, ReadAhead
from worker.kafka.read_errors import ReadErrors
from worker.kafka.reader import FetchedRecord
from worker.kafka.standstill import StandstillDetector
from worker.kafka.topic_identity import TopicIdentity
from worker.runtime.backoff import Backoff
from worker.runtime.loop_budget import TurnBudget
from worker.runtime.tasks import cancel_all, within
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

IDLE_S: Final = 1.0  # how long a reader waits for records before it looks for errors of the group
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


class PartitionReader:
    """Reads partitions into the read-ahead buffer. The rebalance handler starts a task of ``run`` for each assignment."""

    def __init__(
        self,
        consumer: GroupConsumer,
        delivery: Delivery,
        assignments: Assignments,
        read_ahead: ReadAhead,
        topic_identity: TopicIdentity,
        committed_offsets: CommittedOffsets,
        errors: ReadErrors,
        standstill: StandstillDetector,
        *,
        restart: Callable[[Assignment], None],
        auto_offset_reset: str,
        since_ms: int | None,
        bounded_run: BoundedRun | None,
        request_timeout_s: float,
        turn_budget: TurnBudget,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._consumer = consumer
        self._delivery = delivery
        self._assignments = assignments
        self._read_ahead = read_ahead
        self._topic_identity = topic_identity
        self._committed_offsets = committed_offsets
        self._errors = errors
        self._standstill = standstill
        self._restart = restart
        self._auto_offset_reset = auto_offset_reset
        self._since_ms = since_ms
        self._bounded_run = bounded_run
        self._request_timeout_s = request_timeout_s
        self._turn_budget = turn_budget
        self._metrics = metrics
        self._clock = clock

    async def run(self, assignment: Assignment, after: asyncio.Task[None] | None = None) -> None:
        """Reads one partition until it is revoked, drained or read to its bound, once the task ``after`` has ended.

        Raises Rejoin, UnreadableRecord, TopicRecreated and WrongSetting.
        """
        backoff = Backoff()
        if after is not None and await cancel_all([after]):
            raise Rejoin("a reader does not end")  # two of one partition would each lose what the other takes
        while assignment.accepts and not self._assignments.is_draining:
            try:
                await self._ensure_offset(assignment)
                if assignment.bound is not None and await self._has_ended(assignment, assignment.bound):
                    return
                await self._until_turn(assignment.tp)
                if assignment.accepts and not self._assignments.is_draining:
                    await self._read(assignment)
                self._errors.clear(assignment.tp)
                backoff = Backoff()
            except IllegalStateError:
                return  # a rebalance has begun
            except OffsetOutOfRangeError:
                assignment.is_out_of_range = True
            except NoOffsetForPartitionError:
                if assignment.delivered is not None:
                    self._restart(assignment)
                    return
            except UNREACHABLE as error:
                if assignment.accepts:
                    self._errors.handle(error, assignment.tp)
                await backoff.wait()

    async def _ensure_offset(self, assignment: Assignment) -> None:
        """Makes sure that the topic is the one that was read, and that there is an offset to read from."""
        await self._topic_identity.identify(assignment.tp)
        if assignment.delivered is None:
            await self._start(assignment)
        elif assignment.is_out_of_range:
            await self._until(assignment.is_idle)  # what was read before the gap is published and committed first
            await self._reset_offset(assignment)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        """Waits for what comes of acknowledgements and commits."""
        while not is_so():
            self._assignments.settled.clear()
            await self._assignments.settled.wait()

    async def _has_ended(self, assignment: Assignment, bound: Bound) -> bool:
        """Whether a partition is read to its bound. Then waits for what was read, and has the bound itself committed.

        The position tells, for the last offsets before the bound may be transaction markers, aborted or compacted away.
        """
        if not bound.is_reached(await self._consumer.position(assignment.tp)):
            return False
        await self._until(lambda: assignment.is_idle() and assignment.committed == assignment.acknowledged)
        assignment.delivered = assignment.acknowledged = max(bound.offset, assignment.delivered or 0)
        metadata = self._metadata(assignment.tp, bound)
        if metadata != assignment.metadata:  # the bound was found on the way; nothing of the old one is being committed
            assignment.metadata, assignment.committed = metadata, None
        self._assignments.commit_due.set()
        self._errors.clear(assignment.tp)
        self._consumer.live.pause(assignment.tp)
        await self._consumer.live.getmany(
            assignment.tp, timeout_ms=0
        )  # drops what was fetched of the records behind the bound
        log.info("read to the end", extra={"partition": assignment.name, "end": bound.offset})
        return True

    async def _start(self, assignment: Assignment) -> None:
        """Seeks to the committed offset, or else to where a new group begins, and has the delivery begin there."""
        topic_id = self._topic_identity.of(assignment.tp.topic)
        await self._delivery.begin(assignment)
        commit = await self._committed_offsets.of(assignment.tp)
        lacks_this_topic_id = commit.offset >= 0 and topic_id != "" and without_topic_id(commit.metadata)[0] != topic_id
        if lacks_this_topic_id:
            await self._topic_identity.confirm(assignment.tp)
        committed = self._topic_identity.offset_of_this_topic(assignment.tp, commit)
        assignment.metadata = with_topic_id(topic_id)
        is_new_bound = await self._find_bound(assignment, None if committed is None else commit)
        if committed is None:
            offset = await self._first_offset(assignment.tp)
            log.info("no committed offset", extra={"partition": assignment.name, "begin_at": offset})
        else:
            offset = committed
        self._consumer.live.seek(assignment.tp, offset)
        self._standstill.partition_started()
        assignment.delivered = assignment.acknowledged = assignment.committed = offset
        is_start_moving = self._auto_offset_reset == "latest" or self._since_ms is not None
        if lacks_this_topic_id or is_new_bound or (committed is None and is_start_moving):
            # The start, the topic's id and the bound are committed at once, so that they hold if this process dies before a
            # result.
            assignment.committed = None
            self._assignments.commit_due.set()
        if is_new_bound:
            await self._until(lambda: assignment.committed is not None)

    async def _find_bound(self, assignment: Assignment, commit: OffsetAndMetadata | None) -> bool:
        """Sets the bound of an assignment, if the run has one. Whether it is new, so that nobody else knows it yet."""
        if self._bounded_run is None:
            return False
        assignment.bound = await self._bounded_run.bound(assignment.tp, commit)
        assignment.metadata = self._metadata(assignment.tp, assignment.bound)
        return commit is None or bound_in(commit.metadata) != assignment.bound

    def _metadata(self, tp: TopicPartition, bound: Bound) -> str:
        return with_topic_id(self._topic_identity.of(tp.topic), bound.metadata)

    async def _reset_offset(self, assignment: Assignment) -> None:
        """Seeks to where ``auto_offset_reset`` says, as the broker no longer has the next offset to read."""
        await self._topic_identity.identify(assignment.tp, anew=True)
        gone = assignment.delivered
        offset = await self._offset_by_reset_policy(assignment.tp)
        self._metrics.offset_resets.inc()
        log.error(
            "the offset to resume from is gone: records may have been deleted before they were read",
            extra={"partition": assignment.name, "offset": gone, "resume_at": offset},
        )
        self._consumer.live.seek(assignment.tp, offset)
        assignment.is_out_of_range = False
        assignment.delivered = assignment.acknowledged = offset
        self._assignments.commit_due.set()

    async def _first_offset(self, tp: TopicPartition) -> int:
        """Where a group without an offset begins."""
        if self._since_ms is None:
            return await self._offset_by_reset_policy(tp)
        consumer = self._consumer.live
        # The end first: a record that comes meanwhile is found by its time.
        ends = await within(self._request_timeout_s, consumer.end_offsets([tp]))
        return (await within(self._request_timeout_s, offsets_since(consumer, self._since_ms, ends)))[tp]

    async def _offset_by_reset_policy(self, tp: TopicPartition) -> int:
        consumer = self._consumer.live
        find = consumer.beginning_offsets if self._auto_offset_reset == "earliest" else consumer.end_offsets
        offsets: dict[TopicPartition, int] = await within(self._request_timeout_s, find([tp]))
        return offsets[tp]

    async def _until_turn(self, tp: TopicPartition) -> None:
        """Waits for records, and then for room and a turn. Without records a partition takes no turn from others."""
        reader = self._consumer.reader
        has_backlog = reader.is_fetched(tp)
        if has_backlog or await reader.until_fetched(tp, IDLE_S):
            await self._read_ahead.until_room(has_backlog=has_backlog)

    async def _read(self, assignment: Assignment) -> None:
        """Reads what is fetched of one partition, as far as the limit goes, into the read-ahead buffer."""
        # One partition at a time: with several, aiokafka loses the records of the first if it raises for the next.
        # Nothing may be awaited between the read and what follows, for the position has moved.
        limit = (lambda: 1) if assignment.single_record_reads else self._read_ahead.read_limit
        try:
            records = await self._consumer.reader.read(assignment.tp, limit=limit)
        except UNREADABLE as error:
            self._retry_one_by_one(assignment, error)
            return
        self._turn_budget.after(len(records))
        if not records or not assignment.accepts or self._assignments.is_draining:
            return
        if assignment.bound is not None:
            records = self._within_bound(assignment, assignment.bound, records)
            if not records:
                return
        now = self._clock()
        assignment.single_record_reads = max(0, assignment.single_record_reads - 1)
        assignment.delivered = records[-1].offset + 1
        assignment.silent_since = now
        assignment.unacknowledged_reads.append((assignment.delivered, records[0].timestamp))
        self._read_ahead.add(assignment, records, now)

    @staticmethod
    def _within_bound(assignment: Assignment, bound: Bound, records: list[FetchedRecord]) -> list[FetchedRecord]:
        """Those of the records that are before the bound, which is moved to the first record of the end or later."""
        before, assignment.bound = bound.within(records)
        if assignment.bound != bound and (records[len(before)].timestamp or 0) > 1000 * time.time():
            log.warning(
                "a record that is dated in the future ends the partition: those behind it are left out",
                extra={"partition": assignment.name, "offset": assignment.bound.offset},
            )
        return list(before)

    def _retry_one_by_one(self, assignment: Assignment, error: Exception) -> None:
        """Seeks back to the next record to read, and has records read one by one; raises UnreadableRecord the second time.

        Raises IllegalStateError if the partition is no longer this process's: its next owner meets the record.
        """
        self._metrics.kafka_errors.labels("read").inc()
        assert assignment.delivered is not None  # it was known before anything was read
        self._consumer.live.seek(assignment.tp, assignment.delivered)
        if assignment.single_record_reads:
            raise UnreadableRecord(
                f"the record of {assignment.name} at offset {assignment.delivered}, or in the batch that begins there, "
                f"cannot be read ({type(error).__name__})"
            ) from error
        assignment.single_record_reads = MAX_READ_RECORDS
