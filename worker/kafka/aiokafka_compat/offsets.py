"""Offsets: the ends of partitions and what the group has committed, each with the reason where it cannot be had."""

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    GroupCoordinatorNotAvailableError,
    KafkaConnectionError,
    KafkaError,
    LeaderNotAvailableError,
    NoError,
    NotCoordinatorForGroupError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.commit import OffsetFetchRequest
from aiokafka.protocol.offset import OffsetRequest, OffsetResetStrategy
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
)
from aiokafka.structs import OffsetAndMetadata

from worker.kafka.aiokafka_compat.group import RETRY_S
from worker.kafka.aiokafka_compat.transactions import by_topic
from worker.runtime.tasks import within

UNSTABLE_OFFSET_COMMIT: Final = 88
READ_UNCOMMITTED: Final = 0  # as of aiokafka's requests
_TAGS: Final = ("tags", TaggedFields)


async def end_offsets(
    consumer: AIOKafkaConsumer,
    partitions: Iterable[TopicPartition],
    timeout_s: float,
    *,
    isolation_level: int | None = None,
) -> dict[TopicPartition, int | Exception]:
    """The end offset of each partition, or why it cannot be had, by one request to each leader. Raises nothing.

    Under read_committed it is before the oldest open transaction; with READ_UNCOMMITTED behind all records. The default is
    the consumer's isolation level.

    aiokafka's ``end_offsets`` fails as a whole where one partition has no leader. Upstream would have to answer for each.
    """
    cluster = consumer._client.cluster
    by_leader: dict[int | None, list[TopicPartition]] = defaultdict(list)
    for tp in partitions:
        by_leader[cluster.leader_for_partition(tp)].append(tp)
    isolation_level = consumer._fetcher._isolation_level if isolation_level is None else isolation_level
    asked = [_end_offsets_of(consumer, leader, tps, isolation_level, timeout_s) for leader, tps in by_leader.items()]
    return {tp: end for answer in await asyncio.gather(*asked) for tp, end in answer.items()}


async def _end_offsets_of(
    consumer: AIOKafkaConsumer,
    leader: int | None,
    partitions: list[TopicPartition],
    isolation_level: int,
    timeout_s: float,
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
        request = OffsetRequest(-1, isolation_level, list(by_topic.items()))
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


class OffsetFetchResponse_v7(Response):  # type: ignore[misc]  # noqa: N801 - as aiokafka names them
    API_KEY = 9
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            by_topic(
                ("partition", Int32),
                ("offset", Int64),
                ("leader_epoch", Int32),
                ("metadata", CompactString()),
                ("error_code", Int16),
            ),
        ),
        ("error_code", Int16),
        _TAGS,
    )


class OffsetFetchRequest_v7(RequestStruct):  # type: ignore[misc]  # noqa: N801
    FLEXIBLE_VERSION = True  # request header v2, response header v1
    API_KEY = 9
    API_VERSION = 7
    RESPONSE_TYPE = OffsetFetchResponse_v7
    SCHEMA = Schema(
        ("group_id", CompactString()),
        ("topics", CompactArray(("name", CompactString()), ("partitions", CompactArray(Int32)), _TAGS)),
        ("require_stable", Boolean),
        _TAGS,
    )


class StableOffsetFetchRequest(Request[OffsetFetchRequest_v7]):  # type: ignore[misc]
    """Asks for offsets that no open transaction can change. Raises NotImplementedError for brokers before Kafka 2.5."""

    API_KEY = 9

    def __init__(self, group_id: str, partitions: Collection[TopicPartition]) -> None:
        self._group_id = group_id
        self._topics: list[Any] = [(topic, numbers, {}) for topic, numbers in _numbers_by_topic(partitions)]

    def build(self, request_struct_class: type[OffsetFetchRequest_v7]) -> OffsetFetchRequest_v7:
        return request_struct_class(self._group_id, self._topics, True, {})


async def committed_offsets(
    consumer: AIOKafkaConsumer, partitions: Collection[TopicPartition], *, require_stable: bool = False
) -> dict[TopicPartition, OffsetAndMetadata]:
    """The group's committed offset and its metadata for each of these partitions; a negative offset for none.

    With ``require_stable`` it leaves out the partitions of which an open transaction holds an offset, which may still be
    committed; upstream would have to speak version 7 of OffsetFetch (Kafka 2.5).

    Waits without end for a coordinator that can say. Raises the KafkaError of what does not pass by itself.

    From version 2 on, a response to OffsetFetch can fail as a whole, as when the group's coordinator is loading or has
    moved. aiokafka 0.14 looks at the partitions alone, and takes that for a group that has committed nothing: it would
    begin at ``auto_offset_reset``, and repeat or lose all records between. Upstream would have to look at the error code.
    """
    coordinator = consumer._coordinator
    if require_stable:
        request: Any = StableOffsetFetchRequest(coordinator.group_id, partitions)
    else:
        request = OffsetFetchRequest(coordinator.group_id, _numbers_by_topic(partitions))
    while True:
        await coordinator.ensure_coordinator_known()
        asked = coordinator.coordinator_id
        try:
            return _committed_offsets(await coordinator._send_req(request), coordinator.group_id, partitions)
        except (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError):
            if coordinator.coordinator_id == asked:
                coordinator.coordinator_dead()  # aiokafka looks it up anew
        except KafkaError as error:
            if not error.retriable:
                raise
        await asyncio.sleep(RETRY_S)


def _numbers_by_topic(partitions: Iterable[TopicPartition]) -> list[tuple[str, list[int]]]:
    numbers: dict[str, list[int]] = {}
    for tp in partitions:
        numbers.setdefault(tp.topic, []).append(tp.partition)
    return list(numbers.items())


def _committed_offsets(
    response: Any, group_id: str, partitions: Collection[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """Raises the KafkaError of the response or of a partition; GroupCoordinatorNotAvailableError if it leaves one out.

    The error of a missing permission has the name of the group, or of the topic, as aiokafka's own have.
    """
    _raise_for(getattr(response, "error_code", 0), group_id)
    committed, unstable = {}, set()
    for topic, answers, *_ in response.topics:
        for partition, offset, *rest in answers:
            tp = TopicPartition(topic, partition)
            metadata, code = rest[1:3] if response.API_VERSION >= OffsetFetchResponse_v7.API_VERSION else rest[-2:]
            if code == UNSTABLE_OFFSET_COMMIT:
                unstable.add(tp)
                continue
            _raise_for(code, group_id, topic)
            committed[tp] = OffsetAndMetadata(offset, metadata or "")
    if not committed.keys() | unstable >= set(partitions):
        raise GroupCoordinatorNotAvailableError
    return committed


def _raise_for(code: int, group_id: str, topic: str = "") -> None:
    error = for_code(code)
    if error is GroupAuthorizationFailedError:
        raise error(group_id)
    if error is TopicAuthorizationFailedError:
        raise error(topic)
    if error is not NoError:
        raise error
