"""What the source does at the edges of a rebalance, with a consumer that answers exactly when the test says."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import CommitFailedError, CorruptRecordException, RequestTimedOutError

from worker import source as module
from worker.breath import Breath
from worker.cluster import Connection
from worker.consumer import Consumer
from worker.health import Health
from worker.metrics import Metrics
from worker.settings import WrongSetting
from worker.source import Source, UnreadableRecord

TP = TopicPartition("t", 0)
FETCHED = 5_000  # records of a partition that one fetch brings


@dataclass
class FakeConsumer:
    """Partitions of records without end. As in aiokafka, all readers of a partition share its position."""

    records_per_read: int = 10
    last_offset: int = 10**6
    committed_at: int | None = 0
    commit_error: Exception | None = None
    timestamp: int | None = 0
    swallows_cancel: bool = False  # once, as asyncio.wait_for can
    positions: dict[TopicPartition, int] = field(default_factory=dict)
    commits: list[dict[TopicPartition, int]] = field(default_factory=list)
    reading: asyncio.Event = field(default_factory=asyncio.Event)
    knows_committed: asyncio.Event = field(default_factory=asyncio.Event)
    commit_may_end: asyncio.Event = field(default_factory=asyncio.Event)
    stop_error: BaseException | None = None
    _coordinator: Any = None
    _client: Any = field(default_factory=lambda: SimpleNamespace(_conns={}))

    def __post_init__(self) -> None:
        for event in (self.reading, self.knows_committed, self.commit_may_end):
            event.set()

    def subscribe(self, topics: Any, listener: Any) -> None:
        self.listener = listener

    def seek(self, tp: TopicPartition, offset: int) -> None:
        self.positions[tp] = offset

    async def committed(self, _: TopicPartition) -> int | None:
        await self.knows_committed.wait()
        return self.committed_at

    async def beginning_offsets(self, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(tps, 500)

    async def end_offsets(self, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(tps, self.last_offset)

    async def position(self, tp: TopicPartition) -> int:
        return self.positions[tp]

    async def getmany(self, tp: TopicPartition, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Any]]:
        try:
            await self.reading.wait()
        except asyncio.CancelledError:
            if not self.swallows_cancel:
                raise
            self.swallows_cancel = False
        await asyncio.sleep(0)
        begin = self.positions.get(tp, 0)
        count = min(self.records_per_read, max_records, self.last_offset - begin)
        if count <= 0:
            await asyncio.sleep(0.01)
            return {}
        self.positions[tp] = begin + count
        places = range(begin, begin + count)
        return {tp: [SimpleNamespace(offset=offset, timestamp=self.timestamp) for offset in places]}

    async def commit(self, offsets: dict[TopicPartition, int]) -> None:
        await self.commit_may_end.wait()
        if self.commit_error:
            raise self.commit_error
        self.commits.append(offsets)

    async def stop(self) -> None:
        if self.stop_error:
            raise self.stop_error


@dataclass
class Stage:
    source: Source
    consumer: FakeConsumer
    metrics: Metrics
    health: Health
    run: asyncio.Task[None]

    async def assign(self, *tps: TopicPartition) -> None:
        await self.consumer.listener.on_partitions_assigned(set(tps))

    async def revoke(self, *tps: TopicPartition) -> None:
        await self.consumer.listener.on_partitions_revoked(set(tps))

    async def take(self) -> list[Any]:
        chunks = await asyncio.wait_for(self.source.next_batch(), 5)
        assert chunks
        return chunks

    def acknowledge(self, chunks: list[Any]) -> None:
        for assignment, records in chunks:
            self.source.acknowledge(assignment, records[-1].offset + 1, len(records))


async def staged(consumer: FakeConsumer, **settings: Any) -> Stage:
    metrics, health = Metrics("test"), Health()
    connection, breath = Connection(("x:1",)), Breath()
    source = Source(connection, topics=["t"], group_id="g", breath=breath, metrics=metrics, health=health, **settings)

    async def started() -> FakeConsumer:
        return consumer

    source._started_consumer = started  # type: ignore[method-assign, assignment]
    run = asyncio.create_task(source.run())
    await asyncio.sleep(0.01)
    return Stage(source, consumer, metrics, health, run)


@pytest.fixture
async def consumer() -> AsyncIterator[FakeConsumer]:
    yield FakeConsumer()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


async def until(condition: Any, seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("turns", range(5))
async def test_a_reader_does_not_outlive_its_revocation(consumer: FakeConsumer, turns: int) -> None:
    """Its next read would take the next assignment's records. The committed offset arrives just before the revocation."""
    consumer.committed_at, consumer.last_offset = 100, 120
    consumer.knows_committed.clear()
    consumer.reading.clear()
    stage = await staged(consumer)
    await stage.assign(TP)
    reader = stage.source._readers[stage.source._assignments[TP]]
    await asyncio.sleep(0.01)
    consumer.knows_committed.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    await stage.revoke(TP)
    assert reader.done()
    await stage.assign(TP)
    consumer.reading.set()
    await until(lambda: len(stage.source._batcher) == 20)
    offsets = [record.offset for _, records in await stage.take() for record in records]
    assert offsets == list(range(100, 120))


