"""The lag, and partitions whose end is not known."""

import asyncio
import time

import pytest
from aiokafka.errors import (
    KafkaConnectionError,
    LeaderNotAvailableError,
    RequestTimedOutError,
)

from tests.support.source import (
    OTHER,
    TP,
    Clock,
    FakeConsumer,
    Stage,
    staged,
    until,
)
from worker.kafka import group_health


def lags(stage: Stage) -> set[str]:
    return {partition for _, partition in stage.metrics.lag_records._metrics}


@pytest.mark.parametrize("first", [1_795_428_000, 4_102_444_800_000, -1], ids=["of 1970", "of 2100", "none"])
async def test_a_timestamp_that_cannot_be_right_is_no_lag(consumer: FakeConsumer, first: int) -> None:
    consumer.timestamp = first
    consumer.last_offset = 10
    stage = await staged(consumer)
    await stage.assign(TP)
    await until(lambda: len(stage.source._read_ahead) == 10)
    await stage.source._lag.measure(stage.source._assignments[TP], 12)
    assert stage.metrics.lag_records.labels("t", 0)._value.get() == 12
    assert stage.metrics.lag_seconds.labels("t", 0)._value.get() == 0
    consumer.timestamp = int((time.time() - 100) * 1000)
    consumer.last_offset = 11
    await until(lambda: len(stage.source._read_ahead) == 11)
    await stage.source._lag.measure(stage.source._assignments[TP], 12)
    assert 99 < stage.metrics.lag_seconds.labels("t", 0)._value.get() < 160


async def test_lag_in_seconds_is_that_of_the_oldest_record_that_is_not_committed(consumer: FakeConsumer) -> None:
    consumer.timestamp = int((time.time() - 10_000) * 1000)
    consumer.last_offset = 10
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    consumer.timestamp = int(time.time() * 1000)
    consumer.last_offset = 12
    await until(lambda: len(stage.source._read_ahead) == 2)
    await stage.source._lag.measure(stage.source._assignments[TP], 12)
    assert stage.metrics.lag_records.labels("t", 0)._value.get() == 2
    assert stage.metrics.lag_seconds.labels("t", 0)._value.get() < 60


async def test_a_record_of_the_oldest_format_has_no_age(consumer: FakeConsumer) -> None:
    consumer.timestamp = None
    stage = await staged(consumer)
    await stage.assign(TP)
    await stage.take()
    await stage.source._lag.measure(stage.source._assignments[TP], consumer.last_offset)
    assert b'lag_seconds{partition="0",topic="t"} 0.0' in stage.metrics.text()


async def test_a_partition_whose_end_is_not_known_is_named_and_the_others_are_watched(
    consumer: FakeConsumer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_health, "GROUP_INTERVAL_S", 3_600)
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
    clock.ahead += 61
    await until(lambda: "joining the group again: t-0 has 5 records" in (stage.health.why_not_ready() or ""))


async def test_a_follower_that_sends_nothing_is_left_before_the_consumer_is(
    consumer: FakeConsumer, clock: Clock
) -> None:
    consumer.last_offset = 10
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    consumer.ends_at = 15
    await until(lambda: stage.metrics.lag_records.labels("t", 0)._value.get() == 5)
    assert consumer.left == []
    clock.ahead += 16
    await until(lambda: TP in consumer.left)
    assert "joining" not in (stage.health.why_not_ready() or "")


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
    monkeypatch.setattr(group_health, "GROUP_INTERVAL_S", 3_600)
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


async def test_a_batch_that_waits_long_to_be_unpacked_is_told(
    consumer: FakeConsumer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_health, "GROUP_INTERVAL_S", 3_600)
    consumer.last_offset = 10
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    consumer.reading.clear()
    stage.source._consumer.reader.waiting.add(TP)
    consumer.ends_at = 15
    await until(lambda: stage.metrics.lag_records.labels("t", 0)._value.get() == 5)
    for _ in range(55):
        clock.ahead += 1
        await asyncio.sleep(0.01)
    assert stage.health.why_not_ready() is None
    clock.ahead += 10
    reason = "read: t-0 has waited 60 s for room to unpack a batch (max_unpacked_bytes)"
    await until(lambda: stage.health.why_not_ready() == reason)
    stage.source._consumer.reader.waiting.clear()
    consumer.last_offset = 15
    consumer.reading.set()
    await until(lambda: stage.health.why_not_ready() is None)
