"""Delivery exactly once: results, dead letters and the input offset of a partition in one transaction of its own.

A transactional id belongs to one input partition, ``{group}/{topic}/{partition}``, so that whoever takes the partition
over fences the owner before, and a transaction that the old owner left behind has ended before the new one reads where
to begin. A transaction that fails in any way is not repaired: the partition begins again, by the same path.
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from aiokafka import TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    InvalidTransactionTimeout,
    ProducerFenced,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
)
from aiokafka.structs import OffsetAndMetadata

from worker.kafka.assignment import Assignment
from worker.kafka.connection import UNREACHABLE, Backoff, Connection, unreachable
from worker.kafka.delivery import Count, Outcome, Owner, Publish
from worker.kafka.output_limits import TimestampCheck
from worker.kafka.refusals import REFUSALS
from worker.kafka.sink import RECORDS_PER_PUBLISH
from worker.kafka.topics import TopicLimits
from worker.kafka.transactional_sink import TRANSACTION_TIMEOUT_MS, Lost, PartitionSink, Refusals
from worker.runtime.loop_budget import TurnBudget
from worker.runtime.tasks import cancel_all, within
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

LONGEST_INTERVAL_S: Final = 5.0
COST_MEMORY: Final = 0.9  # share of earlier commits in the average of how long one takes; the newest has the rest
ROOM_BYTES: Final = 64_000_000
RECORD_BYTES: Final = 1_000  # of a waiting record, beside its value
CLOSE_S: Final = 5.0  # for closing a producer that is not used any more


def due_at(
    *, gathered_at: float, committed_at: float, nothing_follows: bool, interval_s: float, least_s: float
) -> float:
    """When a partition's transaction is to be committed, on the clock of the two times.

    ``interval_s`` after its first record was ready for it, or at once if nothing that has been read follows; but
    ``least_s`` after the last one in any case.
    """
    return max(gathered_at if nothing_follows else gathered_at + interval_s, committed_at + least_s)


def least_interval_s(partitions: int, commit_s: float) -> float:
    """The shortest time between two transactions of a partition, where so many partitions commit.

    It is as long as if they committed one after the other. It is 0 for a single partition, which begins no transaction
    before its last one has ended.
    """
    return min(LONGEST_INTERVAL_S, partitions * commit_s) if partitions > 1 else 0.0


@dataclass(slots=True)
class Page:
    """Outcomes of one partition, in order, that are handed over together; without outcomes, only an offset to commit."""

    next_offset: int
    outcomes: Sequence[Outcome] = ()
    weight: int = field(init=False)  # bytes
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.weight = sum(len(outcome.record.value or b"") + RECORD_BYTES for outcome in self.outcomes)


class Writer:
    """The transactions of one assignment, one after the other, in a task of its own."""

    def __init__(self, transactions: "ExactlyOnce", assignment: Assignment, sink: PartitionSink) -> None:
        self.assignment = assignment
        self.sink = sink
        self.pages: list[Page] = []  # gathered for the next transaction
        self.committing: list[Page] = []
        self.committed: list[Page] = []  # and not counted yet
        self.committed_at = 0.0  # s since 1970
        self.weight = 0
        self.is_hurried = False
        self._transactions = transactions
        self._gathered_at = 0.0
        self._committed_at = -LONGEST_INTERVAL_S
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._write())

    @property
    def is_busy(self) -> bool:
        """Something of it is still to be committed."""
        return bool(self.pages or self.committing)

    def put(self, page: Page) -> None:
        if not self.pages:
            self._gathered_at = time.monotonic()
        self.pages.append(page)
        self.weight += page.weight
        self._changed.set()

    def goes_beyond(self, offset: int) -> bool:
        """Whether records after this offset are on their way.

        Their transaction commits this offset too. Committed after theirs, it would move the group backwards.
        """
        pages = (*self.committed, *self.committing, *self.pages)
        return any(page.outcomes and page.next_offset > offset for page in pages)

    def hurry(self) -> None:
        """From now on, whatever has been gathered is committed at once."""
        self.is_hurried = True
        self._changed.set()

    def look_again(self) -> None:
        """Something that decides when to commit has changed."""
        self._changed.set()

    async def _write(self) -> None:
        while True:
            await self._until_due()
            self.committing, self.pages = self.pages, []
            self.weight = 0
            await self._transact(self.committing)
            self._committed_at, self.committed_at = time.monotonic(), time.time()
            self.committed, self.committing = self.committing, []
            while self.committed:
                await self._transactions.turn_budget.before(len(self.committed[0].outcomes))
                self._transactions.settled(self, self.committed.pop(0))

    async def _until_due(self) -> None:
        while True:
            wait_s = self._due_in_s() if self.pages else None
            if wait_s is not None and wait_s <= 0:
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await within(wait_s, self._changed.wait())

    def _due_in_s(self) -> float:
        if self.is_hurried or self._transactions.needs_room(self):
            return 0.0
        at = due_at(
            gathered_at=self._gathered_at,
            committed_at=self._committed_at,
            nothing_follows=self.assignment.delivered == self.pages[-1].next_offset,
            interval_s=self._transactions.interval_s,
            least_s=self._transactions.least_s(),
        )
        return at - time.monotonic()

    async def _transact(self, pages: Sequence[Page]) -> None:
        outcomes = [outcome for page in pages for outcome in page.outcomes]
        started = time.monotonic()
        for begin in range(0, len(outcomes), RECORDS_PER_PUBLISH):
            some = outcomes[begin : begin + RECORDS_PER_PUBLISH]
            await self._transactions.turn_budget.before(len(some))
            await self._transactions.publish(some, self.sink)
        published = time.monotonic()
        offset = OffsetAndMetadata(pages[-1].next_offset, self.assignment.metadata)
        await self.sink.commit(offset, self.assignment.tp, self._transactions.group_id)
        self._transactions.observe(published - started, time.monotonic() - published)


class ExactlyOnce:
    """Implements ``Delivery`` with one transactional producer for each partition that this process owns.

    If a transaction is lost, its partition's work is dropped, and the owner is asked to begin the partition again.
    """

    has_producer_per_partition = True

    def __init__(
        self,
        connection: Connection,
        *,
        group_id: str,
        limits: Mapping[str, TopicLimits],
        turn_budget: TurnBudget,
        metrics: Metrics,
        health: Health,
        compression_type: str = "none",
        interval_s: float = 0.1,
    ) -> None:
        self.group_id = group_id
        self.interval_s = interval_s
        self.turn_budget = turn_budget
        self._connection = connection
        self._limits = dict(limits)
        self._checks: defaultdict[str, TimestampCheck] = defaultdict(TimestampCheck)  # by topic
        self._metrics = metrics
        self._health = health
        self._compression_type = compression_type
        self._commit_s = 0.0
        self._weight = 0
        self._room = asyncio.Event()
        self._room.set()
        self._settled = asyncio.Event()
        self._writers: dict[Assignment, Writer] = {}
        self._refusals: dict[TopicPartition, Refusals] = {}
        self._backoffs: dict[TopicPartition, Backoff] = {}
        self._in_doubt: dict[TopicPartition, list[Page]] = {}
        self._troubled: set[TopicPartition] = set()  # their last transaction was lost
        self._waiting: set[TopicPartition] = set()  # for the producer that they need
        self._closing: set[asyncio.Task[None]] = set()
        self._broken: list[BaseException] = []
        self._is_finishing = False

    def serve(self, owner: Owner, publish: Publish, count: Count) -> None:
        self._owner = owner
        self.publish = publish
        self._count = count

    async def start(self) -> None: ...

    # For the source.

    async def begin(self, assignment: Assignment) -> None:
        """Fences the partition's owner before; its committed offset may be read from now on.

        Waits, for as long as it takes, for brokers that are away and permissions that are missing.
        """
        await self._owner.confirm_membership()  # a member that was evicted unnoticed must not fence the new owner
        tp = assignment.tp
        if assignment in self._writers:
            return
        if tp in self._backoffs:
            await self._backoffs[tp].wait()
        sink = PartitionSink(
            self._connection,
            tp=tp,
            transactional_id=f"{self.group_id}/{tp.topic}/{tp.partition}",
            refusals=self._refusals.setdefault(tp, Refusals()),
            limits=self._limits,
            metrics=self._metrics,
            health=self._health,
            compression_type=self._compression_type,
            checks=self._checks,
        )
        await self._open(tp, sink)
        self._writers[assignment] = writer = Writer(self, assignment, sink)
        writer.task.add_done_callback(lambda _: self._ended(writer))

    def resume(self, assignment: Assignment, committed: int | None) -> None:
        """The committed offset, read after the partition was taken over: it tells what became of a commit in doubt.

        None where there is none, or it is of another topic, which had the same name before.
        """
        pages = self._in_doubt.pop(assignment.tp, [])
        is_done = all(committed is not None and committed >= page.next_offset for page in pages)
        if is_done:  # and nothing has to be committed again, which would tell that all is well
            self._well(assignment.tp)
            for page in pages:
                self._count(page.outcomes, time.time())

    async def commit(self, due: Sequence[tuple[Assignment, int, int]], timeout_s: float) -> bool:
        """Commits offsets that no record belongs to, by the partition's producer too: one way keeps them in order."""
        pages = []
        for assignment, offset, _ in due:
            writer = self._writers.get(assignment)
            if writer is not None and not writer.goes_beyond(offset):
                pages.append(Page(offset))
                writer.put(pages[-1])
        try:
            async with asyncio.timeout(timeout_s):
                for page in pages:
                    await page.done.wait()
        except TimeoutError:
            return False
        return True

    def flush(self, assignments: Iterable[Assignment]) -> None:
        for assignment in assignments:
            if assignment in self._writers:
                self._writers[assignment].hurry()

    def release(self, assignment: Assignment) -> None:
        """What is not committed is aborted."""
        self.abandon(assignment)
        self._refusals.pop(assignment.tp, None)
        self._in_doubt.pop(assignment.tp, None)
        self._well(assignment.tp)
        self._health.working("publish", assignment.tp)

    # For the pipeline.

    async def put(self, assignment: Assignment, outcomes: Sequence[Outcome]) -> None:
        """Gathers outcomes of one partition for its next transaction. Waits while too much is gathered already."""
        page = Page(outcomes[-1].record.offset + 1, outcomes)
        while self._weight and self._weight + page.weight > ROOM_BYTES:
            self._room.clear()
            for writer in self._writers.values():
                writer.look_again()
            await self._room.wait()
            self._raise_broken()
        self._raise_broken()
        if assignment in self._writers:
            self._weight += page.weight
            self._writers[assignment].put(page)
        else:
            self._owner.drop(assignment, len(outcomes))

    def finish(self) -> None:
        self._is_finishing = True
        for writer in self._writers.values():
            writer.hurry()
        self._settled.set()

    async def run(self) -> None:
        """As of ``Delivery``. Kafka's errors end a transaction alone; all others are raised, such as DeadLetterRefused."""
        while not self._is_finishing or any(writer.is_busy or writer.committed for writer in self._writers.values()):
            self._raise_broken()
            self._settled.clear()
            await self._settled.wait()
        self._raise_broken()

    async def close(self, timeout_s: float) -> None:
        """Waits for the producers that are being closed; all of them, once the assignments are released."""
        if self._closing:
            await asyncio.wait(self._closing, timeout=timeout_s)
        await cancel_all(self._closing)

    # For the writers.

    def least_s(self) -> float:
        """How far apart the transactions of one partition are at least."""
        busy = sum(1 for writer in self._writers.values() if writer.is_busy)
        return least_interval_s(busy, self._commit_s)

    def needs_room(self, writer: Writer) -> bool:
        """Whether this one should make room for what is waiting for it."""
        return not self._room.is_set() and writer.weight * len(self._writers) >= self._weight

    def observe(self, publish_s: float, commit_s: float) -> None:
        """How long a transaction took: to publish, and to commit beside others, which share what it costs."""
        beside = sum(1 for writer in self._writers.values() if writer.committing)
        self._metrics.stage_seconds["publish"].observe(publish_s)
        self._metrics.stage_seconds["commit"].observe(commit_s)
        self._commit_s = COST_MEMORY * self._commit_s + (1 - COST_MEMORY) * commit_s / max(1, beside)

    def settled(self, writer: Writer, page: Page) -> None:
        """This page is committed: it is counted, and its records are done with."""
        tp = writer.assignment.tp
        self._well(tp)
        self._refusals[tp].forget_before(page.next_offset)
        if page.outcomes:
            self._count(page.outcomes, writer.committed_at)
        self._owner.advance(writer.assignment, page.next_offset, len(page.outcomes))
        page.done.set()
        self._free(page.weight)

    # Beginnings and ends.

    async def _open(self, tp: TopicPartition, sink: PartitionSink) -> None:
        backoff = Backoff()
        try:
            while True:
                try:
                    await sink.open()
                except UNREACHABLE as error:
                    self._waiting.add(tp)
                    self._metrics.kafka_errors.labels("transaction").inc()
                    self._health.failing("takeover", self._why_it_waits(error))
                else:
                    return
                await backoff.wait()
        finally:
            self._waiting.discard(tp)
            if not self._waiting:
                self._health.working("takeover")

    def _why_it_waits(self, error: BaseException) -> str:
        if isinstance(error, TransactionalIdAuthorizationFailed):
            return (
                f"no permission (ACL) to use the transactional ids that begin with {self.group_id}/; "
                "Write and Describe are needed"
            )
        if isinstance(error, InvalidTransactionTimeout):
            return (
                f"the broker's transaction.max.timeout.ms is below {TRANSACTION_TIMEOUT_MS}, which delivery exactly-once "
                "needs"
            )
        return unreachable(self._connection, error)

    def _ended(self, writer: Writer) -> None:
        """Handles a writer that has ended: by an error, or because it was cancelled.

        A cancel is expected if the writer was taken out of ``_writers`` before; any other one counts as a failure.
        """
        if not writer.task.cancelled():
            error = writer.task.exception()
        elif self._writers.get(writer.assignment) is writer:
            error = Lost("cancelled")
        else:
            return
        if isinstance(error, Lost):
            self._give_up(writer, error)
        elif error is not None:
            self._broken.append(error)
        self._settled.set()
        self._room.set()

    def _give_up(self, writer: Writer, reason: Lost) -> None:
        tp = writer.assignment.tp
        self._metrics.kafka_errors.labels("transaction").inc()
        log.warning(
            "a transaction is given up, and its records are processed again",
            extra={"partition": f"{tp.topic}-{tp.partition}", "reason": str(reason)},
        )
        if writer.assignment.is_owned:
            self._in_doubt[tp] = writer.committing
            self._backoffs.setdefault(tp, Backoff())
            if not isinstance(reason.__cause__, (ProducerFenced, *REFUSALS)):
                self._troubled.add(tp)
                self._health.failing("transactions", self._why_it_was_lost(reason))
        self.abandon(writer.assignment)
        self._owner.restart(writer.assignment)

    def _why_it_was_lost(self, reason: Lost) -> str:
        if isinstance(reason.__cause__, GroupAuthorizationFailedError):
            return f"no permission to commit as group {self.group_id} (ACL)"
        if isinstance(reason.__cause__, TopicAuthorizationFailedError):
            return "no permission to publish (ACL)"
        return f"cannot commit a transaction ({reason})"

    def _well(self, tp: TopicPartition) -> None:
        self._backoffs.pop(tp, None)
        self._troubled.discard(tp)
        if not self._troubled:
            self._health.working("transactions")

    def abandon(self, assignment: Assignment) -> None:
        """This assignment's work is dropped; the partition may be taken over again."""
        writer = self._writers.pop(assignment, None)
        if writer is None:
            return
        writer.task.cancel()
        for page in writer.committed:
            self.settled(writer, page)
        writer.committed = []
        pages = [*writer.committing, *writer.pages]
        closing = asyncio.create_task(self._close(writer))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        for page in pages:
            self._owner.drop(writer.assignment, len(page.outcomes))
            page.done.set()
        self._free(sum(page.weight for page in pages))

    async def _close(self, writer: Writer) -> None:
        await cancel_all([writer.task])
        if writer.assignment.tp not in self._refusals:  # it was released, and its last failure may still be reported
            self._health.working("publish", writer.assignment.tp)
        await writer.sink.close(CLOSE_S)

    def _free(self, weight: int) -> None:
        self._weight -= weight
        self._room.set()
        self._settled.set()

    def _raise_broken(self) -> None:
        if self._broken:
            raise self._broken[0]
