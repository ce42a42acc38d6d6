"""Moves the replicas of a topic to other brokers, which neither aiokafka nor librdkafka can."""

import asyncio
from collections.abc import Sequence

from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import CompactArray, CompactString, Int16, Int32, Schema, TaggedFields

_TAGS = ("tags", TaggedFields)


class AlterPartitionReassignmentsResponse_v0(Response):  # type: ignore[misc]  # noqa: N801 - as aiokafka names them
    API_KEY = 45
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        ("error_message", CompactString()),
        (
            "topics",
            CompactArray(
                ("name", CompactString()),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32), ("error_code", Int16), ("error_message", CompactString()), _TAGS
                    ),
                ),
                _TAGS,
            ),
        ),
        _TAGS,
    )


class AlterPartitionReassignmentsRequest_v0(RequestStruct):  # type: ignore[misc]  # noqa: N801
    FLEXIBLE_VERSION = True
    API_KEY = 45
    API_VERSION = 0
    RESPONSE_TYPE = AlterPartitionReassignmentsResponse_v0
    SCHEMA = Schema(
        ("timeout_ms", Int32),
        (
            "topics",
            CompactArray(
                ("name", CompactString()),
                ("partitions", CompactArray(("partition", Int32), ("replicas", CompactArray(Int32)), _TAGS)),
                _TAGS,
            ),
        ),
        _TAGS,
    )


class AlterPartitionReassignments(Request[AlterPartitionReassignmentsRequest_v0]):  # type: ignore[misc]
    API_KEY = 45

    def __init__(self, topic: str, replicas: Sequence[Sequence[int]]) -> None:
        self._topic = topic
        self._replicas = replicas

    def build(
        self, request_struct_class: type[AlterPartitionReassignmentsRequest_v0]
    ) -> AlterPartitionReassignmentsRequest_v0:
        partitions = [(number, list(brokers), {}) for number, brokers in enumerate(self._replicas)]
        return request_struct_class(30_000, [(self._topic, partitions, {})], {})


def reassign(bootstrap: str, topic: str, replicas: Sequence[Sequence[int]]) -> None:
    """Begins to move a topic's partitions, each to these brokers, of which the first is preferred as its leader."""

    async def send() -> None:
        client = AIOKafkaClient(bootstrap_servers=bootstrap)
        await client.bootstrap()
        try:
            answer = await client.send(client.get_random_node(), AlterPartitionReassignments(topic, replicas))
        finally:
            await client.close()
        codes = [answer.error_code, *(partition[1] for _, partitions, _ in answer.topics for partition in partitions)]
        assert not any(codes), f"the brokers refuse to move {topic}: {answer}"

    asyncio.run(send())
