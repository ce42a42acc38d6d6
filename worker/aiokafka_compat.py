"""What aiokafka 0.14 lacks: requests of our own, and what is done to its private attributes.

Each item says why it is here, and what upstream would have to do for it to go.
"""

import asyncio
import base64
import random
from collections.abc import Collection
from typing import Any, Final, NamedTuple

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError, NodeNotReadyError
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Schema,
    TaggedFields,
)

from worker.tasks import within

# Topics' ids, and the names of all topics. aiokafka's newest Metadata is v5, which has no ids, and it parses the answer on
# the event loop, field by field: half a second for 60,000 partitions. Upstream would have to speak v10 (Kafka 2.8).

METADATA_TIMEOUT_S: Final = 3.0  # of one broker; then the next one is asked
LARGE_ANSWER_BYTES: Final = 100_000  # some milliseconds to parse
UNKNOWN_TOPIC: Final = 3
BESIDE: Final = "topics"  # a connection of its own, where it neither waits for a fetch nor holds one up
_NO_ID: Final = bytes(16)
_FIXED_BYTES: Final = 14  # of a partition: error code, number, leader, leader's epoch
_TAGS: Final = ("tags", TaggedFields)


class Unparsed:
    """What is left of a message, as it is."""

    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return value

    @classmethod
    def decode(cls, data: Any) -> bytes:
        rest: bytes = data.read()
        return rest

    @classmethod
    def repr(cls, value: bytes) -> str:
        return f"{len(value)} bytes"


class MetadataResponse_v10(Response):  # type: ignore[misc]  # noqa: N801 - as aiokafka names them
    API_KEY = 3
    API_VERSION = 10
    SCHEMA = Schema(("body", Unparsed))


class MetadataRequest_v10(RequestStruct):  # type: ignore[misc]  # noqa: N801
    FLEXIBLE_VERSION = True  # request header v2, response header v1
    API_KEY = 3
    API_VERSION = 10
    RESPONSE_TYPE = MetadataResponse_v10
    SCHEMA = Schema(
        ("topics", CompactArray(("topic_id", Unparsed), ("name", CompactString()), _TAGS)),  # null: all topics
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
        _TAGS,
    )


class TopicsRequest(Request[MetadataRequest_v10]):  # type: ignore[misc]
    """Metadata of these topics, or of all (None), with their ids. Creates none."""

    API_KEY = 3

    def __init__(self, topics: Collection[str] | None) -> None:
        self.topics = topics

    def build(self, request_struct_class: type[MetadataRequest_v10]) -> MetadataRequest_v10:
        named: Any = None if self.topics is None else [(_NO_ID, name, {}) for name in self.topics]
        return request_struct_class(named, False, False, False, {})


class Topic(NamedTuple):
    """``topic_id`` as Kafka writes it, empty for none."""

    name: str
    error_code: int
    topic_id: str
    is_internal: bool


async def topic_ids(client: AIOKafkaClient, topics: Collection[str]) -> dict[str, str]:
    """The ids of these topics, as one broker knows them; without topics that it does not know, empty where it has no ids.

    Raises a KafkaError when no broker answers, each within METADATA_TIMEOUT_S.
    """
    try:
        found = await _described(client, topics)
    except NotImplementedError:  # brokers before 2.8
        return dict.fromkeys(topics, "")
    return {topic.name: topic.topic_id for topic in found if topic.error_code != UNKNOWN_TOPIC}


async def topic_names(client: AIOKafkaClient) -> list[str]:
    """The names of all topics that this user may know of, but for Kafka's own. Raises as ``topic_ids``.

    There is no request for names alone, so brokers answer with every partition.
    """
    try:
        found = await _described(client, None)
    except NotImplementedError:
        return list((await client.fetch_all_metadata()).topics())
    return [topic.name for topic in found if not topic.error_code and not topic.is_internal]


async def _described(client: AIOKafkaClient, topics: Collection[str] | None) -> list[Topic]:
    nodes = [broker.nodeId for broker in client.cluster.brokers()]
    for node in random.sample(nodes, len(nodes)):
        try:
            answer = await within(METADATA_TIMEOUT_S, client.send(node, TopicsRequest(topics), group=BESIDE))
        except (KafkaError, OSError, TimeoutError):
            continue
        if len(answer.body) > LARGE_ANSWER_BYTES:
            return await asyncio.to_thread(parsed_topics, answer.body)
        return parsed_topics(answer.body)
    raise NodeNotReadyError


def parsed_topics(body: bytes) -> list[Topic]:
    """The topics of a Metadata answer, version 10, whose partitions are skipped: some microseconds each."""
    data = _Bytes(body)
    data.skip(4)  # throttle time
    for _ in range(data.length()):
        data.skip(4)
        data.text()  # host
        data.skip(4)
        data.text()  # rack
        data.tags()
    data.text()  # the cluster's id
    data.skip(4)
    topics: list[Topic] = []
    for _ in range(data.length()):
        code = int.from_bytes(data.take(2), "big")
        name, topic_id, is_internal = data.text(), data.take(16), data.take(1) != b"\0"
        readable = "" if topic_id == _NO_ID else base64.urlsafe_b64encode(topic_id).decode().rstrip("=")
        topics.append(Topic(name, code, readable, is_internal))
        for _ in range(data.length()):
            data.skip(_FIXED_BYTES)
            for _ in range(3):  # replicas, those in sync, those offline
                data.skip(4 * data.length())
            data.tags()
        data.skip(4)
        data.tags()
    return topics


class _Bytes:
    """Reads on in some bytes, where compact types are: a length is one more than what it says, and 0 for null."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def skip(self, count: int) -> None:
        self._at += count

    def take(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self) -> int:
        value = shift = 0
        while (byte := self._data[self._at]) > 127:
            value |= (byte & 127) << shift
            shift += 7
            self._at += 1
        self._at += 1
        return value | byte << shift

    def length(self) -> int:
        return max(0, self.number() - 1)

    def text(self) -> str:
        return self.take(self.length()).decode()

    def tags(self) -> None:
        for _ in range(self.number()):
            self.number()
            self.skip(self.number())