async def test_a_fault_during_a_revocation_keeps_its_name(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    chunks = await stage.take()
    revoking = asyncio.create_task(stage.revoke(TP))
    await asyncio.sleep(0.01)
    stage.source._fail(WrongSetting("no"))
    await asyncio.sleep(0.01)
    stage.acknowledge(chunks)
    await asyncio.wait({revoking, stage.run}, timeout=5)
    with pytest.raises(WrongSetting, match="no"):
        stage.run.result()
    assert consumer.commits == [{TP: chunks[0][1][-1].offset + 1}]


async def test_an_error_in_a_rebalance_ends_the_session(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka would log it, and go on without the revocation."""
    stage = await staged(consumer)
    await stage.assign(TP)

    def fail(*_: object) -> None:
        raise LookupError("broken")

    monkeypatch.setattr(stage.metrics, "forget_partition", fail)
    await stage.revoke(TP)
    await asyncio.wait({stage.run}, timeout=5)
    assert isinstance(stage.run.exception(), LookupError)


async def test_commits_that_fail_do_not_keep_a_session_from_ending(consumer: FakeConsumer) -> None:
    consumer.commit_error = CommitFailedError("rebalancing")
    stage = await staged(consumer)
    await stage.assign(TP)
    for _ in range(20):
        stage.acknowledge(await stage.take())
        await asyncio.sleep(0)
    stage.source._fail(WrongSetting("twin"))
    await asyncio.wait({stage.run}, timeout=5)
    assert isinstance(stage.run.exception(), WrongSetting)


async def test_what_cannot_be_committed_at_the_end_is_told(consumer: FakeConsumer) -> None:
    consumer.commit_may_end.clear()
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    assert await stage.source.close(0.2) > 0


async def test_everything_committed_at_the_end_leaves_nothing(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    assert await stage.source.close(1) == 0


async def test_a_stop_that_is_cancelled_inside_of_the_client_is_a_stop(consumer: FakeConsumer) -> None:
    consumer.stop_error = asyncio.CancelledError()
    stage = await staged(consumer)
    await stage.assign(TP)
    await stage.source.close(1)
    await asyncio.wait({stage.run}, timeout=5)
    assert stage.run.exception() is None


class EndlessReader:
    """As the real one, it asks for the limit once the records are there, and waits for a fetch alone."""

    def __init__(self, _: object) -> None:
        self.taken: Counter[int] = Counter()
        self.fetched: Counter[int] = Counter()

    async def read(self, tp: TopicPartition, *, timeout_ms: int, limit: Callable[[], int]) -> list[Any]:
        if not self.fetched[tp.partition]:
            await asyncio.sleep(0)
            self.fetched[tp.partition] = FETCHED
        count = min(self.fetched[tp.partition], limit())
        self.fetched[tp.partition] -= count
        self.taken[tp.partition] += count
        return [SimpleNamespace(offset=offset, timestamp=0) for offset in range(count)]


async def test_many_partitions_read_no_further_ahead_than_few(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Reader", EndlessReader)
    stage = await staged(consumer, max_batch_texts=512)
    await stage.assign(*(TopicPartition("t", number) for number in range(40)))
    await asyncio.sleep(0.2)
    assert 512 <= len(stage.source._batcher) < 2_048  # not 40,000


async def test_what_is_held_is_what_waits_and_what_is_under_way(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    assert stage.source.records_held() == 0
    await stage.assign(TP)
    chunks = await stage.take()
    consumer.reading.clear()
    held, under_way = stage.source.records_held(), sum(len(records) for _, records in chunks)
    assert held == under_way + len(stage.source._batcher)
    stage.acknowledge(chunks)
    assert stage.source.records_held() == held - under_way
    await stage.revoke(TP)
    assert stage.source.records_held() == 0


async def test_partitions_take_turns(consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Reader", EndlessReader)
    stage = await staged(consumer, max_batch_texts=512)
    await stage.assign(*(TopicPartition("t", number) for number in range(16)))
    taken = stage.source._reader.taken  # type: ignore[union-attr]
    while taken.total() < 2 * FETCHED:
        await asyncio.wait_for(stage.source.next_batch(), 5)
    shares = [taken[number] for number in range(16)]
    assert max(shares) <= min(shares) + 512  # one turn more at most, and what was read at the start


async def test_lag_in_seconds_is_that_of_the_oldest_record_that_is_not_committed(consumer: FakeConsumer) -> None:
    consumer.timestamp = int((time.time() - 10_000) * 1000)
    consumer.last_offset = 10
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    consumer.timestamp = int(time.time() * 1000)
    consumer.last_offset = 12
    await until(lambda: len(stage.source._batcher) == 2)
    await stage.source._measure(stage.source._assignments[TP], 12)
    assert stage.metrics.lag_records.labels("t", 0)._value.get() == 2
    assert stage.metrics.lag_seconds.labels("t", 0)._value.get() < 60


async def test_a_gap_waits_until_what_was_read_before_it_is_done(consumer: FakeConsumer) -> None:
    consumer.last_offset = 10
    stage = await staged(consumer)
    await stage.assign(TP)
    chunks = await stage.take()
    assignment = stage.source._assignments[TP]
    assignment.is_out_of_range = True
    await asyncio.sleep(0.05)
    assert assignment.acknowledged == 0
    assert consumer.positions[TP] == 10
    stage.acknowledge(chunks)
    consumer.last_offset = 510
    await until(lambda: not assignment.is_out_of_range)
    await until(lambda: {TP: 500} in consumer.commits)
    assert (await stage.take())[0][1][0].offset == 500


async def test_troubles_with_partitions_end_with_the_last_one(consumer: FakeConsumer) -> None:
    consumer.commit_error = RequestTimedOutError()
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    await until(lambda: "commit" in (stage.health.why_not_ready() or ""))
    await stage.revoke(TP)
    await stage.assign()
    assert stage.health.why_not_ready() is None


async def test_nothing_gathered_is_left_after_a_revocation(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    await until(lambda: stage.metrics.queue_depth["gather"]._value.get() > 0)
    await stage.revoke(TP)
    assert stage.metrics.queue_depth["gather"]._value.get() == 0


@pytest.mark.parametrize("is_late", [False, True])
async def test_what_a_rebalance_during_the_drain_leaves_uncommitted_is_told(
    consumer: FakeConsumer, is_late: bool
) -> None:
    """Whether it was published before the partition went, or after: the next owner publishes it again."""
    consumer.commit_error = CommitFailedError("thrown out of the group")
    stage = await staged(consumer)
    await stage.assign(TP)
    chunks = await stage.take()
    stage.source.stop_taking()
    if is_late:
        stage.source._revoke_timeout_s = 0
        await stage.revoke(TP)
        stage.acknowledge(chunks)
    else:
        stage.acknowledge(chunks)
        await stage.revoke(TP)
    records = sum(len(records) for _, records in chunks)
    assert stage.metrics.duplicates_possible._value.get() == records
    assert await stage.source.close(1) == records


async def test_what_was_left_uncommitted_before_the_drain_is_no_failure_of_it(consumer: FakeConsumer) -> None:
    consumer.commit_error = CommitFailedError("thrown out of the group")
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    await stage.revoke(TP)
    consumer.commit_error = None
    assert await stage.source.close(1) == 0


async def test_no_reader_outlives_the_end_of_taking(consumer: FakeConsumer) -> None:
    """Not even one that misses being cancelled, as asyncio's waiting can."""
    stage = await staged(consumer)
    consumer.reading.clear()
    await stage.assign(TP)
    reader = stage.source._readers[stage.source._assignments[TP]]
    await asyncio.sleep(0.01)
    consumer.swallows_cancel = True
    stage.source.stop_taking()
    consumer.reading.set()
    await until(reader.done)
    assert len(stage.source._batcher) == 0


@pytest.mark.parametrize("end", ["drain", "revocation"])
async def test_records_that_come_when_none_are_accepted_are_not_committed(consumer: FakeConsumer, end: str) -> None:
    """A read that misses being cancelled has moved the position past records that nobody takes."""
    stage = await staged(consumer)
    consumer.reading.clear()
    await stage.assign(TP)
    assignment = stage.source._assignments[TP]
    reader = stage.source._readers[assignment]
    await asyncio.sleep(0.01)
    consumer.swallows_cancel = True
    if end == "drain":
        stage.source.stop_taking()
    else:
        assignment.under_way = 1  # so that the revocation waits
        revoking = asyncio.create_task(stage.revoke(TP))
    await until(reader.done)
    assert consumer.positions[TP] > 0
    await stage.source._measure(assignment, consumer.last_offset)
    if end == "revocation":
        stage.source.drop(assignment, 1)
        await revoking
    await stage.source.close(1)
    assert consumer.commits == []


async def test_a_record_that_cannot_be_read_is_never_behind_the_position(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka has moved on when it raises, and what is between read and position would count as a transaction's end."""
    calls = 0

    async def unreadable(tp: TopicPartition, timeout_ms: int, max_records: int) -> Any:
        nonlocal calls
        calls += 1
        consumer.positions[tp] += 1
        raise CorruptRecordException

    monkeypatch.setattr(consumer, "getmany", unreadable)
    stage = await staged(consumer)
    await stage.assign(TP)
    with pytest.raises(UnreadableRecord, match="offset 0"):
        await asyncio.wait_for(stage.run, 5)
    assert (calls, consumer.positions[TP]) == (2, 0)


async def test_a_session_ends_for_its_reason_while_its_pattern_gives_partitions_up(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.source.TOPICS_INTERVAL_S", 0.0)
    begun = asyncio.Event()

    async def metadata() -> Any:
        return SimpleNamespace(topics=lambda: ["t", "t2"] if begun.is_set() else ["t"])

    consumer._client = SimpleNamespace(fetch_all_metadata=metadata, _conns={})
    stage = await staged(consumer, pattern="t.*")
    await stage.assign(TP)
    chunks = await stage.take()
    begun.set()
    await until(lambda: not chunks[0][0].accepts)
    stage.source._fail(WrongSetting("no"))
    await asyncio.sleep(0.01)
    stage.acknowledge(chunks)
    with pytest.raises(WrongSetting, match="no"):
        await asyncio.wait_for(stage.run, 5)
    assert consumer.commits == [{TP: chunks[0][1][-1].offset + 1}]


async def test_a_record_of_the_oldest_format_has_no_age(consumer: FakeConsumer) -> None:
    consumer.timestamp = None
    stage = await staged(consumer)
    await stage.assign(TP)
    await stage.take()
    await stage.source._measure(stage.source._assignments[TP], consumer.last_offset)
    assert b'lag_seconds{partition="0",topic="t"} 0.0' in stage.metrics.text()


class FakeTransactions:
    """Notes what the source says of assignments."""

    def __init__(self) -> None:
        self.released: list[Any] = []
        self.retired: list[Any] = []

    async def take_over(self, assignment: Any) -> None: ...

    def found(self, assignment: Any, committed: int | None) -> None: ...

    async def commit(self, offsets: Any) -> None: ...

    def settle(self, assignments: Any) -> None: ...

    def retire(self, assignment: Any) -> None:
        self.retired.append(assignment)

    def release(self, assignment: Any) -> None:
        self.released.append(assignment)


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> FakeTransactions:
    async def confirmed(_: Source) -> None: ...

    monkeypatch.setattr(Source, "_confirm_membership", confirmed)
    return FakeTransactions()


async def test_a_partition_that_is_lost_while_it_is_revoked_is_given_up_as_a_whole(
    consumer: FakeConsumer, transactions: FakeTransactions
) -> None:
    """Its trouble, its lag and its count of partitions go with it; the revocation finds nothing to release any more."""
    stage = await staged(consumer, transactions=transactions)
    await stage.assign(TP)
    chunks = await stage.take()
    assignment = stage.source._assignments[TP]
    stage.metrics.lag("t", 0, 5, 1.0)
    revoking = asyncio.create_task(stage.revoke(TP))
    await until(lambda: not assignment.accepts)
    stage.source.restart(assignment)
    stage.source.drop(assignment, sum(len(records) for _, records in chunks))
    await revoking
    assert (transactions.released, transactions.retired) == ([assignment], [])
    assert stage.source._assignments == {}
    assert stage.metrics.lag_records._metrics == {}
    assert stage.metrics.assigned_partitions._value.get() == 0


async def test_a_partition_that_is_lost_while_it_is_ours_begins_anew(
    consumer: FakeConsumer, transactions: FakeTransactions
) -> None:
    consumer.committed_at = 30
    stage = await staged(consumer, transactions=transactions)
    await stage.assign(TP)
    await stage.take()
    assignment = stage.source._assignments[TP]
    stage.source.restart(assignment)
    assert (transactions.released, transactions.retired) == ([], [assignment])
    assert (await stage.take())[0][1][0].offset == 30
    assert stage.source._assignments[TP] is not assignment


async def test_it_reads_with_the_consumer_that_knows_what_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(_: Consumer) -> None: ...

    monkeypatch.setattr(Consumer, "start", start)
    source = Source(
        Connection(("x:1",)), topics=["t"], group_id="g", breath=Breath(), metrics=Metrics("test"), health=Health()
    )
    consumer = await source._started_consumer()
    await consumer.stop()
    assert type(consumer) is Consumer
