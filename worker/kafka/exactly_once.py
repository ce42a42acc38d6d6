"""Delivery exactly once: results, dead letters and the input offset of a partition in one transaction of its own.

A transactional id belongs to one input partition, ``{group}/{topic}/{partition}``, so that whoever takes the partition
over fences the owner before, and a transaction that the old owner left behind has ended before the new one reads where
to begin. A transaction that fails in any way is not mended: the partition begins anew, by the same path.
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    IllegalOperation,
    InvalidTransactionTimeout,
    ProducerFenced,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
)
from aiokafka.structs import OffsetAndMetadata

from worker.kafka.connection import UNREACHABLE, Backoff, Connection, TopicLimits, unreachable
from worker.kafka.sink import (
    RECORDS_PER_PUBLISH,
    REFUSALS,
    TELLING,
    Columns,
    Load,
    ProducerRecord,
    Sink,
    TimestampCheck,
    unanswered,
)
from worker.reasons import Reason
from worker.runtime.loop_budget import TurnBudget
from worker.runtime.tasks import cancelled, within
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from worker.kafka.source import Assignment
    from worker.pipeline.stages import Outcome

log = logging.getLogger(__name__)

TRANSACTION_TIMEOUT_MS: Final = 60_000  # a stall that is longer costs the transaction, which is then done again
LONGEST_INTERVAL_S: Final = 5.0
COST_MEMORY: Final = 0.9  # of a new commit's duration a tenth goes into what commits are thought to take
ROOM_BYTES: Final = 64_000_000
RECORD_BYTES: Final = 1_000  # of a waiting record, beside its value
FAREWELL_S: Final = 5.0


Failures = dict[tuple[str, int], tuple[list[Load], BaseException]]  # as of Sink: what of each lane failed, and why


class Lost(Exception):
    """A transaction cannot be finished; the message says why. Its records are worked on again."""


def due_at(
    *, gathered_at: float, committed_at: float, nothing_follows: bool, interval_s: float, least_s: float
) -> float:
    """When a partition's transaction is to be committed, on the clock of the two times.

    ``interval_s`` after its first record was ready for it, or at once if nothing that has been read follows; but
    ``least_s`` after the last one in any case.
    """
    return max(gathered_at if nothing_follows else gathered_at + interval_s, committed_at + least_s)


def least_interval_s(partitions: int, commit_s: float) -> float:
    """How far apart the transactions of a partition are at least, where so many commit: as if one did after the other.

    Nothing for a single partition, which cannot begin one before the last has ended.
    """
    return min(LONGEST_INTERVAL_S, partitions * commit_s) if partitions > 1 else 0.0


RefusalKey = tuple[int, str, bool, int]


class Refusals:
    """What the brokers have refused of one input partition, for when its records are sent again.

    A refusal is of a whole batch. Of more than one record each is sent alone the next time, and that tells which it is.
    """

    def __init__(self) -> None:
        self._reasons: dict[RefusalKey, Reason] = {}
        self._suspects: set[RefusalKey] = set()

    def note(self, producer_records: Sequence[ProducerRecord], reason: Reason) -> None:
        """These records, sent as one batch, were refused."""
        if len(producer_records) == 1:
            self._reasons[_refusal_key(producer_records[0])] = reason
        else:
            self._suspects.update(map(_refusal_key, producer_records))

    def reason(self, producer_record: ProducerRecord) -> Reason | None:
        """Why this record is known to be refused."""
        return self._reasons.get(_refusal_key(producer_record)) if self._reasons else None

    def apart(self, producer_records: Sequence[ProducerRecord], load: Load) -> list[Load]:
        """A load in loads of their own for the suspects, in the same order."""
        if not self._suspects:
            return [load]
        loads: list[Load] = []
        was_suspect = True
        for place in load:
            is_suspect = _refusal_key(producer_records[place]) in self._suspects
            if is_suspect or was_suspect:
                loads.append([])
            loads[-1].append(place)
            was_suspect = is_suspect
        return loads

    def forget_before(self, offset: int) -> None:
        """The records before this offset are committed, and not sent again."""
        self._reasons = {key: reason for key, reason in self._reasons.items() if key[0] >= offset}
        self._suspects = {key for key in self._suspects if key[0] >= offset}


def _refusal_key(producer_record: ProducerRecord) -> RefusalKey:
    """A record's input offset, where it goes, and in which form: a dead letter has three, each smaller than the last."""
    return (
        producer_record.offset,
        producer_record.topic,
        bool(producer_record.record.value),
        len(producer_record.record.headers),
    )


