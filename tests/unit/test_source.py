"""What the source does at the edges of a rebalance, with a consumer that answers exactly when the test says."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    CommitFailedError,
    CorruptRecordException,
    GroupCoordinatorNotAvailableError,
    IllegalStateError,
    KafkaConnectionError,
    KafkaError,
    LeaderNotAvailableError,
    NodeNotReadyError,
    RebalanceInProgressError,
    RequestTimedOutError,
)
from aiokafka.protocol.group import HeartbeatRequest, JoinGroupRequest
from aiokafka.structs import OffsetAndMetadata

from worker.core.topic_ids import TopicRecreated, with_topic_id
from worker.errors import WrongSetting
from worker.kafka import source as module
from worker.kafka.connection import Connection
from worker.kafka.consumer import Consumer
from worker.kafka.source import Rejoin, Source, Standstill, UnreadableRecord
from worker.runtime.loop_budget import TurnBudget
from worker.runtime.tasks import cancelled
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

TP = TopicPartition("t", 0)
ID, OTHER_ID = "aaaaaaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbbbb"
FETCHED = 5_000  # records of a partition that one fetch brings


@dataclass
class FakeConsumer:
    """Partitions of records without end. As in aiokafka, all readers of a partition share its position."""

    records_per_read: int = 10
    last_offset: int = 10**6
    committed_at: int | None = 0
    committed_metadata: str = with_topic_id(ID)
    topic_id: str = ID
    agreed: list[str | None] = field(default_factory=list)  # what all brokers say, answer by answer; then ``topic_id``
    commit_error: Exception | None = None
    timestamp: int | None = 0
    swallows_cancel: bool = False  # once, as asyncio.wait_for can
    positions: dict[TopicPartition, int] = field(default_factory=dict)
    commits: list[dict[TopicPartition, int]] = field(default_factory=list)
    commit_metadata: set[str] = field(default_factory=set)
    reading: asyncio.Event = field(default_factory=asyncio.Event)
    knows_committed: asyncio.Event = field(default_factory=asyncio.Event)
    commit_may_end: asyncio.Event = field(default_factory=asyncio.Event)
    stop_error: BaseException | None = None
    ends_at: int | None = None  # if not at last_offset
    unknown: dict[TopicPartition, Exception] = field(default_factory=dict)  # why an end cannot be had
    unplaceable: Exception | None = None  # why the committed offset cannot be had
    fetching: asyncio.Future[None] = field(default_factory=asyncio.Future)
    _coordinator: Any = None
    _client: Any = None

    def __post_init__(self) -> None:
        for event in (self.reading, self.knows_committed, self.commit_may_end):
            event.set()
        self._client = SimpleNamespace(cluster=SimpleNamespace(partitions_for_topic=lambda _: {0}), _conns={})

    def background_tasks(self) -> dict[str, asyncio.Future[None]]:
        return {"fetch": self.fetching}

    def brokers(self) -> int:
        return 1

    def subscribe(self, topics: Any, listener: Any) -> None:
        self.listener = listener

    def seek(self, tp: TopicPartition, offset: int) -> None:
        self.positions[tp] = offset

    async def topic_ids(self, topics: Any) -> dict[str, str]:
        return dict.fromkeys(topics, self.topic_id) if self.topic_id else {}

    async def agreed_topic_id(self, topic: str) -> str | None:
        return self.agreed.pop(0) if self.agreed else self.topic_id

    async def committed_offsets(self, tps: list[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        await self.knows_committed.wait()
        if self.unplaceable:
            raise self.unplaceable
        offset = -1 if self.committed_at is None else self.committed_at
        return dict.fromkeys(tps, OffsetAndMetadata(offset, self.committed_metadata))

    async def beginning_offsets(self, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(tps, 500)

    async def end_offsets(self, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(tps, self.last_offset)

    async def ends(self, tps: list[TopicPartition], timeout_s: float) -> dict[TopicPartition, int | Exception]:
        end = self.last_offset if self.ends_at is None else self.ends_at
        return {tp: self.unknown.get(tp, end) for tp in tps}

    async def position(self, tp: TopicPartition) -> int:
        if tp not in self.positions:
            raise IllegalStateError("it would wait")
        return self.positions[tp]

    async def getmany(
        self, tp: TopicPartition, timeout_ms: int, max_records: int = 0
    ) -> dict[TopicPartition, list[Any]]:
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

    async def commit(self, offsets: dict[TopicPartition, tuple[int, str]]) -> None:
        await self.commit_may_end.wait()
        if self.commit_error:
            raise self.commit_error
        self.commits.append({tp: offset for tp, (offset, _) in offsets.items()})
        self.commit_metadata.update(metadata for _, metadata in offsets.values())

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
    connection, turn_budget = Connection(("x:1",)), TurnBudget()
    source = Source(
        connection, topics=["t"], group_id="g", turn_budget=turn_budget, metrics=metrics, health=health, **settings
    )

    async def started() -> FakeConsumer:
        return consumer

    source._started_consumer = started  # type: ignore[method-assign, assignment]
    run = asyncio.create_task(source.run())
    await asyncio.sleep(0.01)
    return Stage(source, consumer, metrics, health, run)


@pytest.fixture
async def consumer(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeConsumer]:
    monkeypatch.setattr(module, "TOPIC_IDS_DOUBT_S", 0.02)
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

    def __init__(self, *_: object) -> None:
        self.waiting: set[TopicPartition] = set()
        self.taken: Counter[int] = Counter()
        self.fetched: Counter[int] = Counter()

    def release(self, tp: TopicPartition) -> None:
        self.fetched[tp.partition] = 0

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


@pytest.mark.parametrize("first", [1_795_428_000, 4_102_444_800_000, -1], ids=["of 1970", "of 2100", "none"])
async def test_a_timestamp_that_cannot_be_right_is_no_lag(consumer: FakeConsumer, first: int) -> None:
    consumer.timestamp = first
    consumer.last_offset = 10
    stage = await staged(consumer)
    await stage.assign(TP)
    await until(lambda: len(stage.source._batcher) == 10)
    await stage.source._measure(stage.source._assignments[TP], 12)
    assert stage.metrics.lag_records.labels("t", 0)._value.get() == 12
    assert stage.metrics.lag_seconds.labels("t", 0)._value.get() == 0
    consumer.timestamp = int((time.time() - 100) * 1000)
    consumer.last_offset = 11
    await until(lambda: len(stage.source._batcher) == 11)
    await stage.source._measure(stage.source._assignments[TP], 12)
    assert 99 < stage.metrics.lag_seconds.labels("t", 0)._value.get() < 160


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


@pytest.mark.parametrize("is_dropped", [True, False])
async def test_what_was_taken_and_went_no_further_in_a_drain_is_told(consumer: FakeConsumer, is_dropped: bool) -> None:
    """Whether it was dropped, as with a transaction that is lost, or is still nowhere when the drain has ended."""
    stage = await staged(consumer)
    await stage.assign(TP)
    ((assignment, records),) = await stage.take()
    stage.source.stop_taking()
    if is_dropped:
        stage.source.drop(assignment, len(records))
    assert await stage.source.close(1) == len(records)


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


async def test_an_error_of_a_readers_start_is_no_unreadable_record(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: TopicPartition) -> int:
        raise KeyError("a bug")

    monkeypatch.setattr(consumer, "committed_offsets", broken)
    stage = await staged(consumer)
    await stage.assign(TP)
    with pytest.raises(KeyError):
        await asyncio.wait_for(stage.run, 5)


async def test_what_cannot_be_read_of_a_partition_that_has_gone_is_its_next_owners(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    reader = stage.source._readers[stage.source._assignments[TP]]
    await stage.take()

    async def unreadable(*_: object, **__: object) -> Any:
        raise CorruptRecordException

    def not_assigned(*_: object) -> None:
        raise IllegalStateError

    monkeypatch.setattr(consumer, "seek", not_assigned)
    monkeypatch.setattr(consumer, "getmany", unreadable)
    await until(reader.done)
    assert reader.exception() is None
    assert not stage.run.done()


async def test_a_reader_that_does_not_end_ends_the_session(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would take records of the next assignment."""
    is_over = asyncio.Event()

    async def endless(*_: object, **__: object) -> Any:
        while not is_over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await is_over.wait()
        return {}

    monkeypatch.setattr(cancelled, "__defaults__", (0.05,))
    monkeypatch.setattr(consumer, "getmany", endless)
    stage = await staged(consumer)
    await stage.assign(TP)
    await asyncio.sleep(0.01)
    await stage.revoke(TP)
    await until(lambda: "a reader does not end" in (stage.health.why_not_ready() or ""))
    is_over.set()


