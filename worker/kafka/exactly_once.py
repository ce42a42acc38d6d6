"""Delivery exactly once: results, dead letters and input offsets of all partitions in one transaction after the other.

One transactional producer serves the process (KIP-447). Offsets are committed as the member of the group, and in the
generation, under which their records were read: the group refuses those of a process that has lost its partitions. A
partition begins at an offset that no open transaction can change.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from aiokafka import TopicPartition
from aiokafka.errors import (
    IllegalStateError,
    InvalidTransactionTimeout,
    ProducerFenced,
    TransactionalIdAuthorizationFailed,
)

from worker.kafka.aiokafka_compat.transactions import Membership
from worker.kafka.assignment import Assignment
from worker.kafka.connection import UNREACHABLE, Connection, unreachable
from worker.kafka.delivery import Count, Outcome, Owner, Publish
from worker.kafka.permissions import add_the_acl
from worker.kafka.sink import RECORDS_PER_PUBLISH
from worker.kafka.transactional_sink import (
    TRANSACTION_TIMEOUT_S,
    TransactionalSink,
    TransactionFailed,
    TransactionFenced,
    TransactionInDoubt,
    TransactionLost,
)
from worker.runtime.backoff import Backoff
from worker.runtime.loop_budget import TurnBudget
from worker.runtime.tasks import cancel_all, within
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

MAX_HELD_BYTES: Final = 64_000_000
LONGEST_S: Final = TRANSACTION_TIMEOUT_S / 3  # after which nothing more is published in a transaction
RECORD_BYTES: Final = 1_000  # of an outcome that is held, beside its record's value


@dataclass(slots=True, eq=False)
class TransactionEntry:
    """Outcomes of one assignment that were put together, and the offset after them; without outcomes, an offset alone."""

    assignment: Assignment
    next_offset: int
    outcomes: Sequence[Outcome] = ()
    held_bytes: int = field(init=False)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.held_bytes = sum(len(outcome.record.value or b"") + RECORD_BYTES for outcome in self.outcomes)


class ExactlyOnce:
    """Implements ``Delivery`` by transactions of one producer, which follow each other ``interval_s`` apart or more.

    It holds outcomes until their transaction is known to be committed. Those of a transaction that fails are sent again.
    """

    requires_stable_offsets = True

    def __init__(
        self,
        connection: Connection,
        sink: TransactionalSink,
        *,
        group_id: str,
        interval_s: float,
        turn_budget: TurnBudget,
        metrics: Metrics,
        health: Health,
    ) -> None:
        self._connection = connection
        self._sink = sink
        self._group_id = group_id
        self._interval_s = interval_s
        self._turn_budget = turn_budget
        self._metrics = metrics
        self._health = health
        self._waiting: deque[TransactionEntry] = deque()
        self._published: list[TransactionEntry] = []  # in the open transaction
        self._uncounted: deque[TransactionEntry] = deque()  # of the transaction that was committed last
        self._held_bytes = 0
        self._urgent: set[Assignment] = set()  # those that are about to be revoked, or were dropped
        self._refused: Membership | None = None  # under which nothing can be committed any more
        self._committed_at = 0.0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._ended = asyncio.Event()  # a transaction
        self._is_finishing = False
        self._running: asyncio.Task[None] | None = None

    def serve(self, owner: Owner, publish: Publish, count: Count) -> None:
        self._owner = owner
        self._publish = publish
        self._count = count

    async def start(self) -> None:
        """As of ``Delivery``. Raises WrongSetting where brokers are too old."""
        await self._open()
        await self._sink.refuse_old_brokers()

    # For the source.

    async def begin(self, assignment: Assignment) -> None:
        """Waits until no transaction of this process can change the partition's committed offset."""
        if assignment.membership is None:
            raise IllegalStateError("the group is joined again")
        while assignment.membership == self._refused or any(
            put.assignment.tp == assignment.tp for put in self._published
        ):
            self._ended.clear()
            await self._ended.wait()

    async def commit(self, due: Sequence[tuple[Assignment, int, int]], timeout_s: float) -> bool:
        """Commits offsets that no record belongs to, by a transaction too: one way keeps them in order.

        After ``run`` has ended it commits nothing: the next owner skips what these offsets would skip.
        """
        if self._running is not None and self._running.done():
            return True
        furthest = {put.assignment: put for put in (*self._uncounted, *self._published, *self._waiting)}
        puts = [TransactionEntry(each, to) for each, to, _ in due if not _covers(furthest.get(each), to)]
        self._waiting.extend(puts)
        self._changed.set()
        try:
            async with asyncio.timeout(timeout_s):
                for put in puts:
                    await put.done.wait()
        except TimeoutError:
            return False
        return True

    def flush(self, assignments: Iterable[Assignment]) -> None:
        self._urgent.update(assignments)
        self._changed.set()

    def abandon(self, assignment: Assignment) -> None:
        """Drops what is not in a transaction yet. An open transaction that holds some of it is aborted."""
        for put in [put for put in self._waiting if put.assignment is assignment]:
            self._waiting.remove(put)
            self._drop(put)
        (self._urgent.add if self._published else self._urgent.discard)(assignment)
        self._changed.set()

    def release(self, assignment: Assignment) -> None:
        self.abandon(assignment)
        for part in ("publish", "transactions"):
            self._health.working(part)

    # For the pipeline.

    async def put(self, assignment: Assignment, outcomes: Sequence[Outcome]) -> None:
        put = TransactionEntry(assignment, outcomes[-1].record.offset + 1, outcomes)
        while self._held_bytes and self._held_bytes + put.held_bytes > MAX_HELD_BYTES:
            self._room.clear()
            self._changed.set()
            await self._room.wait()
        self._held_bytes += put.held_bytes
        if not assignment.is_owned:
            self._drop(put)
            return
        self._waiting.append(put)
        self._changed.set()

    def finish(self) -> None:
        self._is_finishing = True
        self._changed.set()

    async def run(self) -> None:
        """As of ``Delivery``. Kafka's errors end a transaction alone; all others are raised, such as DeadLetterRefused."""
        self._running = asyncio.current_task()
        backoff = Backoff()
        while await self._until_put():
            try:
                await self._transact()
                backoff = Backoff()
            except TransactionLost as lost:
                await self._recover(lost, backoff)

    async def close(self, timeout_s: float) -> None:
        if self._running is not None:
            await cancel_all([self._running])
        await self._sink.close(timeout_s)

    # Transactions.

    async def _until_put(self) -> bool:
        """Whether there is anything to deliver; False at the end."""
        while not (self._waiting or self._published):
            if self._is_finishing:
                return False
            self._changed.clear()
            await self._changed.wait()
        return True

    async def _transact(self) -> None:
        """One transaction: begins with what waits, takes what comes until it is due, and commits."""
        until = time.monotonic() + LONGEST_S
        publishing_s = await self._publish_waiting(until)
        while (wait_s := self._due_in_s()) > 0 and time.monotonic() < until:
            if not self._waiting:
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    await within(wait_s, self._changed.wait())
            publishing_s += await self._publish_waiting(until)
        if not self._published:
            return
        published = time.monotonic()
        await self._commit()
        self._metrics.stage_seconds["publish"].observe(publishing_s)
        self._metrics.stage_seconds["commit"].observe(time.monotonic() - published)
        self._health.working("transactions")
        await self._settle()

    async def _publish_waiting(self, until: float) -> float:
        """Publishes what waits now; returns how many seconds that took.

        What comes meanwhile, or is left at the time ``until`` of the monotonic clock, waits on.
        """
        started = time.monotonic()
        puts = len(self._waiting)
        while puts > 0 and self._waiting and time.monotonic() < until:
            await self._turn_budget.before(min(RECORDS_PER_PUBLISH, sum(len(put.outcomes) for put in self._waiting)))
            outcomes: list[Outcome] = []
            while self._waiting and len(outcomes) < RECORDS_PER_PUBLISH:
                put = self._waiting.popleft()
                self._published.append(put)
                outcomes += put.outcomes
                puts -= 1
            if outcomes:
                await self._publish(outcomes, self._sink)
        return time.monotonic() - started

    def _due_in_s(self) -> float:
        if self._is_finishing or self._urgent or not self._room.is_set() or not self._published:
            return 0.0
        return self._committed_at + self._interval_s - time.monotonic()

    async def _commit(self) -> None:
        memberships = {put.assignment.membership for put in self._published if put.assignment.is_owned}
        if len(memberships) != 1 or not all(put.assignment.is_owned for put in self._published):
            raise TransactionFailed("a partition was revoked")
        (member,) = memberships
        assert member is not None  # else ``begin`` has raised, and nothing was read
        offsets = {
            put.assignment.tp: (put.next_offset, put.assignment.metadata) for put in self._published
        }  # of each partition the last
        self._committed_at = time.monotonic()
        await self._sink.commit(offsets, member)

    async def _settle(self) -> None:
        """The transaction is committed: its outcomes are counted, and done with."""
        now = time.time()
        self._uncounted.extend(self._published)
        self._end_transaction()
        while self._uncounted:
            await self._turn_budget.before(len(self._uncounted[0].outcomes))
            put = self._uncounted.popleft()
            if put.outcomes:
                self._count(put.outcomes, now)
            self._owner.advance(put.assignment, put.next_offset, len(put.outcomes))
            self._forget(put)

    def _end_transaction(self) -> None:
        self._published = []
        self._urgent = {assignment for assignment in self._urgent if assignment.is_owned}
        self._ended.set()

    # Transactions that are lost.

    async def _recover(self, lost: TransactionLost, backoff: Backoff) -> None:
        """Ends the transaction for certain. Then drops, counts or sends again what was in it."""
        self._metrics.kafka_errors.labels("transaction").inc()
        log.warning("a transaction is given up", extra={"reason": str(lost)})
        if lost.__cause__ is not None:  # else nothing went wrong
            if not isinstance(lost, TransactionFenced):
                self._health.failing("transactions", f"cannot commit a transaction: {lost}")
            await backoff.wait()
        await self._open()
        if isinstance(lost, TransactionFenced):
            self._drop_all(lost)
        elif isinstance(lost, TransactionInDoubt) and await self._is_committed():
            self._health.working("transactions")
            await self._settle()
        else:
            self._send_again(lost.partitions)

    async def _open(self) -> None:
        backoff = Backoff()
        while True:
            try:
                await self._sink.open()
            except UNREACHABLE as error:
                self._metrics.kafka_errors.labels("transaction").inc()
                self._health.failing("takeover", _why_it_waits(error, self._connection, self._group_id))
            else:
                self._health.working("takeover")
                return
            await backoff.wait()

    async def _is_committed(self) -> bool:
        """Whether the transaction in doubt is committed, by the committed offset of any partition that is still owned.

        One may have lost it since, with its topic. If none is owned, their next owners find out.
        """
        backoff = Backoff()
        while last := {put.assignment.tp: put for put in self._published if put.assignment.is_owned and put.outcomes}:
            try:
                commits = await asyncio.gather(*map(self._owner.committed_offset, last))
            except UNREACHABLE:
                await backoff.wait()
                continue
            found = {put: commit for put, commit in zip(last.values(), commits, strict=True) if put.assignment.is_owned}
            if found:  # else what is committed may be the next owners'
                return any(commit == (put.next_offset, put.assignment.metadata) for put, commit in found.items())
        return False

    def _send_again(self, without: Collection[TopicPartition]) -> None:
        """What is still owned goes into the next transaction, not read nor scored again. ``without`` are to begin again."""
        for assignment in {put.assignment for put in self._published if put.assignment.tp in without}:
            self._owner.restart(assignment)
        for put in reversed(self._published):
            if put.assignment.is_owned:
                self._waiting.appendleft(put)
            else:
                self._drop(put)
        self._end_transaction()

    def _drop_all(self, fenced: TransactionFenced) -> None:
        """Its partitions begin again from their committed offsets: another process may be at work on them."""
        puts = [*self._published, *self._waiting]
        self._waiting.clear()
        if not isinstance(fenced.__cause__, ProducerFenced):  # by the group, which has to be joined again
            self._refused = next((put.assignment.membership for put in puts), None)
            self._health.failing("transactions", f"{fenced}: waiting for partitions")
            for put in puts:
                put.assignment.is_lost = True
        for put in puts:
            self._drop(put)
        self._end_transaction()
        for assignment in {put.assignment for put in puts if put.assignment.is_owned}:
            self._owner.restart(assignment)

    def _drop(self, put: TransactionEntry) -> None:
        self._owner.drop(put.assignment, len(put.outcomes))
        self._forget(put)

    def _forget(self, put: TransactionEntry) -> None:
        put.done.set()
        self._held_bytes -= put.held_bytes
        self._room.set()


def _covers(last: TransactionEntry | None, offset: int) -> bool:
    """Whether the last put of an assignment makes this offset needless. Committed after it, it would lead back."""
    return last is not None and (last.next_offset == offset or (bool(last.outcomes) and last.next_offset > offset))


def _why_it_waits(error: BaseException, connection: Connection, group_id: str) -> str:
    """Why no transactional producer can be had."""
    if isinstance(error, TransactionalIdAuthorizationFailed):
        return add_the_acl(f"WRITE and DESCRIBE on transactional ids with the prefix {group_id}/")
    if isinstance(error, InvalidTransactionTimeout):
        return (
            f"the broker's transaction.max.timeout.ms is below {TRANSACTION_TIMEOUT_S:g} s, which delivery exactly-once "
            "needs"
        )
    if isinstance(error, TimeoutError):
        return "brokers do not end this process's last transaction: a partition in it, or its coordinator, is away"
    return unreachable(connection, error)