class PartitionSink(Sink):
    """A transactional producer, of one input partition. What is published counts once ``commit`` has returned.

    Any failure raises Lost, and leaves it good for nothing but ``close``. After a refusal ``limits`` are those of now.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        tp: TopicPartition,
        transactional_id: str,
        refusals: Refusals,
        limits: dict[str, TopicLimits],
        metrics: Metrics,
        health: Health,
        compression_type: str = "none",
        checks: defaultdict[str, TimestampCheck] | None = None,
    ) -> None:
        super().__init__(
            connection,
            limits=limits,
            metrics=metrics,
            health=health,
            compression_type=compression_type,
            checks=checks,
        )
        self._who = tp
        self._transactional_id = transactional_id
        self._refusals = refusals
        self._shared_limits = limits
        self._is_in_transaction = False

    async def open(self) -> None:
        """Fences every producer of this id, and ends what it left behind. Raises what is in UNREACHABLE."""
        self._producer = await self._new_producer(
            transactional_id=self._transactional_id, transaction_timeout_ms=TRANSACTION_TIMEOUT_MS
        )

    async def publish(self, producer_records: Sequence[ProducerRecord]) -> list[Reason | None]:
        """As of Sink, within a transaction, which it begins. Raises Lost."""
        if not producer_records:
            return []
        columns = Columns.of(producer_records)
        known = [self._refusals.reason(producer_record) for producer_record in producer_records]
        limited = await self._refused_by_limits(columns)
        answers = [one or other for one, other in zip(known, limited, strict=True)]
        with _failures():
            async with asyncio.timeout(TRANSACTION_TIMEOUT_MS / 1000):
                await self._begin()
                lanes = {
                    lane: [apart for load in loads for apart in self._refusals.apart(producer_records, load)]
                    for lane, loads in (await self._lanes(columns, unanswered(answers))).items()
                }
                producer = await self._fresh_producer(sum(answer is None for answer in answers))
                sending = asyncio.create_task(self._send(producer, columns, lanes))
                failures = await self._while_alive(producer, sending)
        for loads, error in failures.values():
            reason = REFUSALS.get(type(error))
            if reason:
                self._refusals.note([producer_records[place] for place in loads[0]], reason)
            if type(error) in TELLING:
                await self._refresh_limits(0.0)
                self._shared_limits.update(self._limits)
            raise Lost(type(error).__name__) from error
        self._health.well("publish", self._who)
        return answers

    async def commit(self, offset: OffsetAndMetadata, tp: TopicPartition, group_id: str) -> None:
        """Commits all that was published since the last time, and this offset of the group. Raises Lost.

        Lost does not tell whether it was committed: that the next owner reads.
        """
        with _failures():
            async with asyncio.timeout(self._connection.request_timeout_s):
                await self._begin()
                producer = await self._fresh_producer(0)
                await producer.send_offsets_to_transaction({tp: offset}, group_id)
                await producer.commit_transaction()
                self._is_in_transaction = False

    async def close(self, timeout_s: float) -> None:
        """Aborts what is open, so that readers need not wait for it, and disconnects; within ``timeout_s``."""
        producer = self._producer
        if producer is not None and self._is_in_transaction:
            with contextlib.suppress(Lost), _failures():
                await within(timeout_s / 2, producer.abort_transaction())
        await super().close(timeout_s / 2)
        if producer is not None:
            _forget_error(producer)

    async def _begin(self) -> None:
        if not self._is_in_transaction:
            producer = await self._fresh_producer(0)
            await producer.begin_transaction()
            self._is_in_transaction = True

    async def _fresh_producer(self, records: int) -> AIOKafkaProducer:
        """This very one: another would be another transaction."""
        if self._producer is None:
            raise Lost("the producer is closed")
        if self._records_sent + records > self._records_per_producer:
            raise Lost("the producer's sequence numbers run out")
        return self._producer

    def _note_in_doubt(self, records: int) -> None:
        """Nothing: their transaction is aborted."""

    @staticmethod
    async def _while_alive(producer: AIOKafkaProducer, sending: "asyncio.Task[Failures]") -> Failures:
        """What is sent, unless the producer has died meanwhile: what it was about to send again then waits for ever."""
        try:
            await asyncio.wait({sending, producer._sender.sender_task}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({sending}, timeout=None if not producer._sender.sender_task.done() else 1)
            if not sending.done():
                raise Lost("the producer has failed")
            return sending.result()
        finally:
            await cancelled([sending])


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Whatever aiokafka raises becomes Lost; AssertionError is its word for a transaction that has failed before."""
    try:
        yield
    except (*UNREACHABLE, IllegalOperation, AssertionError) as error:
        raise Lost(type(error).__name__) from error


