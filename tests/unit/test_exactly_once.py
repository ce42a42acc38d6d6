"""When a transaction is committed, what is remembered of refusals, and what becomes of a transaction that is lost."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import GroupAuthorizationFailedError, ProducerFenced, TransactionalIdAuthorizationFailed
from aiokafka.structs import OffsetAndMetadata

from worker.core.events import Outgoing
from worker.kafka import exactly_once as module
from worker.kafka.assignment import Assignment
from worker.kafka.connection import Backoff, Connection
from worker.kafka.exactly_once import LONGEST_INTERVAL_S, ExactlyOnce, due_at, least_interval_s
from worker.kafka.producer_records import ProducerRecord
from worker.kafka.transactional_sink import Lost, Refusals
from worker.reasons import Reason
from worker.runtime.loop_budget import RECORDS, TurnBudget
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

TP = TopicPartition("t", 0)


# When.


def test_a_transaction_is_committed_after_the_interval() -> None:
    due = due_at(gathered_at=10, committed_at=9.95, nothing_follows=False, interval_s=0.1, least_s=0)
    assert due == pytest.approx(10.1)


def test_and_at_once_when_nothing_follows() -> None:
    assert due_at(gathered_at=10, committed_at=9.95, nothing_follows=True, interval_s=0.1, least_s=0.02) == 10


@pytest.mark.parametrize("nothing_follows", [True, False])
def test_but_not_before_the_other_partitions_had_their_turn(nothing_follows: bool) -> None:
    due = due_at(gathered_at=10, committed_at=9.9, nothing_follows=nothing_follows, interval_s=0.1, least_s=0.75)
    assert due == pytest.approx(10.65)


@pytest.mark.parametrize(
    ("partitions", "commit_s", "least_s"),
    [(0, 0.01, 0), (1, 0.5, 0), (6, 0.01, 0.06), (96, 0.01, 0.96), (1_000, 0.01, LONGEST_INTERVAL_S)],
)
def test_the_interval_stretches_with_the_partitions(partitions: int, commit_s: float, least_s: float) -> None:
    assert least_interval_s(partitions, commit_s) == pytest.approx(least_s)


# Refusals.


def producer_record(offset: int, topic: str = "out", value: bytes | None = b"{}", headers: int = 1) -> ProducerRecord:
    return ProducerRecord(topic, Outgoing(b"key", value, [("h", b"")] * headers, None), 0, offset)


def test_a_record_that_was_refused_alone_is_known_again() -> None:
    refusals = Refusals()
    refusals.note([producer_record(7)], "result_too_large")
    assert [refusals.reason(producer_record(offset)) for offset in (6, 7, 8)] == [None, "result_too_large", None]


def test_its_dead_letter_is_another_record_and_so_is_a_smaller_one() -> None:
    refusals = Refusals()
    refusals.note([producer_record(7)], "result_too_large")
    refusals.note([producer_record(7, "dead", b"{}", 9)], "result_too_large")
    assert refusals.reason(producer_record(7, "dead", b"{}", 9)) == "result_too_large"
    assert refusals.reason(producer_record(7, "dead", b"", 10)) is None
    assert refusals.reason(producer_record(7, "dead", b"", 9)) is None


def test_of_several_that_were_refused_together_each_goes_alone() -> None:
    refusals = Refusals()
    producer_records = [producer_record(offset) for offset in range(6)]
    assert refusals.apart(producer_records, [0, 1, 2, 3, 4, 5]) == [[0, 1, 2, 3, 4, 5]]
    refusals.note(producer_records[2:4], "result_too_large")
    assert [refusals.reason(one) for one in producer_records] == [None] * 6
    assert refusals.apart(producer_records, [0, 1, 2, 3, 4, 5]) == [[0, 1], [2], [3], [4, 5]]
    assert refusals.apart(producer_records, [3, 4]) == [[3], [4]]


def test_what_is_committed_is_forgotten() -> None:
    refusals = Refusals()
    refusals.note([producer_record(1)], "result_too_large")
    refusals.note([producer_record(8)], "invalid_timestamp")
    refusals.note([producer_record(2), producer_record(9)], "result_too_large")
    refusals.forget_before(5)
    assert refusals.reason(producer_record(1)) is None
    assert refusals.reason(producer_record(8)) == "invalid_timestamp"
    assert refusals.apart([producer_record(2), producer_record(3), producer_record(9)], [0, 1, 2]) == [[0, 1], [2]]


# Transactions.


@dataclass
class FakeSink:
    """Commits, unless it is told what happens instead."""

    transactional_id: str
    published: list[int] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    metadata: set[str] = field(default_factory=set)
    is_closed: bool = False

    async def open(self) -> None:
        if errors := self.world.open_errors:
            raise errors.pop(0)

    async def publish(self, producer_records: Sequence[int]) -> list[Reason | None]:
        await asyncio.sleep(0)
        if errors := self.world.publish_errors:
            raise errors.pop(0)
        self.published.extend(producer_records)
        return [None] * len(producer_records)

    async def commit(self, offset: OffsetAndMetadata, tp: TopicPartition, group_id: str) -> None:
        await self.world.commit_may_end.wait()
        if errors := self.world.commit_errors:
            raise errors.pop(0)
        self.committed.append(offset.offset)
        self.metadata.add(offset.metadata)

    async def close(self, timeout_s: float) -> None:
        self.is_closed = True

    world: "World" = None  # type: ignore[assignment]


@dataclass(frozen=True)
class FakeRecord:
    offset: int
    value: bytes = b"x"


@dataclass(frozen=True)
class FakeOutcome:
    record: FakeRecord


class World:
    """Transactions with fake producers, and the source and pipeline around them."""

    def __init__(self) -> None:
        self.health = Health()
        self.metrics = Metrics("test")
        self.transactions = ExactlyOnce(
            Connection(("nowhere:1",)),
            group_id="g",
            limits={},
            turn_budget=TurnBudget(),
            metrics=self.metrics,
            health=self.health,
            interval_s=30,
        )
        self.transactions.serve(self, self.deliver, self.count)  # type: ignore[arg-type]
        self.sinks: list[FakeSink] = []
        self.open_errors: list[Exception] = []
        self.publish_errors: list[Exception] = []
        self.commit_errors: list[Exception] = []
        self.commit_may_end = asyncio.Event()
        self.commit_may_end.set()
        self.counted: list[int] = []
        self.dropped = 0
        self.restarted: list[Assignment] = []

    def sink(self, _: Connection, *, transactional_id: str, **__: Any) -> FakeSink:
        self.sinks.append(FakeSink(transactional_id, world=self))
        return self.sinks[-1]

    async def deliver(self, outcomes: Sequence[FakeOutcome], sink: FakeSink) -> None:
        await sink.publish([outcome.record.offset for outcome in outcomes])

    def count(self, outcomes: Sequence[FakeOutcome], _: float) -> None:
        self.counted.extend(outcome.record.offset for outcome in outcomes)

    def advance(self, assignment: Assignment, next_offset: int, records: int) -> None:
        assignment.under_way -= records
        assignment.committed = next_offset
        if records:
            assignment.acknowledged = next_offset

    def drop(self, assignment: Assignment, records: int) -> None:
        assignment.under_way -= records
        self.dropped += records

    def restart(self, assignment: Assignment) -> None:
        assignment.accepts = assignment.is_owned = False
        self.restarted.append(assignment)

    async def confirm_membership(self) -> None: ...

    async def finish(self) -> None:
        self.transactions.finish()
        await asyncio.wait_for(self.transactions.run(), 5)

    async def put(self, assignment: Assignment, *offsets: int) -> None:
        assignment.under_way += len(offsets)
        await self.transactions.put(assignment, [FakeOutcome(FakeRecord(offset)) for offset in offsets])  # type: ignore[misc]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(module, "PartitionSink", world.sink)
    monkeypatch.setattr(Backoff, "wait", lambda _: asyncio.sleep(0))
    return world


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - of what others do step by step
            await asyncio.sleep(0)


async def owned(world: World, delivered: int = 100) -> Assignment:
    assignment = Assignment(TP, delivered=delivered)
    await world.transactions.begin(assignment)
    return assignment


async def test_what_is_committed_is_counted_and_not_before(world: World) -> None:
    assignment = await owned(world, delivered=3)
    assert world.sinks[0].transactional_id == "g/t/0"
    world.commit_may_end.clear()
    await world.put(assignment, 0, 1, 2)
    await until(lambda: world.sinks[0].published == [0, 1, 2])
    assert (world.counted, assignment.committed) == ([], None)
    world.commit_may_end.set()
    await until(lambda: assignment.committed == 3)
    assert (world.counted, world.sinks[0].committed, assignment.under_way) == ([0, 1, 2], [3], 0)


async def test_pages_gather_while_more_follows_and_go_as_one_transaction(world: World) -> None:
    assignment = await owned(world)
    await world.put(assignment, 0, 1)
    await world.put(assignment, 2, 3)
    for _ in range(20):
        await asyncio.sleep(0)
    assert world.sinks[0].published == [], "the interval is half a minute"
    world.transactions.flush([assignment])
    await until(lambda: assignment.committed == 4)
    assert world.sinks[0].committed == [4]


async def test_large_pages_are_counted_one_in_a_turn_of_the_event_loop(world: World) -> None:
    assignment = await owned(world, delivered=10_000)
    for begin in range(0, 3 * RECORDS, RECORDS):
        await world.put(assignment, *range(begin, begin + RECORDS))
    world.transactions.flush([assignment])
    seen = set()
    await until(lambda: seen.add(len(world.counted)) or len(world.counted) == 3 * RECORDS)
    assert seen >= {RECORDS, 2 * RECORDS, 3 * RECORDS}
    assert (assignment.under_way, assignment.committed, world.transactions._weight) == (0, 3 * RECORDS, 0)


async def test_what_is_committed_is_counted_though_the_partition_goes_meanwhile(world: World) -> None:
    assignment = await owned(world, delivered=10_000)
    for begin in range(0, 3 * RECORDS, RECORDS):
        await world.put(assignment, *range(begin, begin + RECORDS))
    world.transactions.flush([assignment])
    await until(lambda: world.counted)
    assert len(world.counted) < 3 * RECORDS, "the rest has its turn later"
    world.transactions.release(assignment)
    assert world.counted == [*range(3 * RECORDS)]
    assert (world.dropped, assignment.under_way, world.transactions._weight) == (0, 0, 0)


async def test_who_cannot_count_ends_the_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(world.transactions, "_count", broken)
    assignment = await owned(world, delivered=1)
    await world.put(assignment, 0)
    with pytest.raises(LookupError):
        await asyncio.wait_for(world.transactions.run(), 5)


async def test_finish_commits_what_is_there(world: World) -> None:
    assignment = await owned(world)
    await world.put(assignment, 0, 1)
    assignment.metadata = "topic_id=x"
    await world.finish()
    assert (world.sinks[0].committed, world.sinks[0].metadata) == ([2], {"topic_id=x"})


async def test_an_offset_alone_is_committed_in_its_turn(world: World) -> None:
    assignment = await owned(world, delivered=9)
    await world.transactions.commit([(assignment, 9, 0)], 5)
    assert (world.sinks[0].committed, world.counted) == ([9], [])


@pytest.mark.parametrize("is_committing", [False, True])
async def test_an_offset_alone_does_not_lead_back_behind_records(world: World, is_committing: bool) -> None:
    """The records that were read after it are on their way already, and their transaction goes beyond it."""
    assignment = await owned(world)
    world.commit_may_end.clear()
    await world.put(assignment, *range(100, 110))
    if is_committing:
        world.transactions.flush([assignment])
        await until(lambda: world.sinks[0].published)
    committing = asyncio.create_task(world.transactions.commit([(assignment, 100, 0)], 5))
    for _ in range(20):
        await asyncio.sleep(0)
    world.commit_may_end.set()
    await world.finish()
    await committing
    assert world.sinks[0].committed == [110]


async def test_an_offset_alone_goes_after_the_records_before_it(world: World) -> None:
    assignment = await owned(world)
    await world.put(assignment, 0, 1)
    world.transactions.flush([assignment])
    await world.transactions.commit([(assignment, 5, 0)], 5)
    assert world.sinks[0].committed[-1] == 5


@pytest.mark.parametrize("where", ["publish_errors", "commit_errors"])
async def test_a_lost_transaction_begins_the_partition_anew(world: World, where: str) -> None:
    assignment = await owned(world, delivered=2)
    getattr(world, where).append(Lost("ProducerFenced"))
    await world.put(assignment, 0, 1)
    await until(lambda: world.restarted)
    assert (world.restarted, world.dropped, world.counted, assignment.under_way) == ([assignment], 2, [], 0)
    await until(lambda: world.sinks[0].is_closed)
    await world.put(assignment, 2)
    assert world.dropped == 3, "what was still on its way under the old assignment is dropped too"

    again = await owned(world, delivered=2)
    world.transactions.resume(again, 0)
    await world.put(again, 0, 1)
    await until(lambda: again.committed == 2)
    assert (world.counted, world.sinks[1].committed) == ([0, 1], [2])
    assert world.metrics.duplicates_possible._value.get() == 0


@pytest.mark.parametrize(("committed", "counted"), [(2, [0, 1]), (None, []), (1, [])])
async def test_a_commit_in_doubt_counts_if_it_has_happened(
    world: World, committed: int | None, counted: list[int]
) -> None:
    assignment = await owned(world, delivered=2)
    world.commit_errors.append(Lost("TimeoutError"))
    await world.put(assignment, 0, 1)
    await until(lambda: world.restarted)
    assert "cannot commit a transaction (TimeoutError)" in (world.health.why_not_ready() or "")
    again = await owned(world)
    world.transactions.resume(again, committed)
    assert world.counted == counted
    assert (world.health.why_not_ready() is None) == bool(counted), "else the next commit tells that all is well"


async def test_a_writer_that_others_cancel_is_a_lost_transaction(world: World) -> None:
    assignment = await owned(world)
    await world.put(assignment, 0, 1)
    world.transactions._writers[assignment].task.cancel()
    await until(lambda: world.restarted)
    assert (world.restarted, world.dropped, assignment.under_way) == ([assignment], 2, 0)
    await until(lambda: world.sinks[0].is_closed)


async def test_the_other_partitions_go_on(world: World) -> None:
    lost, other = await owned(world, delivered=1), Assignment(TopicPartition("t", 1), delivered=1)
    await world.transactions.begin(other)
    world.publish_errors.append(Lost("ProducerFenced"))
    await world.put(lost, 0)
    await world.put(other, 0)
    await until(lambda: other.committed == 1 and world.restarted)
    assert world.restarted == [lost]


async def test_fencing_is_no_trouble_and_a_missing_permission_is(world: World) -> None:
    for cause, trouble in ((ProducerFenced(), None), (GroupAuthorizationFailedError("g"), "commit as group g (ACL)")):
        assignment = await owned(world, delivered=1)
        error = Lost(type(cause).__name__)
        error.__cause__ = cause
        world.commit_errors.append(error)
        await world.put(assignment, 0)
        await until(lambda assignment=assignment: assignment in world.restarted)
        reason = world.health.why_not_ready()
        assert trouble in reason if trouble and reason else reason is trouble, reason


async def test_taking_over_waits_for_a_permission_and_says_so(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.open_errors.extend(TransactionalIdAuthorizationFailed("g/t/0") for _ in range(5))
    taking = asyncio.create_task(owned(world))
    await until(world.health.why_not_ready)
    reason = world.health.why_not_ready() or ""
    assert "transactional ids that begin with g/" in reason
    assert "ACL" in reason
    await taking
    assert world.health.why_not_ready() is None
    assert caplog.text.count("no permission") == 1, "said once"


async def test_released_partitions_are_aborted_and_forgotten(world: World) -> None:
    assignment = await owned(world)
    await world.put(assignment, 0, 1)
    world.transactions.release(assignment)
    await world.transactions.close(5)
    assert world.sinks[0].is_closed
    assert (world.sinks[0].committed, world.dropped, world.counted) == ([], 2, [])


@pytest.mark.parametrize("is_given_up", [False, True])
async def test_a_stall_ends_with_the_partition_that_had_it(world: World, is_given_up: bool) -> None:
    """Others, which may have nothing to publish for long, are no reason to go on saying that publishing is stalled."""
    assignment, other = await owned(world), Assignment(TopicPartition("t", 1))
    await world.transactions.begin(other)
    world.health.failing("publish", "publishing is stalled", TP)
    world.health.failing("publish", "publishing is stalled", other.tp)
    if is_given_up:
        world.transactions.abandon(assignment)
    world.transactions.release(assignment)
    assert world.health.why_not_ready() == "publish: publishing is stalled", "the other one's still is"
    world.transactions.release(other)
    assert world.health.why_not_ready() is None


async def test_a_stall_that_is_told_while_the_partition_goes_is_forgotten_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stalled(*_: object) -> list[Reason | None]:
        try:
            await asyncio.Event().wait()
        finally:
            world.health.failing("publish", "publishing is stalled", TP)
        return []

    monkeypatch.setattr(FakeSink, "publish", stalled)
    assignment = await owned(world, delivered=1)
    await world.put(assignment, 0)
    await asyncio.sleep(0.01)
    world.transactions.release(assignment)
    await world.transactions.close(5)
    assert world.health.why_not_ready() is None


async def test_what_is_gathered_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full room is no reason to wait for the interval: who fills it commits."""
    monkeypatch.setattr(module, "ROOM_BYTES", 10 * module.RECORD_BYTES)
    assignment = await owned(world)
    world.commit_may_end.clear()
    await world.put(assignment, *range(8))
    putting = asyncio.create_task(world.put(assignment, *range(8, 16)))
    await until(lambda: world.sinks[0].published == [*range(8)])
    assert not putting.done()
    world.commit_may_end.set()
    await putting
    assert world.counted == [*range(8)]


async def test_what_nobody_foresaw_ends_the_work(world: World) -> None:
    assignment = await owned(world, delivered=1)
    watching = asyncio.create_task(world.transactions.run())
    world.publish_errors.append(LookupError("a bug"))
    await world.put(assignment, 0)
    with pytest.raises(LookupError):
        await watching
    with pytest.raises(LookupError):
        await world.finish()
    assert world.restarted == []
