"""What aiokafka 0.14 lacks: requests of our own, and what is done to its private attributes.

Each item says why it is here, and what upstream would have to do for it to go.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    KafkaConnectionError,
    KafkaError,
    LeaderNotAvailableError,
    NotCoordinatorForGroupError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.group import JoinGroupRequest, SyncGroupRequest
from aiokafka.protocol.offset import OffsetRequest, OffsetResetStrategy

from worker.tasks import within

NOT_THE_COORDINATOR = (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError, GroupLoadInProgressError)


async def end_offsets(
    consumer: AIOKafkaConsumer, partitions: Iterable[TopicPartition], timeout_s: float
) -> dict[TopicPartition, int | Exception]:
    """The end offset of each partition, or why it cannot be had, by one request to each leader; raises nothing.

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
    found: dict[TopicPartition, int | Exception] = {}
    for topic, answers in response.topics:
        for partition, code, _, offset, *_ in answers:
            found[TopicPartition(topic, partition)] = for_code(code)() if code else offset
    if any(getattr(end, "invalid_metadata", False) for end in found.values()):
        client.force_metadata_update()
    return found


class CoordinatorAnswers:
    """When the coordinator of a consumer's group has last answered it, by ``clock``; make it once the consumer has started.

    aiokafka keeps the time of the last good heartbeat to itself. Upstream would have to offer it.
    """

    def __init__(self, consumer: AIOKafkaConsumer, clock: Callable[[], float] = time.monotonic) -> None:
        self.at = clock()
        self.has_answered = False
        self.is_joining = False  # in a request that the coordinator answers when every member has joined
        self._clock = clock
        coordinator = consumer._coordinator
        if coordinator is not None:
            self._send = coordinator._send_req
            coordinator._send_req = self._noted

    async def _noted(self, request: Any) -> Any:
        is_join = isinstance(request, JoinGroupRequest | SyncGroupRequest)
        self.is_joining = self.is_joining or is_join
        try:
            response = await self._send(request)
        finally:
            if is_join:
                self.is_joining, self.at = False, self._clock()
        code = getattr(
            response, "error_code", GroupCoordinatorNotAvailableError.errno
        )  # a commit's are its partitions'
        if for_code(code) not in NOT_THE_COORDINATOR:
            self.has_answered, self.at = True, self._clock()
        return response