async def test_no_partition_is_read_while_its_last_reader_does_not_end(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over, reads = asyncio.Event(), 0

    async def endless(*_: object, **__: object) -> Any:
        nonlocal reads
        reads += 1
        while not is_over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await is_over.wait()
        return {}

    monkeypatch.setattr(cancelled, "__defaults__", (0.05,))
    monkeypatch.setattr(consumer, "getmany", endless)
    stage = await staged(consumer)
    await stage.assign(TP)
    await until(lambda: reads)
    stage.source.restart(stage.source._assignments[TP])
    await until(lambda: "a reader does not end" in (stage.health.why_not_ready() or ""))
    assert reads == 1
    is_over.set()


async def test_a_reader_that_others_cancel_is_noticed(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    stage.source._readers[stage.source._assignments[TP]].cancel()
    await until(lambda: "a reader was cancelled" in (stage.health.why_not_ready() or ""))


async def test_a_session_ends_for_its_reason_while_its_pattern_gives_partitions_up(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.kafka.source.TOPICS_INTERVAL_S", 0.0)
    begun = asyncio.Event()

    async def topic_names() -> list[str]:
        return ["t", "t2"] if begun.is_set() else ["t"]

    monkeypatch.setattr(consumer, "topic_names", topic_names, raising=False)
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


async def test_names_of_all_topics_are_asked_for_the_more_rarely_the_longer_they_take(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.kafka.source.TOPICS_INTERVAL_S", 0.0)
    looks = 0

    async def topic_names() -> list[str]:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0.02 if looks == 10 else 0)
        return ["t"]

    monkeypatch.setattr(consumer, "topic_names", topic_names, raising=False)
    stage = await staged(consumer, pattern="t.*")
    await until(lambda: looks == 10)
    await asyncio.sleep(0.5)
    assert looks == 10, "the next one is due after four seconds"
    stage.run.cancel()


class Rejoined(FakeConsumer):
    """Each time it subscribes it is given its partition; the positions are those that were reached before."""

    def subscribe(self, topics: Any, listener: Any) -> None:
        super().subscribe(topics, listener)
        self.committed_at = self.positions.get(TP, 0)
        self.assigning = asyncio.create_task(listener.on_partitions_assigned({TP}))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.05)
    monkeypatch.setattr(module, "LAG_INTERVAL_S", 0.01)
    monkeypatch.setattr(module.Backoff, "wait", lambda _: asyncio.sleep(0))


@pytest.mark.usefixtures("impatient")
async def test_joining_again_and_again_ends_where_no_position_moves(consumer: FakeConsumer) -> None:
    consumer = Rejoined(records_per_read=0)
    stage = await staged(consumer)
    with pytest.raises(Standstill, match=r"nothing of t-0 is read any more, .* joined again 3 times: t-0 has 1000000"):
        await asyncio.wait_for(stage.run, 10)
    assert stage.metrics.kafka_errors.labels("consume")._value.get() == 3


@pytest.mark.usefixtures("impatient")
async def test_one_partition_that_stands_still_is_no_better_because_others_move(consumer: FakeConsumer) -> None:
    other = TopicPartition("t", 1)

    class Both(Rejoined):
        def subscribe(self, topics: Any, listener: Any) -> None:
            FakeConsumer.subscribe(self, topics, listener)
            self.positions[other] = self.positions.get(other, 0) + 1
            self.assigning = asyncio.create_task(listener.on_partitions_assigned({TP, other}))

        def seek(self, tp: TopicPartition, offset: int) -> None:
            self.positions.setdefault(tp, offset)

    stage = await staged(Both(records_per_read=0))
    with pytest.raises(Standstill, match="nothing of t-0 is read any more"):
        await asyncio.wait_for(stage.run, 10)


@pytest.mark.usefixtures("impatient")
async def test_joining_again_goes_on_where_a_position_has_moved(consumer: FakeConsumer) -> None:
    """However little: something is done each time."""
    consumer = Rejoined(records_per_read=0)
    stage = await staged(consumer)
    errors = stage.metrics.kafka_errors.labels("consume")._value
    while errors.get() < 6:
        consumer.positions[TP] += 1
        seen = errors.get()
        await until(lambda seen=seen: errors.get() > seen)
    assert not stage.run.done()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("is_assigned", [False, True])
async def test_joining_again_and_again_ends_where_it_never_comes_to_a_place_to_read_from(
    consumer: FakeConsumer, is_assigned: bool
) -> None:
    """Whether the consumer fails before it is given a partition, or before it knows where to begin in it."""
    consumer = Rejoined() if is_assigned else consumer
    consumer.knows_committed.clear()
    consumer.fetching.set_exception(KafkaError("broken"))
    stage = await staged(consumer)
    with pytest.raises(Standstill, match=r"nothing is read, .* joined again 3 times: the consumer's fetch task"):
        await asyncio.wait_for(stage.run, 10)
    assert stage.metrics.kafka_errors.labels("consume")._value.get() == 3


async def test_what_is_not_known_for_a_moment_does_not_hide_a_standstill(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unknown(_: TopicPartition) -> int:
        raise KafkaError

    consumer.records_per_read = 0
    stage = await staged(consumer)
    await stage.assign(TP)
    await until(lambda: TP in consumer.positions)

    async def joined_again(*, has_end: bool = True) -> None:
        stage.source._placeless = 0
        consumer.unknown = {} if has_end else {TP: LeaderNotAvailableError()}
        await stage.source._look_for_standstill(Rejoin("why"))

    for has_end in (True, True, False, True, False):
        await joined_again(has_end=has_end)
    with monkeypatch.context() as patch:
        patch.setattr(consumer, "position", unknown)
        await joined_again()
    with pytest.raises(Standstill, match="nothing of t-0 is read any more"):
        await joined_again()


async def test_what_the_consumers_own_tasks_end_by_is_told_by_kind_and_place(
    consumer: FakeConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    stage = await staged(consumer)
    try:
        {}["a text"]
    except KeyError as error:
        cause = KafkaError("Unexpected error during data retrieval")
        cause.__cause__ = error
    consumer.fetching.set_exception(cause)
    await until(lambda: "the consumer's fetch task has ended: KeyError at test_source.py:" in caplog.text)
    assert "a text" not in caplog.text
    assert "joining the group again" in (stage.health.why_not_ready() or "")


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
        self.committed_offsets: list[int | None] = []

    async def take_over(self, assignment: Any) -> None: ...

    def found(self, assignment: Any, committed: int | None) -> None:
        self.committed_offsets.append(committed)

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
        Connection(("x:1",)),
        topics=["t"],
        group_id="g",
        turn_budget=TurnBudget(),
        metrics=Metrics("test"),
        health=Health(),
    )
    consumer = await source._started_consumer()
    await consumer.stop()
    assert type(consumer) is Consumer


# Which topic it is.


@pytest.mark.parametrize("metadata", ["", "of an older version", with_topic_id(ID)])
async def test_an_offset_of_this_topic_or_without_an_id_is_where_to_begin(
    consumer: FakeConsumer, metadata: str
) -> None:
    consumer.committed_at, consumer.committed_metadata, consumer.last_offset = 30, metadata, 40
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    await until(lambda: {TP: 40} in consumer.commits)
    assert consumer.commit_metadata == {with_topic_id(ID)}
    assert stage.metrics.offset_resets._value.get() == 0


@pytest.mark.parametrize("metadata", ["", "of an older version"])
async def test_an_offset_without_an_id_gets_one_at_once(consumer: FakeConsumer, metadata: str) -> None:
    """A partition may be idle until its topic is made anew, and then the old offset would hold in the new one."""
    consumer.committed_at, consumer.committed_metadata, consumer.last_offset = 30, metadata, 30
    await (await staged(consumer)).assign(TP)
    await until(lambda: consumer.commits)
    assert (consumer.commits, consumer.commit_metadata) == ([{TP: 30}], {with_topic_id(ID)})


async def test_an_offset_with_its_id_is_not_committed_again(consumer: FakeConsumer) -> None:
    consumer.committed_at, consumer.last_offset = 30, 30
    await (await staged(consumer)).assign(TP)
    await until(lambda: TP in consumer.positions)
    await asyncio.sleep(0.1)
    assert consumer.commits == []


@pytest.mark.parametrize(("reset", "offset"), [("earliest", 500), ("latest", 10**6)])
async def test_an_offset_of_another_topic_counts_as_none(
    consumer: FakeConsumer, reset: str, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    consumer.committed_at, consumer.committed_metadata = 30, with_topic_id(OTHER_ID)
    stage = await staged(consumer, auto_offset_reset=reset)
    await stage.assign(TP)
    await until(lambda: consumer.commits)
    assert consumer.commits[0] == {TP: offset}, "committed at once: the next start must not count it again"
    assert consumer.commit_metadata == {with_topic_id(ID)}
    assert stage.metrics.offset_resets._value.get() == 1
    assert ("skips" in caplog.text) == (reset == "latest")
    assert "deleted and made again" in caplog.text


@pytest.mark.parametrize("reset", ["earliest", "latest"])
async def test_a_broker_that_is_behind_the_others_makes_no_offset_count_as_none(
    consumer: FakeConsumer, reset: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It knows the topic that was there before, and says so as often as it is asked. The others do not agree."""
    consumer.committed_at, consumer.committed_metadata = 30, with_topic_id(OTHER_ID)
    consumer.agreed = [None] * 100
    stage = await staged(consumer, auto_offset_reset=reset)
    await stage.assign(TP)
    reason = "read: the brokers do not agree on which topic has the name t"
    await until(lambda: stage.health.why_not_ready() == reason)
    await asyncio.sleep(0.1)
    assert (consumer.positions, consumer.commits) == ({}, [])
    consumer.agreed, consumer.topic_id = [], OTHER_ID  # it is no longer behind
    with pytest.raises(TopicRecreated):
        await asyncio.wait_for(stage.run, 5)
    assert (consumer.positions, consumer.commits) == ({}, [])
    assert "counts as none" not in caplog.text


async def test_brokers_that_agree_again_end_the_doubt(consumer: FakeConsumer) -> None:
    consumer.committed_at, consumer.committed_metadata = 30, with_topic_id(OTHER_ID)
    consumer.agreed, consumer.last_offset = [None, OTHER_ID, None, ID], 500
    stage = await staged(consumer)
    await stage.assign(TP, OTHER)
    await until(lambda: consumer.positions.keys() == {TP, OTHER})
    assert stage.metrics.offset_resets._value.get() == 2
    await until(lambda: stage.health.why_not_ready() is None)


async def test_partitions_that_wait_for_one_topic_share_what_is_asked(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def counted(_: str) -> str:
        nonlocal asked
        asked += 1
        return ID

    monkeypatch.setattr(consumer, "agreed_topic_id", counted)
    consumer.committed_metadata = with_topic_id(OTHER_ID)
    stage = await staged(consumer)
    tps = [TopicPartition("t", number) for number in range(50)]
    await stage.assign(*tps)
    await until(lambda: len(consumer.positions) == len(tps))
    assert asked <= 2


async def test_brokers_without_ids_change_nothing(consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(topics: Any) -> dict[str, str]:
        return dict.fromkeys(topics, "")

    monkeypatch.setattr(consumer, "topic_ids", none)
    consumer.committed_at, consumer.committed_metadata, consumer.last_offset = 30, with_topic_id(OTHER_ID), 40
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    await until(lambda: consumer.commits)
    assert (consumer.commits, consumer.commit_metadata) == ([{TP: 40}], {""})


async def test_a_topic_that_is_unknown_for_a_moment_is_waited_for(consumer: FakeConsumer) -> None:
    consumer.topic_id, consumer.committed_at = "", 30
    stage = await staged(consumer)
    await stage.assign(TP)
    await asyncio.sleep(0.05)
    assert not stage.run.done()
    assert consumer.positions == {}
    consumer.topic_id = ID
    assert (await stage.take())[0][1][0].offset == 30


async def test_a_topic_that_is_made_anew_while_it_is_read_ends_the_session(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOPIC_IDS_INTERVAL_S", 0.01)
    stage = await staged(consumer)
    await stage.assign(TP)
    chunks = await stage.take()
    consumer.topic_id = ""
    await asyncio.sleep(0.05)
    assert not stage.run.done(), "gone for a moment is no verdict"
    consumer.topic_id = OTHER_ID
    await asyncio.sleep(0.05)
    stage.acknowledge(chunks)
    with pytest.raises(TopicRecreated, match=f"the input topic t was deleted and made again.*{ID}.*{OTHER_ID}"):
        await asyncio.wait_for(stage.run, 5)
    assert consumer.commit_metadata == {with_topic_id(ID)}, "what is committed of the old one never names the new one"


async def test_a_topic_that_was_made_anew_before_a_rebalance_is_not_read_at_all(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    await stage.revoke(TP)
    consumer.topic_id, consumer.positions = OTHER_ID, {}
    await stage.assign(TP)
    with pytest.raises(TopicRecreated):
        await asyncio.wait_for(stage.run, 5)
    assert consumer.positions == {}


async def test_nothing_is_read_while_the_topic_is_in_doubt_which_is_told(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    await stage.take()

    async def none(topics: Any) -> dict[str, str]:
        return dict.fromkeys(topics, "")

    monkeypatch.setattr(consumer, "topic_ids", none)  # neither one nor the other
    stage.source._topic_ids.note({"t": OTHER_ID})
    reason = "read: the brokers do not agree on which topic has the name t"
    await until(lambda: stage.health.why_not_ready() == reason)
    await asyncio.sleep(0.05)
    position = consumer.positions[TP]
    while len(stage.source._batcher):
        await stage.take()
    await asyncio.sleep(0.05)
    assert consumer.positions[TP] == position
    monkeypatch.undo()
    await stage.take()
    await until(lambda: stage.health.why_not_ready() is None)


async def test_an_offset_that_is_gone_is_no_gap_where_the_topic_is_another(consumer: FakeConsumer) -> None:
    consumer.last_offset = 10
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    consumer.topic_id = OTHER_ID
    stage.source._assignments[TP].is_out_of_range = True
    with pytest.raises(TopicRecreated):
        await asyncio.wait_for(stage.run, 5)
    assert stage.metrics.offset_resets._value.get() == 0


async def test_a_commit_in_doubt_is_not_found_in_an_offset_of_another_topic(
    consumer: FakeConsumer, transactions: FakeTransactions
) -> None:
    consumer.committed_at, consumer.committed_metadata = 10**6, with_topic_id(OTHER_ID)
    stage = await staged(consumer, transactions=transactions)
    await stage.assign(TP)
    await stage.take()
    assert transactions.committed_offsets == [None]
    assert stage.source._assignments[TP].metadata == with_topic_id(ID)


OTHER = TopicPartition("t", 1)


class Clock:
    """Real time, and what the test puts before it."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    """With watchers that look all the time."""
    monkeypatch.setattr(module, "LAG_INTERVAL_S", 0.005)
    monkeypatch.setattr(module, "GROUP_INTERVAL_S", 0.005)
    caplog.set_level(logging.INFO, "worker.telemetry.health")
    return Clock()


class FakeCoordinator:
    """Answers what is sent to it, with a code or at all, as the test says. Without a generation nobody looks for a twin."""

    coordinator_id = None
    generation = 0

    def __init__(self) -> None:
        self.code: int | None = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def _send_req(self, request: Any) -> Any:
        await self.may_answer.wait()
        if self.code is None:
            raise NodeNotReadyError
        return SimpleNamespace(error_code=self.code)

    async def beat(self) -> None:
        try:
            await self._send_req(HeartbeatRequest("g", 1, "m"))
        except NodeNotReadyError:
            return


def told_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What health logged, without how long a failure lasted."""
    return [
        record.getMessage().partition(" after ")[0]
        for record in caplog.records
        if record.name == "worker.telemetry.health"
    ]


def lags(stage: Stage) -> set[str]:
    return {partition for _, partition in stage.metrics.lag_records._metrics}


async def test_a_partition_whose_end_is_not_known_is_named_and_the_others_are_watched(
    consumer: FakeConsumer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GROUP_INTERVAL_S", 3_600)
    consumer.last_offset = 10
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP, OTHER)
    taken = 0
    while taken < 20:
        chunks = await stage.take()
        stage.acknowledge(chunks)
        taken += sum(len(records) for _, records in chunks)
    await until(lambda: lags(stage) == {"0", "1"})
    consumer.unknown = {OTHER: LeaderNotAvailableError()}
    await asyncio.sleep(0.05)
    assert (stage.health.why_not_ready(), lags(stage)) == (None, {"0", "1"}), "a leader that moves is no trouble"
    clock.ahead += 4
    await until(lambda: stage.health.why_not_ready() == "partitions: partition t-1 has no leader")
    assert lags(stage) == {"0"}
    consumer.ends_at = 15
    await until(lambda: stage.metrics.lag_records.labels("t", 0)._value.get() == 5)
    clock.ahead += 57
    await until(lambda: "joining the group again: t-0 has 5 records" in (stage.health.why_not_ready() or ""))


async def test_a_partition_that_comes_back_has_not_been_silent_meanwhile(consumer: FakeConsumer, clock: Clock) -> None:
    consumer.last_offset, consumer.unknown = 10, {TP: LeaderNotAvailableError()}
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    for _ in range(40):
        clock.ahead += 4
        await asyncio.sleep(0.02)
    consumer.unknown, consumer.ends_at = {}, 15
    await until(lambda: lags(stage) == {"0"})
    await asyncio.sleep(0.05)
    assert "joining" not in (stage.health.why_not_ready() or "")


async def test_brokers_that_are_away_are_no_partitions_without_a_leader(
    consumer: FakeConsumer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GROUP_INTERVAL_S", 3_600)
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP, OTHER)
    consumer.unknown = {TP: KafkaConnectionError(), OTHER: TimeoutError()}
    await asyncio.sleep(0.05)
    clock.ahead += 4
    await until(lambda: (stage.health.why_not_ready() or "").startswith("kafka: waiting for Kafka at x:1"))
    assert lags(stage) == set(), "what is not known is not shown"
    clock.ahead += 100
    looks = stage.metrics.kafka_errors.labels("lag")._value
    seen = looks.get()
    await until(lambda: looks.get() > seen + 1)  # it has looked since
    consumer.unknown = {OTHER: LeaderNotAvailableError()}  # they are back, and not all of their leaders are
    await until(lambda: stage.health.why_not_ready() is None)


async def test_a_trouble_of_one_reader_is_not_ended_by_the_lag(consumer: FakeConsumer, clock: Clock) -> None:
    consumer.unplaceable = RequestTimedOutError()
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    await until(lambda: stage.health.why_not_ready() == "kafka: waiting for Kafka at x:1 (RequestTimedOutError)")
    await asyncio.sleep(0.1)  # in which the lag is asked for many times
    assert stage.health.why_not_ready() == "kafka: waiting for Kafka at x:1 (RequestTimedOutError)"
    consumer.unplaceable = None
    await until(lambda: stage.health.why_not_ready() is None)


async def test_a_reader_of_a_partition_without_a_leader_blames_no_broker(consumer: FakeConsumer, clock: Clock) -> None:
    """Where to begin in it cannot be found out either, and that is no trouble of its own."""
    consumer.unknown, consumer.unplaceable = {TP: LeaderNotAvailableError()}, RequestTimedOutError()
    consumer.knows_committed.clear()
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    clock.ahead += 4
    reason = "partitions: partition t-0 has no leader"
    await until(lambda: stage.health.why_not_ready() == reason)
    consumer.knows_committed.set()
    await asyncio.sleep(0.05)
    consumer.unknown = {}
    await until(lambda: stage.health.why_not_ready() is None)


@pytest.mark.parametrize("code", [None, GroupCoordinatorNotAvailableError.errno])
async def test_a_coordinator_that_is_away_is_told_once_by_its_age(
    consumer: FakeConsumer, clock: Clock, caplog: pytest.LogCaptureFixture, code: int | None
) -> None:
    """Whether it cannot be reached or has moved; no reader and no lag says otherwise meanwhile."""
    consumer._coordinator = coordinator = FakeCoordinator()
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    await coordinator.beat()
    coordinator.code = code
    consumer.unplaceable = GroupCoordinatorNotAvailableError()
    await stage.revoke(TP)
    await stage.assign(TP)
    for _ in range(8):
        clock.ahead += 1
        await coordinator.beat()
        await asyncio.sleep(0.02)
    assert stage.health.why_not_ready() is None, "it may be moving"
    for _ in range(40):
        clock.ahead += 1
        await coordinator.beat()
        await asyncio.sleep(0.02)
    reason = "the coordinator of group g has not answered for 9 s"
    assert stage.health.why_not_ready() == f"coordinator: {reason}"
    coordinator.code, consumer.unplaceable = 0, None
    await coordinator.beat()
    await until(lambda: stage.health.why_not_ready() is None)
    assert told_of(caplog) == [reason, "coordinator: recovered"]


def join() -> JoinGroupRequest:
    return JoinGroupRequest("g", 1, 1, "m", "", "consumer", [])


@pytest.mark.parametrize("code", [None, GroupCoordinatorNotAvailableError.errno])
async def test_a_join_that_fails_is_no_answer_of_the_coordinator(
    consumer: FakeConsumer, clock: Clock, code: int | None
) -> None:
    consumer._coordinator = coordinator = FakeCoordinator()
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    await coordinator.beat()
    coordinator.code = code
    await stage.revoke(TP)
    for _ in range(20):
        clock.ahead += 1
        with contextlib.suppress(NodeNotReadyError):
            await coordinator._send_req(join())
        await asyncio.sleep(0.02)
    reason = "coordinator: the coordinator of group g has not answered for 9 s"
    assert stage.health.why_not_ready() == reason


async def test_joins_that_are_refused_at_once_are_a_rebalance_that_lasts(consumer: FakeConsumer, clock: Clock) -> None:
    """Nobody looks in the moment in which one is under way."""
    consumer._coordinator = coordinator = FakeCoordinator()
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    await coordinator.beat()
    await stage.revoke(TP)
    coordinator.code = RebalanceInProgressError.errno
    for _ in range(10):
        clock.ahead += 1
        await coordinator._send_req(join())
        await asyncio.sleep(0.02)
    assert stage.health.why_not_ready() == "group: rejoining for more than 5 s: a member is gone or busy"


async def test_a_batch_that_waits_long_to_be_unpacked_is_told(
    consumer: FakeConsumer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GROUP_INTERVAL_S", 3_600)
    consumer.last_offset = 10
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    consumer.reading.clear()
    stage.source._reader.waiting.add(TP)  # type: ignore[union-attr]
    consumer.ends_at = 15
    await until(lambda: stage.metrics.lag_records.labels("t", 0)._value.get() == 5)
    for _ in range(55):
        clock.ahead += 1
        await asyncio.sleep(0.01)
    assert stage.health.why_not_ready() is None
    clock.ahead += 10
    reason = "read: t-0 has waited 60 s for room to unpack a batch (max_unpacked_bytes)"
    await until(lambda: stage.health.why_not_ready() == reason)
    stage.source._reader.waiting.clear()  # type: ignore[union-attr]
    consumer.last_offset = 15
    consumer.reading.set()
    await until(lambda: stage.health.why_not_ready() is None)


async def test_a_coordinator_that_is_away_with_all_others_is_not_told_apart(
    consumer: FakeConsumer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    consumer._coordinator = coordinator = FakeCoordinator()
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    await coordinator.beat()
    consumer.unknown = {TP: KafkaConnectionError()}
    await asyncio.sleep(0.05)
    for _ in range(10):
        clock.ahead += 4
        await asyncio.sleep(0.02)
    consumer.unknown = {}
    await until(lambda: stage.health.why_not_ready() is None)
    assert [line for line in told_of(caplog) if "coordinator" in line] == []


async def test_a_rebalance_that_lasts_is_told(
    consumer: FakeConsumer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    consumer._coordinator = coordinator = FakeCoordinator()
    stage = await staged(consumer, clock=clock)
    clock.ahead += 6
    await asyncio.sleep(0.05)
    assert stage.health.why_not_ready() == "group: not joined yet"
    await stage.assign(TP)
    coordinator.may_answer.clear()
    await stage.revoke(TP)
    joining = asyncio.create_task(coordinator._send_req(JoinGroupRequest("g", 1, 1, "m", "", "consumer", [])))
    clock.ahead += 4
    await asyncio.sleep(0.05)
    assert stage.health.why_not_ready() is None
    clock.ahead += 20
    await until(lambda: stage.health.why_not_ready() == "group: rejoining for more than 5 s: a member is gone or busy")
    coordinator.may_answer.set()
    await joining
    await stage.assign(TP)
    assert stage.health.why_not_ready() is None
    assert told_of(caplog) == ["rejoining for more than 5 s: a member is gone or busy", "group: recovered"]


@pytest.mark.parametrize("request_timeout_ms", [1_000, 5_000, 30_000, 300_000])
@pytest.mark.parametrize("session_timeout_ms", [1_000, 45_000])
def test_what_a_rebalance_takes_fits_into_its_time(request_timeout_ms: int, session_timeout_ms: int) -> None:
    """To hear of it, to give up what one has, and to join again, in a request that waits for all members."""
    connection = Connection(("x:1",), request_timeout_ms=request_timeout_ms)
    source = Source(
        connection,
        topics=["t"],
        group_id="g",
        turn_budget=TurnBudget(),
        metrics=Metrics("test"),
        health=Health(),
        session_timeout_ms=session_timeout_ms,
    )
    rebalance_s = source._rebalance_timeout_ms / 1000
    assert source._heartbeat_ms / 1000 + source._revoke_timeout_s < rebalance_s < connection.request_timeout_s
    assert source._heartbeat_ms * 3 <= session_timeout_ms
    assert request_timeout_ms != 30_000 or rebalance_s == 12, "which the documents name"