@dataclass(slots=True)
class Page:
    """Some records of one partition, in order, that are ready to be published; without records, an offset alone."""

    next_offset: int
    outcomes: Sequence["Outcome"] = ()
    weight: int = field(init=False)  # bytes
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.weight = sum(len(outcome.record.value or b"") + RECORD_BYTES for outcome in self.outcomes)


class Owner(Protocol):
    """Whoever owns the assignments: the source."""

    def advance(self, assignment: "Assignment", next_offset: int, records: int) -> None:
        """Everything before ``next_offset`` is committed."""

    def drop(self, assignment: "Assignment", records: int) -> None:
        """These records go no further under this assignment."""

    def restart(self, assignment: "Assignment") -> None:
        """The partition begins anew from its committed offset."""


class Writer:
    """The transactions of one assignment, one after the other, in a task of its own."""

    def __init__(self, transactions: "Transactions", assignment: "Assignment", sink: PartitionSink) -> None:
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
        """Records after this offset are on their way: they commit it too, and behind them it would lead back."""
        pages = (*self.committed, *self.committing, *self.pages)
        return any(page.outcomes and page.next_offset > offset for page in pages)

    def hurry(self) -> None:
        """From now on whatever is there is committed at once."""
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
            await self._transactions.deliver(some, self.sink)
        published = time.monotonic()
        offset = OffsetAndMetadata(pages[-1].next_offset, self.assignment.metadata)
        await self.sink.commit(offset, self.assignment.tp, self._transactions.group_id)
        self._transactions.observe(published - started, time.monotonic() - published)


