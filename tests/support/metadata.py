"""Brokers' answers about topics, as Kafka's protocol describes them, and a client that gets them."""

import base64
from types import SimpleNamespace
from typing import Any

from aiokafka.protocol.types import Boolean, CompactArray, CompactString, Int16, Int32, Schema, TaggedFields

from worker.kafka.aiokafka_compat.metadata import MetadataRequest_v10, TopicsRequest

ID = bytes(range(16))
READABLE_ID = base64.urlsafe_b64encode(ID).decode().rstrip("=")
TAGS = ("tags", TaggedFields)


class Raw:
    """Bytes as they are."""

    @staticmethod
    def encode(value: bytes) -> bytes:
        return value


# https://kafka.apache.org/protocol#The_Messages_Metadata, version 10
ANSWER = Schema(
    ("throttle_time_ms", Int32),
    (
        "brokers",
        CompactArray(("node_id", Int32), ("host", CompactString()), ("port", Int32), ("rack", CompactString()), TAGS),
    ),
    ("cluster_id", CompactString()),
    ("controller_id", Int32),
    (
        "topics",
        CompactArray(
            ("error_code", Int16),
            ("name", CompactString()),
            ("topic_id", Raw),
            ("is_internal", Boolean),
            (
                "partitions",
                CompactArray(
                    ("error_code", Int16),
                    ("partition_index", Int32),
                    ("leader_id", Int32),
                    ("leader_epoch", Int32),
                    ("replica_nodes", CompactArray(Int32)),
                    ("isr_nodes", CompactArray(Int32)),
                    ("offline_replicas", CompactArray(Int32)),
                    TAGS,
                ),
            ),
            ("topic_authorized_operations", Int32),
            TAGS,
        ),
    ),
    ("cluster_authorized_operations", Int32),
    TAGS,
)


def topic(name: str, *, code: int = 0, topic_id: bytes = ID, is_internal: bool = False, partitions: int = 1) -> Any:
    nodes = list(range(3))
    described = [(0, number, 1, 7, nodes, nodes[:2], [], {}) for number in range(partitions)]
    return code, name, topic_id, is_internal, described, -(2**31), {}


def answer(*topics: Any, brokers: int = 3) -> bytes:
    named = [(number, f"host-{number}", 9092, "rack" if number % 2 else None, {}) for number in range(brokers)]
    encoded: bytes = ANSWER.encode([0, named, "cluster", 1, list(topics), -(2**31), {}])
    return encoded


class Client:
    """Knows these nodes; each answers with these bytes, or raises."""

    def __init__(self, nodes: int, *answers: Any) -> None:
        brokers = [SimpleNamespace(nodeId=number) for number in range(nodes)]
        self.cluster = SimpleNamespace(brokers=lambda: brokers)
        self._answers = list(answers)
        self.asked: list[Any] = []

    async def send(self, node: int, request: TopicsRequest, **connection: Any) -> Any:
        self.asked.append((node, request.topics, connection))
        found = self._answers.pop(0)
        if isinstance(found, BaseException):
            raise found
        return MetadataRequest_v10.RESPONSE_TYPE.decode(found)

    async def fetch_all_metadata(self) -> Any:
        return SimpleNamespace(topics=lambda: {"texts"})
