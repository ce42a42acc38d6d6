"""When a transaction begins and ends, and what becomes of its outcomes where it fails, is fenced or is in doubt."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    IllegalGenerationError,
    IllegalStateError,
    KafkaConnectionError,
    ProducerFenced,
    TransactionalIdAuthorizationFailed,
)
from aiokafka.structs import OffsetAndMetadata

from worker.core.events import Outgoing
from worker.kafka import exactly_once as module
from worker.kafka.aiokafka_compat.transactions import Membership
from worker.kafka.assignment import Assignment
from worker.kafka.connection import Connection
from worker.kafka.exactly_once import ExactlyOnce
from worker.kafka.producer_records import ProducerRecord
from worker.kafka.sink import Sink
from worker.kafka.transactional_sink import (
    TRANSACTION_TIMEOUT_S,
    TransactionalSink,
    TransactionFailed,
    TransactionFenced,
    TransactionInDoubt,
    TransactionLost,
    new_transactional_id,
)
from worker.runtime.backoff import Backoff
from worker.runtime.loop_budget import RECORDS, TurnBudget
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

TP, OTHER = TopicPartition("t", 0), TopicPartition("t", 1)
MEMBER = Membership("g", 1, "member")
NEXT_GENERATION = replace(MEMBER, generation=2)


def producer_record(offset: int, topic: str = "out", value: bytes | None = b"{}", headers: int = 1) -> ProducerRecord:
    return ProducerRecord(topic, Outgoing(b"key", value, [("h", b"")] * headers, None), 0)


Offsets = Mapping[TopicPartition, tuple[int, str]]


@dataclass
class FakeSink:
    """Publishes and commits, unless it is told what happens instead."""

    published: list[int] = field(default_factory=list)
    commits: list[dict[TopicPartition, int]] = field(default_factory=list)
    metadata: set[str] = field(default_factory=set)
    members: list[Membership] = field(default_factory=list)
    opened: int = 0
    is_closed: bool = False
    open_errors: list[Exception] = field(default_factory=list)
    publish_errors: list[Exception] = field(default_factory=list)
    commit_errors: list[Exception] = field(default_factory=list)
    commit_may_end: asyncio.Event = field(default_factory=asyncio.Event)

    async def refuse_old_brokers(self) -> None: ...

    async def open(self) -> None:
        if self.open_errors:
            raise self.open_errors.pop(0)
        self.opened += 1

    async def publish(self, offsets: Sequence[int]) -> None:
        await asyncio.sleep(0)
        if self.publish_errors:
            raise self.publish_errors.pop(0)
        self.published.extend(offsets)

    async def commit(self, offsets: Offsets, member: Membership) -> None:
        await self.commit_may_end.wait()
        if self.commit_errors:
            raise self.commit_errors.pop(0)
        self.commits.append({tp: offset for tp, (offset, _) in offsets.items()})
        self.metadata.update(metadata for _, metadata in offsets.values())
        self.members.append(member)

    async def close(self, timeout_s: float) -> None:
        self.is_closed = True


@dataclass(frozen=True)
class FakeRecord:
    offset: int
    value: bytes = b"x"


@dataclass(frozen=True)
class FakeOutcome:
    record: FakeRecord


class World:
    """The delivery with a fake sink, and the source and pipeline around it."""

    def __init__(self, interval_s: float = 30) -> None:
        self.health = Health()
        self.metrics = Metrics("test")
        self.sink = FakeSink()
        self.sink.commit_may_end.set()
        self.delivery = ExactlyOnce(
            Connection(("nowhere:1",)),
            self.sink,  # type: ignore[arg-type]
            group_id="g",
            interval_s=interval_s,
            turn_budget=TurnBudget(),
            metrics=self.metrics,
            health=self.health,
        )
        self.delivery.serve(self, self.deliver, self.count)  # type: ignore[arg-type]
        self.delivery._committed_at = asyncio.get_running_loop().time()
        self.counted: list[int] = []
        self.dropped = 0
        self.restarted: list[Assignment] = []
        self.committed: OffsetAndMetadata | Exception = OffsetAndMetadata(-1, "")
        self.without_offset: set[TopicPartition] = set()
        self.running = asyncio.create_task(self.delivery.run())

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
        self.delivery.abandon(assignment)
        assignment.accepts = assignment.is_owned = False
        self.restarted.append(assignment)

    async def committed_offset(self, tp: TopicPartition) -> OffsetAndMetadata:
        if tp in self.without_offset:
            return OffsetAndMetadata(-1, "")
        if isinstance(self.committed, Exception):
            raise self.committed
        return self.committed

    def revoke(self, assignment: Assignment) -> None:
        assignment.accepts = assignment.is_owned = False
        self.delivery.release(assignment)

    async def finish(self) -> None:
        self.delivery.finish()
        await asyncio.wait_for(self.running, 30)

    async def put(self, assignment: Assignment, *offsets: int) -> None:
        assignment.under_way += len(offsets)
        await self.delivery.put(assignment, [FakeOutcome(FakeRecord(offset)) for offset in offsets])  # type: ignore[misc]

    async def end_transaction(self) -> None:
        """As if ``interval_s`` were over, until nothing is held."""

        def is_delivered() -> bool:
            self.delivery._committed_at -= 100
            self.delivery._changed.set()
            return not self.delivery._held_bytes and not (self.delivery._published or self.delivery._waiting)

        await until(is_delivered)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Backoff, "wait", lambda _: asyncio.sleep(0))
    world = World()
    yield world
    world.running.cancel()
    await asyncio.wait({world.running})
    if not world.running.cancelled():
        world.running.exception()


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - of what others do step by step
            await asyncio.sleep(0)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def owned(world: World, tp: TopicPartition = TP, member: Membership = MEMBER) -> Assignment:
    assignment = Assignment(tp, member, metadata="topic_id=x")
    await world.delivery.begin(assignment)
    return assignment


def caused(lost: TransactionLost, cause: Exception) -> TransactionLost:
    lost.__cause__ = cause
    return lost


def fenced_by_the_group() -> TransactionLost:
    return caused(TransactionFenced("the group"), IllegalGenerationError())


def fenced_by_another() -> TransactionLost:
    return caused(TransactionFenced("another process"), ProducerFenced())


def failed() -> TransactionLost:
    return caused(TransactionFailed("TimeoutError"), TimeoutError())


def in_doubt() -> TransactionLost:
    return caused(TransactionInDoubt("TimeoutError"), TimeoutError())


def test_a_restarted_static_member_has_the_same_transactional_id_and_others_never() -> None:
    assert new_transactional_id("g", "member-1") == new_transactional_id("g", "member-1") == "g/member-1"
    assert new_transactional_id("g", None) != new_transactional_id("g", None)
    assert new_transactional_id("g", None).startswith("g/")


# Transactions that succeed.


async def test_what_is_committed_is_counted_and_not_before(world: World) -> None:
    assignment = await owned(world)
    world.sink.commit_may_end.clear()
    await world.put(assignment, 0, 1, 2)
    world.delivery.flush([assignment])
    await until(lambda: world.sink.published == [0, 1, 2])
    await settled()
    assert (world.counted, assignment.committed) == ([], None)
    world.sink.commit_may_end.set()
    await until(lambda: assignment.committed == 3)
    assert (world.counted, world.sink.commits, assignment.under_way) == ([0, 1, 2], [{TP: 3}], 0)
    assert (world.sink.metadata, world.sink.members) == ({"topic_id=x"}, [MEMBER])


async def test_the_first_transaction_after_a_pause_ends_at_once_and_the_next_after_the_interval(world: World) -> None:
    assignment = await owned(world)
    world.delivery._committed_at -= 100
    await world.put(assignment, 0)
    await until(lambda: assignment.committed == 1)
    await world.put(assignment, 1)
    await until(lambda: world.sink.published == [0, 1])
    await settled()
    assert assignment.committed == 1, "the interval is half a minute"


async def test_all_partitions_share_one_transaction(world: World) -> None:
    some, other = await owned(world), await owned(world, OTHER)
    await world.put(some, 0, 1)
    await world.put(other, 5)
    await world.put(some, 2)
    await until(lambda: world.sink.published == [0, 1, 5, 2])
    assert world.sink.commits == []
    await world.end_transaction()
    assert world.sink.commits == [{TP: 3, OTHER: 6}]


async def test_a_transaction_ends_although_more_comes_with_each_round(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brokers that are slow would never see its end."""
    assignment = await owned(world)
    world.delivery._committed_at -= 100
    publish = FakeSink.publish

    async def slow(sink: FakeSink, offsets: Sequence[int]) -> None:
        await publish(sink, offsets)
        if not sink.commits:
            await world.put(assignment, offsets[-1] + 1)

    monkeypatch.setattr(FakeSink, "publish", slow)
    await world.put(assignment, 0)
    await until(lambda: world.sink.commits)
    assert world.sink.commits == [{TP: 1}]


