"""When joining the group again does not help."""

import asyncio
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    KafkaError,
    LeaderNotAvailableError,
)

from tests.support.source import (
    TP,
    FakeConsumer,
    staged,
    until,
)
from worker.kafka import lag
from worker.kafka.group_consumer import Rejoin
from worker.kafka.standstill import Standstill
from worker.runtime.backoff import Backoff


class Rejoined(FakeConsumer):
    """Each time it subscribes it is given its partition; the positions are those that were reached before."""

    def subscribe(self, topics: Any, listener: Any) -> None:
        super().subscribe(topics, listener)
        self.committed_at = self.positions.get(TP, 0)
        self.assigning = asyncio.create_task(listener.on_partitions_assigned({TP}))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lag, "SILENCE_S", 0.05)
    monkeypatch.setattr(lag, "LAG_INTERVAL_S", 0.01)
    monkeypatch.setattr(Backoff, "wait", lambda _: asyncio.sleep(0))


@pytest.mark.usefixtures("impatient")
async def test_joining_again_and_again_ends_where_no_position_moves(consumer: FakeConsumer) -> None:
    consumer = Rejoined(records_per_read=0)
    stage = await staged(consumer)
    with pytest.raises(
        Standstill, match=r"nothing of t-0 is read any more, .* joined again 3 times: t-0 has 1,000,000"
    ):
        await asyncio.wait_for(stage.run, 30)
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
        await asyncio.wait_for(stage.run, 30)


@pytest.mark.usefixtures("impatient")
async def test_joining_again_goes_on_where_a_position_has_moved(consumer: FakeConsumer) -> None:
    """However little: something is done each time."""
    consumer = Rejoined(records_per_read=0)
    stage = await staged(consumer)
    errors = stage.metrics.kafka_errors.labels("consume")._value
    await until(lambda: TP in consumer.positions)
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
        await asyncio.wait_for(stage.run, 30)
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
        stage.source._standstill.partition_started()
        consumer.unknown = {} if has_end else {TP: LeaderNotAvailableError()}
        await stage.source._standstill.check(Rejoin("why"))

    for has_end in (True, True, False, True, False):
        await joined_again(has_end=has_end)
    with monkeypatch.context() as patch:
        patch.setattr(consumer, "position", unknown)
        await joined_again()
    with pytest.raises(Standstill, match="nothing of t-0 is read any more"):
        await joined_again()
