"""How far partitions are read ahead of the pipeline."""

import asyncio
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

FETCHED = 5_000  # records of a partition that one fetch brings


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
    monkeypatch.setattr("worker.kafka.group_consumer.Reader", EndlessReader)
    stage = await staged(consumer, max_batch_texts=512)
    await stage.assign(*(TopicPartition("t", number) for number in range(40)))
    await asyncio.sleep(0.2)
    assert 512 <= len(stage.source._read_ahead) < 2_048  # not 40,000


async def test_partitions_take_turns(consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.kafka.group_consumer.Reader", EndlessReader)
    stage = await staged(consumer, max_batch_texts=512)
    await stage.assign(*(TopicPartition("t", number) for number in range(16)))
    taken = stage.source._consumer.reader.taken
    async with asyncio.timeout(10):
        while taken.total() < 2 * FETCHED:
            await stage.source.next_batch()
    shares = [taken[number] for number in range(16)]
    assert max(shares) <= min(shares) + 512  # one turn more at most, and what was read at the start


async def test_nothing_gathered_is_left_after_a_revocation(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    await until(lambda: stage.metrics.queue_depth["gather"]._value.get() > 0)
    await stage.revoke(TP)
    assert stage.metrics.queue_depth["gather"]._value.get() == 0
