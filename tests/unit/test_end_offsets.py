"""Requests of our own: what they ask, of whom, and what becomes of one that fails."""

import asyncio
from types import SimpleNamespace
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import (
    KafkaConnectionError,
    LeaderNotAvailableError,
    NodeNotReadyError,
    NotLeaderForPartitionError,
    UnknownTopicOrPartitionError,
)

from worker.kafka.aiokafka_compat.offsets import READ_UNCOMMITTED, end_offsets


class FakeClient:
    """Brokers by number. A partition's end is its number; ``leaders`` says which broker leads it, -1 for none."""

    def __init__(self, leaders: dict[TopicPartition, int]) -> None:
        self.cluster = SimpleNamespace(leader_for_partition=leaders.get)
        self.asked: list[int] = []
        self.isolation_levels: set[int] = set()
        self.updates = 0
        self.codes: dict[int, int] = {}
        self.down: set[int] = set()
        self.frozen: set[int] = set()
        self.is_answered = True

    async def send(self, leader: int, request: Any) -> Any:
        self.asked.append(leader)
        self.isolation_levels.add(request._isolation_level)
        if leader in self.down:
            raise NodeNotReadyError
        if leader in self.frozen:
            await asyncio.Event().wait()
        topics = [
            (topic, [(number, self.codes.get(number, 0), -1, number, 0) for number, _ in partitions])
            for topic, partitions in request._topics
        ]
        return SimpleNamespace(topics=topics)

    def force_metadata_update(self) -> asyncio.Future[bool]:
        self.updates += 1
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        done.set_result(self.is_answered)
        return done


def places(count: int) -> list[TopicPartition]:
    return [TopicPartition("t", number) for number in range(count)]


async def ends(client: FakeClient, count: int, **options: Any) -> dict[int, Any]:
    consumer: Any = SimpleNamespace(_client=client, _fetcher=SimpleNamespace(_isolation_level=1))
    found = await end_offsets(consumer, places(count), 0.05, **options)
    return {tp.partition: type(end) if isinstance(end, Exception) else end for tp, end in found.items()}


async def test_many_partitions_cost_one_request_for_each_leader() -> None:
    client = FakeClient({tp: tp.partition % 3 for tp in places(100)})
    assert await ends(client, 100) == {number: number for number in range(100)}
    assert sorted(client.asked) == [0, 1, 2]
    assert client.updates == 0


async def test_the_end_is_by_default_as_far_as_the_consumer_reads() -> None:
    client = FakeClient(dict.fromkeys(places(1), 0))
    await ends(client, 1)
    assert client.isolation_levels == {1}
    await ends(client, 1, isolation_level=READ_UNCOMMITTED)
    assert client.isolation_levels == {1, READ_UNCOMMITTED}


async def test_what_fails_for_one_partition_leaves_the_others() -> None:
    client = FakeClient({tp: tp.partition for tp in places(6)} | {TopicPartition("t", 0): -1})
    client.down, client.frozen, client.codes = {1}, {2}, {3: NotLeaderForPartitionError.errno}
    assert await ends(client, 7) == {
        0: LeaderNotAvailableError,
        1: NodeNotReadyError,
        2: TimeoutError,
        3: NotLeaderForPartitionError,
        4: 4,
        5: 5,
        6: UnknownTopicOrPartitionError,
    }
    assert client.updates == 3, "the leaders are asked for where one is missing or wrong"


async def test_without_a_broker_it_is_no_partition_that_has_no_leader() -> None:
    client = FakeClient(dict.fromkeys(places(2), -1))
    client.is_answered = False
    assert set((await ends(client, 2)).values()) == {KafkaConnectionError}