async def test_a_revocation_ends_the_transaction_at_once_and_so_all_that_follow(world: World) -> None:
    assignment = await owned(world)
    await world.put(assignment, 0)
    world.delivery.flush([assignment])
    await until(lambda: assignment.committed == 1)
    await world.put(assignment, 1)
    await until(lambda: assignment.committed == 2)


async def test_a_rebalance_without_a_transaction_leaves_nothing_behind(world: World) -> None:
    gone = await owned(world)
    world.delivery.flush([gone])
    world.revoke(gone)
    await world.put(await owned(world), 1)
    await until(lambda: world.sink.published)
    await settled()
    assert world.sink.commits == []
    assert not world.delivery._urgent


async def test_large_puts_are_counted_one_in_a_turn_of_the_event_loop(world: World) -> None:
    assignment = await owned(world)
    for begin in range(0, 3 * RECORDS, RECORDS):
        await world.put(assignment, *range(begin, begin + RECORDS))
    world.delivery.flush([assignment])
    seen = set()
    await until(lambda: seen.add(len(world.counted)) or len(world.counted) == 3 * RECORDS)
    assert seen >= {RECORDS, 2 * RECORDS, 3 * RECORDS}
    assert (assignment.under_way, assignment.committed, world.delivery._held_bytes) == (0, 3 * RECORDS, 0)