class Transactions:
    """Delivers exactly once: for each partition that this process owns, a producer and its transactions.

    The source calls ``take_over``, ``found``, ``commit``, ``settle``, ``retire`` and ``release``; the pipeline ``put``,
    ``finish``, ``watch`` and ``close``. A lost transaction drops its partition's work and asks the owner to begin it anew.
    """

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
        self._farewells: set[asyncio.Task[None]] = set()
        self._broken: list[BaseException] = []

    def serve(
        self,
        owner: Owner,
        deliver: Callable[[Sequence["Outcome"], Sink], Awaitable[None]],
        count: Callable[[Sequence["Outcome"], float], None],
    ) -> None:
        """Who owns the assignments, how outcomes are published to a sink, and who counts those that are committed.

        With them goes when they were, in s since 1970.
        """
        self._owner = owner
        self.deliver = deliver
        self._count = count

    # For the source.

    async def take_over(self, assignment: "Assignment") -> None:
        """Fences the partition's owner before; its committed offset may be read from now on.

        Waits, for as long as it takes, for brokers that are away and permissions that are missing.
        """
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

    def found(self, assignment: "Assignment", committed: int | None) -> None:
        """The committed offset, read after the partition was taken over: it tells what became of a commit in doubt.

        None where there is none, or it is of another topic, which had the same name before.
        """
        pages = self._in_doubt.pop(assignment.tp, [])
        is_done = all(committed is not None and committed >= page.next_offset for page in pages)
        if is_done:  # and nothing has to be committed again, which would tell that all is well
            self._well(assignment.tp)
            for page in pages:
                self._count(page.outcomes, time.time())

    async def commit(self, offsets: Iterable[tuple["Assignment", int]]) -> None:
        """Commits offsets that no record belongs to; returns when it is done, or the partition has begun anew."""
        pages = []
        for assignment, offset in offsets:
            writer = self._writers.get(assignment)
            if writer is not None and not writer.goes_beyond(offset):
                pages.append(Page(offset))
                writer.put(pages[-1])
        for page in pages:
            await page.done.wait()

    def settle(self, assignments: Iterable["Assignment"]) -> None:
        """These partitions are about to go: what is there of them is committed without delay."""
        for assignment in assignments:
            if assignment in self._writers:
                self._writers[assignment].hurry()

    def release(self, assignment: "Assignment") -> None:
        """The partition is no longer this process's: what is not committed is aborted."""
        self.retire(assignment)
        self._refusals.pop(assignment.tp, None)
        self._in_doubt.pop(assignment.tp, None)
        self._well(assignment.tp)
        self._health.well("publish", assignment.tp)

    # For the pipeline.

    async def put(self, assignment: "Assignment", outcomes: Sequence["Outcome"]) -> None:
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

    async def finish(self) -> None:
        """Commits all that was put, and returns when it is done, or its partition has been given up."""
        for writer in self._writers.values():
            writer.hurry()
        while any(writer.is_busy or writer.committed for writer in self._writers.values()):
            self._settled.clear()
            self._raise_broken()
            await self._settled.wait()
        self._raise_broken()

    async def watch(self) -> None:
        """Raises what breaks for another reason than Kafka's, such as DeadLetterRefused. Else it does not end."""
        while True:
            self._raise_broken()
            self._settled.clear()
            await self._settled.wait()

    async def close(self, timeout_s: float) -> None:
        """Waits for the producers that are being closed; all of them, once the assignments are released."""
        if self._farewells:
            await asyncio.wait(self._farewells, timeout=timeout_s)
        await cancelled(self._farewells)

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
                    self._health.trouble("takeover", self._why_it_waits(error))
                else:
                    return
                await backoff.wait()
        finally:
            self._waiting.discard(tp)
            if not self._waiting:
                self._health.well("takeover")

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
        """A writer ends by itself only when something has gone wrong; a cancel is ours where it was retired before."""
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
            "a transaction is given up, and its records are worked on again",
            extra={"partition": f"{tp.topic}-{tp.partition}", "reason": str(reason)},
        )
        if writer.assignment.is_owned:
            self._in_doubt[tp] = writer.committing
            self._backoffs.setdefault(tp, Backoff())
            if not isinstance(reason.__cause__, (ProducerFenced, *REFUSALS)):
                self._troubled.add(tp)
                self._health.trouble("transactions", self._why_it_was_lost(reason))
        self.retire(writer.assignment)
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
            self._health.well("transactions")

    def retire(self, assignment: "Assignment") -> None:
        """This assignment's work is dropped; the partition may be taken over again."""
        writer = self._writers.pop(assignment, None)
        if writer is None:
            return
        writer.task.cancel()
        for page in writer.committed:
            self.settled(writer, page)
        writer.committed = []
        pages = [*writer.committing, *writer.pages]
        farewell = asyncio.create_task(self._farewell(writer))
        self._farewells.add(farewell)
        farewell.add_done_callback(self._farewells.discard)
        for page in pages:
            self._owner.drop(writer.assignment, len(page.outcomes))
            page.done.set()
        self._free(sum(page.weight for page in pages))

    async def _farewell(self, writer: Writer) -> None:
        await cancelled([writer.task])
        if writer.assignment.tp not in self._refusals:  # released: its last words may have been a trouble
            self._health.well("publish", writer.assignment.tp)
        await writer.sink.close(FAREWELL_S)

    def _free(self, weight: int) -> None:
        self._weight -= weight
        self._room.set()
        self._settled.set()

    def _raise_broken(self) -> None:
        if self._broken:
            raise self._broken[0]


def _forget_error(producer: AIOKafkaProducer) -> None:
    """An error that nobody waits for any more is not to be told as one that was never looked at."""
    waiter = producer._txn_manager._transaction_waiter
    if waiter is not None and waiter.done() and not waiter.cancelled():
        waiter.exception()
