"""How far partitions are read ahead of the pipeline."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition

from tests.support.source import (
    TP,
    FakeConsumer,
    staged,
    until,
)
from worker.kafka.assignment import Assignment
from worker.kafka.read_ahead import ReadAhead
from worker.telemetry.metrics import Metrics

FETCHED = 5_000  # records of a partition that one fetch brings


class EndlessReader:
    """As the real one, it asks for the limit once the records are there, and waits for a fetch alone."""

    def __init__(self, *_: object) -> None:
        self.waiting: set[TopicPartition] = set()
        self.taken: Counter[int] = Counter()
        self.fetched: Counter[int] = Counter()

    def release(self, tp: TopicPartition) -> None:
        self.fetched[tp.partition] = 0

    def is_fetched(self, tp: TopicPartition) -> bool:
        return bool(self.fetched[tp.partition])

    async def until_fetched(self, tp: TopicPartition, timeout_s: float) -> bool:
        await asyncio.sleep(0)
        self.fetched[tp.partition] = FETCHED
        return True

    async def read(self, tp: TopicPartition, *, limit: Callable[[], int]) -> list[Any]:
        count = min(self.fetched[tp.partition], limit())
        self.fetched[tp.partition] -= count
        self.taken[tp.partition] += count
        return [SimpleNamespace(offset=offset, timestamp=0) for offset in range(count)]


async def test_many_partitions_read_no_further_ahead_than_few(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.kafka.group_consumer.Reader", EndlessReader)
    stage = await staged(consumer, max_batch_texts=512)
    await stage.assign(*(TopicPartition("t", number) for number in range(40)))
    await until(lambda: len(stage.source._read_ahead) >= 512)
    await asyncio.sleep(0.2)
    assert len(stage.source._read_ahead) < 2_048  # not 40,000


async def test_partitions_take_turns(consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.kafka.group_consumer.Reader", EndlessReader)
    stage = await staged(consumer, max_batch_texts=512)
    await stage.assign(*(TopicPartition("t", number) for number in range(16)))
    taken = stage.source._consumer.reader.taken
    async with asyncio.timeout(60):
        while taken.total() < 2 * FETCHED:
            await stage.source.next_batch()
    shares = [taken[number] for number in range(16)]
    assert max(shares) <= min(shares) + 512  # one turn more at most, and what was read at the start


async def test_a_backlog_is_read_however_many_partitions_have_nothing(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their looking for records takes no turn, and a turn of the event loop may take long."""

    class FewRecords(EndlessReader):
        async def until_fetched(self, tp: TopicPartition, timeout_s: float) -> bool:
            if tp != TP:
                await asyncio.sleep(0.05)  # which stands for timeout_s
                return False
            return await super().until_fetched(tp, timeout_s)

    async def work() -> None:
        while True:
            time.sleep(0.001)  # noqa: ASYNC251 - the loop's other work
            await asyncio.sleep(0)

    monkeypatch.setattr("worker.kafka.group_consumer.Reader", FewRecords)
    stage = await staged(consumer, max_batch_texts=512)
    await stage.assign(TP, *(TopicPartition("t", number) for number in range(100, 300)))
    working = asyncio.create_task(work())
    async with asyncio.timeout(60):
        while stage.source._consumer.reader.taken[TP.partition] < 2 * FETCHED:
            await stage.source.next_batch()
    working.cancel()


async def test_nothing_gathered_is_left_after_a_revocation(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    await until(lambda: stage.metrics.queue_depth["gather"]._value.get() > 0)
    await stage.revoke(TP)
    assert stage.metrics.queue_depth["gather"]._value.get() == 0


class Readers:
    """Readers of a buffer for 1,024 records, each of which reads once, 256 records where there is room."""

    def __init__(self) -> None:
        self.read_ahead = ReadAhead(max_batch_texts=512, linger_s=0, metrics=Metrics("test"))
        self.admitted: list[int] = []
        self.reading: list[asyncio.Task[None]] = []

    async def wait(self, numbers: range, *, has_backlog: bool = False) -> None:
        self.reading += [asyncio.create_task(self._read(number, has_backlog)) for number in numbers]
        await self._turns()

    async def _read(self, number: int, has_backlog: bool) -> None:
        await self.read_ahead.until_room(has_backlog=has_backlog)
        self.admitted.append(number)
        records: list[Any] = [SimpleNamespace()] * self.read_ahead.read_limit()
        self.read_ahead.add(Assignment(TopicPartition("t", number)), records, 0.0)

    async def take(self) -> None:
        await self.read_ahead.next_batch()
        await self._turns()

    async def _turns(self) -> None:
        """More turns of the event loop than all admissions take; none of them waits for time."""
        for _ in range(100):
            await asyncio.sleep(0)


async def test_only_as_many_readers_go_on_as_there_is_room_for() -> None:
    """A thousand that all woke, to find that the first two have filled it again, would cost more than what is read."""
    readers = Readers()
    await readers.wait(range(1_000))
    assert readers.admitted == [0, 1, 2, 3]
    await readers.take()
    assert readers.admitted == [0, 1, 2, 3, 4, 5]


async def test_who_has_backlog_comes_after_all_others_and_none_is_held_up_by_one_that_has_gone() -> None:
    readers = Readers()
    await readers.wait(range(4))
    await readers.wait(range(10, 12), has_backlog=True)
    await readers.wait(range(20, 23))
    readers.reading[6].cancel()
    await readers.take()
    assert readers.admitted[4:] == [21, 22]
    await readers.take()
    assert readers.admitted[4:] == [21, 22, 10, 11]


async def test_where_nothing_is_read_all_go_on() -> None:
    readers = Readers()
    readers.read_ahead.add = lambda *_: None  # type: ignore[method-assign]
    await readers.wait(range(100))
    await until(lambda: len(readers.admitted) == 100)
    assert readers.admitted == [*range(100)]
