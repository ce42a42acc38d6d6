"""A source whose consumer and delivery answer exactly when the test says."""

import asyncio
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import (
    IllegalStateError,
)
from aiokafka.structs import OffsetAndMetadata, OffsetAndTimestamp

from worker.core.topic_ids import with_topic_id
from worker.kafka.aiokafka_compat.transactions import Membership
from worker.kafka.at_least_once import AtLeastOnce
from worker.kafka.connection import Connection
from worker.kafka.consumer import Consumer
from worker.kafka.source import Source
from worker.runtime.loop_budget import TurnBudget
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

TP, OTHER = TopicPartition("t", 0), TopicPartition("t", 1)
ID, OTHER_ID = "aaaaaaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbbbb"


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
    commits_begun: int = 0
    reads_begun: int = 0
    reading: asyncio.Event = field(default_factory=asyncio.Event)
    knows_committed: asyncio.Event = field(default_factory=asyncio.Event)
    commit_may_end: asyncio.Event = field(default_factory=asyncio.Event)
    stop_error: BaseException | None = None
    ends_at: int | None = None  # if not at last_offset
    unknown: dict[TopicPartition, Exception] = field(default_factory=dict)  # why an end cannot be had
    unplaceable: Exception | None = None  # why the committed offset cannot be had
    first_of_time: int | None = None  # the offset that a search for a time finds
    paused: set[TopicPartition] = field(default_factory=set)
    partitions: set[int] = field(default_factory=lambda: {0})
    partitions_after_refresh: set[int] | None = None
    names: list[str] = field(default_factory=list)  # of all topics
    written: int = 0  # the offset behind all records, also those in open transactions
    left: list[TopicPartition] = field(
        default_factory=list
    )  # partitions that are no longer to be fetched from a follower
    fetching: asyncio.Future[None] = field(default_factory=asyncio.Future)
    listener: Any = None  # of rebalances, once it has subscribed
    _coordinator: Any = None
    _client: Any = None

    def __post_init__(self) -> None:
        for event in (self.reading, self.knows_committed, self.commit_may_end):
            event.set()
        self._client = SimpleNamespace(
            cluster=SimpleNamespace(partitions_for_topic=lambda _: {0}),
            _conns={},
            _wait_on_metadata=self._partitions_of,
            force_metadata_update=self._refresh,
        )

    async def _partitions_of(self, topic: str) -> set[int]:
        return self.partitions

    async def _refresh(self) -> bool:
        self.partitions = self.partitions_after_refresh or self.partitions
        return True

    def written_to(self, tp: TopicPartition) -> int:
        return self.written

    def leave_replica(self, tp: TopicPartition) -> None:
        self.left.append(tp)

    async def topic_names(self) -> list[str]:
        return self.names

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

    def membership(self) -> Membership:
        return Membership("g", 1, "member")

    async def committed_offsets(
        self, tps: list[TopicPartition], *, require_stable: bool = False
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        await self.knows_committed.wait()
        if self.unplaceable:
            raise self.unplaceable
        offset = -1 if self.committed_at is None else self.committed_at
        return dict.fromkeys(tps, OffsetAndMetadata(offset, self.committed_metadata))

    async def beginning_offsets(self, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(tps, 500)

    async def offsets_for_times(
        self, times: dict[TopicPartition, int]
    ) -> dict[TopicPartition, OffsetAndTimestamp | None]:
        return dict.fromkeys(times, self.first_of_time and OffsetAndTimestamp(self.first_of_time, 0))

    def pause(self, tp: TopicPartition) -> None:
        self.paused.add(tp)

    async def end_offsets(self, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(tps, self.last_offset)

    async def ends(
        self, tps: list[TopicPartition], timeout_s: float, *, isolation_level: int | None = None
    ) -> dict[TopicPartition, int | Exception]:
        end = self.last_offset if self.ends_at is None else self.ends_at
        return {tp: self.unknown.get(tp, end) for tp in tps}

    async def position(self, tp: TopicPartition) -> int:
        if tp not in self.positions:
            raise IllegalStateError("it would wait")
        return self.positions[tp]

    raise_group_error = Consumer.raise_group_error

    async def getmany(
        self, tp: TopicPartition, timeout_ms: int, max_records: int = 0
    ) -> dict[TopicPartition, list[Any]]:
        self.reads_begun += 1
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
        self.commits_begun += 1
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
        for assignment in self.source._assignments.values():  # which takes real time where nothing is known yet
            assignment.silent_since = assignment.end_known_at = self.source._clock()

    async def revoke(self, *tps: TopicPartition) -> None:
        await self.consumer.listener.on_partitions_revoked(set(tps))

    async def take(self) -> list[Any]:
        chunks = await asyncio.wait_for(self.source.next_batch(), 30)
        assert chunks
        return chunks

    def acknowledge(self, chunks: list[Any]) -> None:
        for assignment, records in chunks:
            self.source.acknowledge(assignment, records[-1].offset + 1, len(records))


def at_least_once(metrics: Metrics, health: Health) -> AtLeastOnce:
    """It publishes nothing here: a test acknowledges records itself."""
    sink: Any = None
    return AtLeastOnce(sink, capacity=1_000, turn_budget=TurnBudget(), metrics=metrics, health=health)


def served(delivery: Any, connection: Connection | None = None, **settings: Any) -> Source:
    connection = connection or Connection(("x:1",))
    source = Source(
        connection, delivery, **({"topics": ["t"], "group_id": "g", "turn_budget": TurnBudget()} | settings)
    )
    unused: Any = None
    delivery.serve(source, unused, unused)
    return source


async def staged(consumer: FakeConsumer, delivery: Any = None, **settings: Any) -> Stage:
    """A source that has joined. Its micro-batches do not linger, for a test's clock may stand still."""
    metrics, health = Metrics("test"), Health()
    settings = {"linger_s": 0.0} | settings
    source = served(delivery or at_least_once(metrics, health), metrics=metrics, health=health, **settings)

    async def started() -> FakeConsumer:
        return consumer

    source._consumer._started = started  # type: ignore[method-assign, assignment]
    run = asyncio.create_task(source.run())
    await until(lambda: consumer.listener or run.done())
    return Stage(source, consumer, metrics, health, run)


async def until(condition: Any, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


class FakeDelivery:
    """Notes what the source says of assignments."""

    requires_stable_offsets = False

    def __init__(self) -> None:
        self.released: list[Any] = []
        self.abandoned: list[Any] = []

    def serve(self, *_: object) -> None: ...

    async def begin(self, assignment: Any) -> None: ...

    async def commit(self, due: Any, timeout_s: float) -> bool:
        return True

    def flush(self, assignments: Any) -> None: ...

    def abandon(self, assignment: Any) -> None:
        self.abandoned.append(assignment)

    def release(self, assignment: Any) -> None:
        self.released.append(assignment)


class Clock:
    """Time that passes only where the test says so: a busy machine makes nothing late."""

    ahead = 0.0

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self) -> float:
        return self._began + self.ahead