async def test_what_is_committed_is_counted_though_the_partition_goes_meanwhile(world: World) -> None:
    assignment = await owned(world)
    for begin in range(0, 3 * RECORDS, RECORDS):
        await world.put(assignment, *range(begin, begin + RECORDS))
    world.delivery.flush([assignment])
    await until(lambda: world.counted)
    assert len(world.counted) < 3 * RECORDS, "the rest has its turn later"
    world.revoke(assignment)
    await until(lambda: world.counted == [*range(3 * RECORDS)])
    assert (world.dropped, assignment.under_way, world.delivery._held_bytes) == (0, 0, 0)


async def test_who_cannot_count_ends_the_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(world.delivery, "_count", broken)
    assignment = await owned(world)
    await world.put(assignment, 0)
    world.delivery.flush([assignment])
    with pytest.raises(LookupError):
        await asyncio.wait_for(world.running, 30)


async def test_finish_commits_what_is_there(world: World) -> None:
    await world.put(await owned(world), 0, 1)
    await world.finish()
    assert world.sink.commits == [{TP: 2}]


async def test_what_is_held_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing more fits, the transaction does not wait for its interval."""
    monkeypatch.setattr(module, "MAX_HELD_BYTES", 10 * module.RECORD_BYTES)
    assignment = await owned(world)
    world.sink.commit_may_end.clear()
    await world.put(assignment, *range(8))
    putting = asyncio.create_task(world.put(assignment, *range(8, 16)))
    await until(lambda: world.sink.published == [*range(8)])
    await settled()
    assert not putting.done()
    world.sink.commit_may_end.set()
    await putting
    assert world.counted == [*range(8)]


# Offsets that no record belongs to.


async def test_an_offset_alone_is_committed_in_its_turn(world: World) -> None:
    assignment = await owned(world)
    world.delivery._committed_at -= 100
    assert await world.delivery.commit([(assignment, 9, 0)], 5)
    assert (world.sink.commits, world.counted) == ([{TP: 9}], [])


@pytest.mark.parametrize("is_committing", [False, True])
async def test_an_offset_alone_does_not_lead_back_behind_records(world: World, is_committing: bool) -> None:
    """The records that were read after it are on their way already, and their transaction goes beyond it."""
    assignment = await owned(world)
    world.sink.commit_may_end.clear()
    await world.put(assignment, *range(100, 110))
    if is_committing:
        world.delivery.flush([assignment])
    await until(lambda: world.sink.published)
    committing = asyncio.create_task(world.delivery.commit([(assignment, 100, 0)], 5))
    await settled()
    world.sink.commit_may_end.set()
    await world.finish()
    await committing
    assert world.sink.commits == [{TP: 110}]


async def test_an_offset_alone_does_not_lead_back_behind_records_that_are_being_counted(world: World) -> None:
    """Counting a large transaction takes turns of the event loop, and in one of them the start of a partition is due."""
    first, second = await owned(world), await owned(world, OTHER)
    await world.put(first, *range(RECORDS))
    await world.put(second, *range(100, 110))
    world.delivery.flush([first])
    await until(lambda: world.counted)
    assert len(world.counted) == RECORDS  # those of the second partition are committed, and not counted yet
    assert await world.delivery.commit([(second, 100, 0)], 0.01)
    await world.end_transaction()
    assert world.sink.commits == [{TP: RECORDS, OTHER: 110}]
    assert second.committed == 110


async def test_an_offset_alone_goes_after_the_records_before_it(world: World) -> None:
    assignment = await owned(world)
    await world.put(assignment, 0, 1)
    world.delivery.flush([assignment])
    await world.delivery.commit([(assignment, 5, 0)], 5)
    assert world.sink.commits[-1] == {TP: 5}


async def test_an_offset_alone_that_takes_too_long_is_tried_again_and_not_put_twice(world: World) -> None:
    assignment = await owned(world)
    assert not await world.delivery.commit([(assignment, 5, 0)], 0.01)
    assert not await world.delivery.commit([(assignment, 5, 0)], 0.01) or len(world.delivery._published) == 1
    await world.end_transaction()
    assert world.sink.commits == [{TP: 5}]


async def test_after_the_end_offsets_alone_are_waited_for_no_longer(world: World) -> None:
    """A drain would last until its deadline."""
    assignment = await owned(world)
    await world.finish()
    assert await asyncio.wait_for(world.delivery.commit([(assignment, 5, 0)], 60), 30)
    assert world.sink.commits == []


# Transactions that fail.


@pytest.mark.parametrize("where", ["publish_errors", "commit_errors"])
async def test_what_has_failed_is_sent_again_from_memory_with_what_has_come_since(world: World, where: str) -> None:
    some, other = await owned(world), await owned(world, OTHER)
    getattr(world.sink, where).append(failed())
    await world.put(some, 0, 1)
    await world.put(other, 7)
    await world.end_transaction()
    assert (world.sink.commits, sorted(world.counted)) == ([{TP: 2, OTHER: 8}], [0, 1, 7])
    assert (world.sink.opened, world.dropped, world.restarted) == (1, 0, [])
    assert world.metrics.duplicates_possible._value.get() == 0


async def test_partitions_of_which_no_offset_can_be_committed_begin_again_and_hold_up_no_others(world: World) -> None:
    gone, stays = await owned(world), await owned(world, OTHER)
    world.sink.commit_errors = [TransactionFailed("the brokers do not know t-0", {TP})]
    world.sink.commit_may_end.clear()
    await world.put(gone, 0)
    await world.put(stays, 5)
    world.delivery.flush([stays])
    await until(lambda: len(world.sink.published) == 2)
    await world.put(gone, 1)
    world.sink.commit_may_end.set()
    await world.end_transaction()
    assert (world.restarted, world.dropped, world.sink.commits) == ([gone], 2, [{OTHER: 6}])
    assert world.counted == [5]


async def test_order_is_kept_where_it_is_sent_again(world: World) -> None:
    assignment = await owned(world)
    world.sink.commit_errors.append(failed())
    for offset in range(3):
        await world.put(assignment, offset)
    world.delivery.flush([assignment])
    await until(lambda: assignment.committed == 3)
    assert world.sink.published[-3:] == world.counted == [0, 1, 2]


async def test_trouble_is_told_until_a_transaction_is_committed(world: World) -> None:
    assignment = await owned(world)
    world.sink.publish_errors.append(caused(TransactionFailed("why"), GroupAuthorizationFailedError("g")))
    world.sink.open_errors.append(KafkaConnectionError())
    await world.put(assignment, 0)
    await until(world.health.why_not_ready)
    assert world.health.why_not_ready() == "transactions: cannot commit a transaction: why"
    await world.end_transaction()
    assert world.health.why_not_ready() is None


@pytest.mark.parametrize(
    ("offset", "metadata", "is_committed"),
    [(2, "topic_id=x", True), (1, "topic_id=x", False), (2, "topic_id=y", False)],
)
async def test_a_commit_in_doubt_is_decided_by_the_committed_offset(
    world: World, offset: int, metadata: str, is_committed: bool
) -> None:
    """Which has to be one of the same topic, not of one that had its name before."""
    some, other = await owned(world), await owned(world, OTHER)
    world.sink.commit_errors.append(in_doubt())
    world.committed = OffsetAndMetadata(offset, metadata)
    await world.put(some, 0, 1)
    await world.put(other, 1)
    await world.end_transaction()
    await until(lambda: len(world.counted) == 3)
    assert (world.sink.commits, world.sink.opened) == ([] if is_committed else [{TP: 2, OTHER: 2}], 1)
    assert world.health.why_not_ready() is None


async def test_a_commit_in_doubt_is_known_although_a_topic_was_deleted_since(world: World) -> None:
    """With the topic its committed offset goes, as if the transaction were not committed."""
    deleted, stays = await owned(world), await owned(world, OTHER)
    world.sink.commit_errors = [in_doubt()]
    world.committed, world.without_offset = OffsetAndMetadata(6, "topic_id=x"), {TP}
    await world.put(deleted, 0)
    await world.put(stays, 5)
    await world.end_transaction()
    assert (world.counted, world.sink.published, world.sink.commits) == ([0, 5], [0, 5], [])


async def test_a_commit_in_doubt_of_partitions_that_have_gone_is_their_next_owners(world: World) -> None:
    assignment = await owned(world)
    world.sink.commit_errors.append(in_doubt())
    world.committed = KafkaConnectionError()
    await world.put(assignment, 0, 1)
    world.delivery.flush([assignment])
    await until(lambda: world.sink.opened)
    world.revoke(assignment)
    await until(lambda: world.dropped == 2)
    assert (world.counted, assignment.under_way) == ([], 0)


@pytest.mark.parametrize("where", ["publish_errors", "commit_errors"])
@pytest.mark.parametrize("fence", [fenced_by_the_group, fenced_by_another])
async def test_a_fence_drops_the_work(world: World, where: str, fence: Any) -> None:
    """All that is held, for another process may be at work on it; the partitions begin again."""
    some, other = await owned(world), await owned(world, OTHER)
    getattr(world.sink, where).append(fence())
    await world.put(some, 0, 1)
    world.delivery.flush([some])
    await world.put(other, 0)
    await until(lambda: len(world.restarted) == 2)
    assert (world.dropped, world.counted, world.sink.commits) == (3, [], [])
    await world.put(some, 2)
    assert world.dropped == 4, "what was still on its way under the old assignment is dropped too"


@pytest.mark.parametrize(("fence", "is_lost"), [(fenced_by_the_group, True), (fenced_by_another, False)])
async def test_a_drain_owes_nothing_of_what_the_group_has_refused(world: World, fence: Any, is_lost: bool) -> None:
    """Others have those partitions. Who fences the transactional id alone takes no partition."""
    some, other = await owned(world), await owned(world, OTHER)
    world.sink.commit_errors.append(fence())
    await world.put(some, 0)
    await world.put(other, 0)
    world.delivery.flush([some])
    await until(lambda: len(world.restarted) == 2)
    assert (some.is_lost, other.is_lost) == (is_lost, is_lost)


async def test_what_another_process_has_fenced_is_taken_back(world: World) -> None:
    world.sink.publish_errors.append(fenced_by_another())
    await world.put(await owned(world), 0, 1)
    await until(lambda: world.restarted)
    again = await owned(world)
    await world.put(again, 0, 1)
    await world.end_transaction()
    assert (world.counted, world.sink.commits) == ([0, 1], [{TP: 2}])
    assert world.health.why_not_ready() is None, "a fence is no trouble of this process"


async def test_what_the_group_has_refused_waits_for_the_next_assignment(world: World) -> None:
    world.sink.commit_errors.append(fenced_by_the_group())
    assignment = await owned(world)
    await world.put(assignment, 0, 1)
    world.delivery.flush([assignment])
    await until(lambda: world.restarted)
    waiting = asyncio.create_task(owned(world))
    await settled()
    assert not waiting.done(), "nothing can be committed under this membership any more"
    waiting.cancel()
    await world.put(await owned(world, member=NEXT_GENERATION), 0, 1)
    await world.end_transaction()
    assert world.sink.members == [NEXT_GENERATION]


# Partitions that go.


async def test_a_partition_without_a_membership_does_not_begin(world: World) -> None:
    with pytest.raises(IllegalStateError):
        await world.delivery.begin(Assignment(TP))


async def test_an_open_transaction_ends_with_the_assignment_and_spans_no_two_generations(world: World) -> None:
    assignment = await owned(world)
    await world.put(assignment, 0, 1)
    await until(lambda: world.sink.published == [0, 1])
    world.revoke(assignment)
    beginning = asyncio.create_task(owned(world, member=NEXT_GENERATION))
    again = await asyncio.wait_for(beginning, 30)
    assert (world.sink.opened, world.dropped, world.counted) == (1, 2, [])
    await world.put(again, 0, 1)
    await world.end_transaction()
    assert (world.sink.commits, world.sink.members) == ([{TP: 2}], [NEXT_GENERATION])
    assert world.health.why_not_ready() is None


async def test_what_others_have_in_a_transaction_that_ends_so_is_sent_again(world: World) -> None:
    gone, stays = await owned(world), await owned(world, OTHER)
    await world.put(gone, 0)
    await world.put(stays, 5)
    await until(lambda: len(world.sink.published) == 2)
    world.revoke(gone)
    await until(lambda: world.dropped == 1)
    await world.end_transaction()
    assert world.sink.commits == [{OTHER: 6}]


async def test_a_partition_begins_again_only_when_its_commit_has_ended(world: World) -> None:
    """Its committed offset, read before, would be that of before the commit."""
    assignment = await owned(world)
    world.sink.commit_may_end.clear()
    await world.put(assignment, 0)
    world.delivery.flush([assignment])
    await until(lambda: world.sink.published)
    await settled()
    world.restart(assignment)
    beginning = asyncio.create_task(owned(world))
    await settled()
    assert not beginning.done()
    world.sink.commit_may_end.set()
    await asyncio.wait_for(beginning, 30)
    assert world.sink.commits == [{TP: 1}]


async def test_opening_waits_for_a_permission_and_says_so(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.sink.open_errors.extend(TransactionalIdAuthorizationFailed("g/x") for _ in range(5))
    starting = asyncio.create_task(world.delivery.start())
    await until(world.health.why_not_ready)
    reason = world.health.why_not_ready() or ""
    assert "transactional ids with the prefix g/" in reason
    assert "ACL" in reason
    await starting
    assert world.health.why_not_ready() is None
    assert caplog.text.count("add the ACL") == 1, "said once"


async def test_a_stall_ends_with_the_partitions(world: World) -> None:
    assignment = await owned(world)
    world.health.failing("publish", "publishing is stalled")
    world.revoke(assignment)
    assert world.health.why_not_ready() is None


async def test_closing_ends_the_work_and_closes_the_sink(world: World) -> None:
    await world.put(await owned(world), 0)
    await until(lambda: world.sink.published)
    await world.delivery.close(5)
    assert (world.sink.is_closed, world.running.done(), world.sink.commits) == (True, True, [])


async def test_what_nobody_foresaw_ends_the_work(world: World) -> None:
    world.sink.publish_errors.append(LookupError("a bug"))
    await world.put(await owned(world), 0)
    with pytest.raises(LookupError):
        await asyncio.wait_for(world.running, 30)
    assert world.restarted == []


@pytest.mark.parametrize("age_s", [8.0, 11.0], ids=["stalled", "frozen"])
async def test_a_process_that_was_frozen_for_too_long_blames_no_broker(
    monkeypatch: pytest.MonkeyPatch, age_s: float
) -> None:
    """Brokers have aborted its transaction for its age, and had no chance to acknowledge what was on its way."""
    health = Health()
    sink = TransactionalSink(
        Connection(("nowhere:1",)), limits={}, metrics=Metrics("test"), health=health, transactional_id="g/1"
    )

    async def unacknowledged(*_: object) -> None:
        sink._unacknowledged.add(TP)
        await asyncio.Event().wait()

    monkeypatch.setattr(Sink, "publish", unacknowledged)
    sink._producer = object()  # type: ignore[assignment]
    sink._began_at = time.monotonic() - age_s
    with pytest.raises(TransactionFailed) as lost:
        await asyncio.wait_for(sink.publish([producer_record(0)]), 30)
    overdue = age_s >= TRANSACTION_TIMEOUT_S
    assert str(lost.value).startswith("it was open for more than 10 s" if overdue else "publishing is stalled")
    assert health.is_working("publish") is overdue


async def test_who_is_fenced_while_it_commits_is_told_by_whom() -> None:
    """The commit is in doubt all the same: it may be complete, and only its answer lost."""
    sink = TransactionalSink(
        Connection(("nowhere:1",)), limits={}, metrics=Metrics("test"), health=Health(), transactional_id="g/1"
    )

    class Fenced:
        async def add_offsets(self, *_: object) -> None:
            pass

        async def commit_transaction(self) -> None:
            raise ProducerFenced

    sink._producer = Fenced()  # type: ignore[assignment]
    sink._began_at = time.monotonic()
    with pytest.raises(TransactionInDoubt, match="another process uses the transactional id g/1"):
        await sink.commit({TP: (1, "")}, Membership("g", 1, "m"))


async def test_the_look_at_the_limits_is_part_of_a_transactions_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that does not answer would keep it open until the brokers abort it, and the work would be done twice."""
    monkeypatch.setattr("worker.kafka.transactional_sink.DEADLINE_S", 0.05)
    sink = TransactionalSink(
        Connection(("nowhere:1",)), limits={}, metrics=Metrics("test"), health=Health(), transactional_id="g/1"
    )

    async def silent(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(sink._limits, "refused_by_fresh_limits", silent)
    for began_at in (None, time.monotonic()):
        sink._began_at = began_at
        with pytest.raises(TransactionFailed):
            await asyncio.wait_for(sink.known_refusals([producer_record(0)]), 30)
