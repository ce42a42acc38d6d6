"""What one partition's reader does with gaps and with records that cannot be read."""

import asyncio
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    CorruptRecordException,
    IllegalStateError,
    NoOffsetForPartitionError,
)

from tests.support.source import (
    TP,
    FakeConsumer,
    staged,
    until,
)
from worker.kafka.partition_reader import UnreadableRecord


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
        await asyncio.wait_for(stage.run, 30)
    assert (calls, consumer.positions[TP]) == (2, 0)


async def test_an_error_of_a_readers_start_is_no_unreadable_record(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> int:
        raise KeyError("a bug")

    monkeypatch.setattr(consumer, "committed_offsets", broken)
    stage = await staged(consumer)
    await stage.assign(TP)
    with pytest.raises(KeyError):
        await asyncio.wait_for(stage.run, 30)


async def test_what_cannot_be_read_of_a_partition_that_has_gone_is_its_next_owners(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    reader = stage.source._rebalances._readers[stage.source._assignments[TP]]
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


async def test_a_partition_whose_position_is_lost_begins_again_at_its_committed_offset(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was taken of it and not committed is read again, and may be published a second time."""
    consumer.last_offset = 10
    stage = await staged(consumer)
    await stage.assign(TP)
    chunks = await stage.take()
    before = stage.source._assignments[TP]
    read = consumer.getmany

    async def lost(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(consumer, "getmany", read)
        raise NoOffsetForPartitionError

    monkeypatch.setattr(consumer, "getmany", lost)
    await until(lambda: stage.source._assignments[TP] is not before)
    stage.acknowledge(chunks)
    assert (await stage.take())[0][1][0].offset == 0
    assert stage.metrics.duplicates_possible._value.get() == len(chunks[0][1])
