"""Offsets: the ends of partitions and what the group has committed, each with the reason where it cannot be had."""

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    KafkaConnectionError,
    KafkaError,
    LeaderNotAvailableError,
    NoError,
    NotCoordinatorForGroupError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.commit import OffsetFetchRequest
from aiokafka.protocol.offset import OffsetRequest, OffsetResetStrategy
from aiokafka.structs import OffsetAndMetadata

from worker.kafka.aiokafka_compat.group import RETRY_S
from worker.runtime.tasks import within


async def end_offsets(
    consumer: AIOKafkaConsumer, partitions: Iterable[TopicPartition], timeout_s: float
) -> dict[TopicPartition, int | Exception]:
    """The end offset of each partition, or why it cannot be had, by one request to each leader. Raises nothing.

    aiokafka's ``end_offsets`` fails as a whole where one partition has no leader. Upstream would have to answer for each.
    """
    cluster = consumer._client.cluster
    by_leader: dict[int | None, list[TopicPartition]] = defaultdict(list)
    for tp in partitions:
        by_leader[cluster.leader_for_partition(tp)].append(tp)
    asked = [_end_offsets_of(consumer, leader, tps, timeout_s) for leader, tps in by_leader.items()]
    return {tp: end for answer in await asyncio.gather(*asked) for tp, end in answer.items()}


async def _end_offsets_of(
    consumer: AIOKafkaConsumer, leader: int | None, partitions: list[TopicPartition], timeout_s: float
) -> Mapping[TopicPartition, int | Exception]:
    client = consumer._client
    try:
        if leader is None or leader < 0:  # the brokers are asked again, which also tells whether there are any
            if not await within(timeout_s, client.force_metadata_update()):
                raise KafkaConnectionError("no broker answers")
            missing = UnknownTopicOrPartitionError if leader is None else LeaderNotAvailableError
            return {tp: missing() for tp in partitions}
        by_topic: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for tp in partitions:
            by_topic[tp.topic].append((tp.partition, OffsetResetStrategy.LATEST))
        request = OffsetRequest(-1, consumer._fetcher._isolation_level, list(by_topic.items()))
        response = await within(timeout_s, client.send(leader, request))
    except (KafkaError, OSError, TimeoutError) as error:
        return dict.fromkeys(partitions, error)
    ends: dict[TopicPartition, int | Exception] = {}
    for topic, answers in response.topics:
        for partition, code, _, offset, *_ in answers:
            ends[TopicPartition(topic, partition)] = for_code(code)() if code else offset
    if any(getattr(end, "invalid_metadata", False) for end in ends.values()):
        client.force_metadata_update()
    return ends


async def committed_offsets(
    consumer: AIOKafkaConsumer, partitions: Collection[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """The group's committed offset and its metadata for each of these partitions; a negative offset for none.

    Waits without end for a coordinator that can say. Raises the KafkaError of what does not pass by itself.

    From version 2 on, a response to OffsetFetch can fail as a whole, as when the group's coordinator is loading or has
    moved. aiokafka 0.14 looks at the partitions alone, and takes that for a group that has committed nothing: it would
    begin at ``auto_offset_reset``, and repeat or lose all records between. Upstream would have to look at the error code.
    """
    coordinator = consumer._coordinator
    request = _offset_fetch(coordinator.group_id, partitions)
    while True:
        await coordinator.ensure_coordinator_known()
        asked = coordinator.coordinator_id
        try:
            return _committed_offsets(await coordinator._send_req(request), partitions)
        except (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError):
            if coordinator.coordinator_id == asked:
                coordinator.coordinator_dead()  # aiokafka looks it up anew
        except KafkaError as error:
            if not error.retriable:
                raise
        await asyncio.sleep(RETRY_S)


def _offset_fetch(group_id: str, partitions: Collection[TopicPartition]) -> OffsetFetchRequest:
    by_topic: dict[str, list[int]] = {}
    for tp in partitions:
        by_topic.setdefault(tp.topic, []).append(tp.partition)
    return OffsetFetchRequest(group_id, list(by_topic.items()))


def _committed_offsets(
    response: Any, partitions: Collection[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """Raises the KafkaError of the response or of a partition; GroupCoordinatorNotAvailableError if it leaves one out."""
    _raise_for(getattr(response, "error_code", 0))
    committed = {}
    for topic, answers in response.topics:
        for partition, offset, *_, metadata, code in answers:
            _raise_for(code)
            committed[TopicPartition(topic, partition)] = OffsetAndMetadata(offset, metadata or "")
    if not committed.keys() >= set(partitions):
        raise GroupCoordinatorNotAvailableError
    return committed


def _raise_for(code: int) -> None:
    error = for_code(code)
    if error is not NoError:
        raise error
