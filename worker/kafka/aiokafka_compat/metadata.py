"""Topics' metadata: ids, the names of all topics, and requests that create no topic.

aiokafka's newest Metadata request is version 5, which has no topic ids, and it parses the response on the event loop,
field by field: half a second for 60,000 partitions. Upstream would have to speak version 10 (Kafka 2.8).
"""

import asyncio
import base64
import functools
import random
from collections.abc import Collection, Iterable
from typing import Any, Final, NamedTuple

import aiokafka.admin.client
import aiokafka.client
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError, NodeNotReadyError
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.types import Boolean, CompactArray, CompactString, Schema, TaggedFields

from worker.runtime.tasks import within

METADATA_TIMEOUT_S: Final = 3.0  # of one broker; then the next one is asked
LARGE_ANSWER_BYTES: Final = 100_000  # takes some milliseconds to parse
UNKNOWN_TOPIC: Final = 3
METADATA_CONNECTION: Final = "topics"  # a connection of its own, so that it and fetches do not wait for each other
_NO_ID: Final = bytes(16)
_FIXED_BYTES: Final = 14  # of a partition: error code, number, leader, leader's epoch
_TAGS: Final = ("tags", TaggedFields)

# aiokafka has brokers create each topic that a client names, and a worker must never do that by accident.
# Upstream would have to make it an option of its clients.
creating_no_topic = functools.partial(MetadataRequest, allow_auto_topic_creation=False)
aiokafka.client.MetadataRequest = creating_no_topic
aiokafka.admin.client.MetadataRequest = creating_no_topic


class Unparsed:
    """A type of aiokafka's protocol: the rest of a message, as bytes."""

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
    """Asks for the metadata of these topics, or of all topics (None), with their ids. Creates no topic."""

    API_KEY = 3

    def __init__(self, topics: Collection[str] | None) -> None:
        self.topics = topics

    def build(self, request_struct_class: type[MetadataRequest_v10]) -> MetadataRequest_v10:
        named: Any = None if self.topics is None else [(_NO_ID, name, {}) for name in self.topics]
        return request_struct_class(named, False, False, False, {})


class Topic(NamedTuple):
    """A topic as a broker describes it. ``topic_id`` is as Kafka prints it, and empty where there is none."""

    name: str
    error_code: int
    topic_id: str
    is_internal: bool


def inner_client(client: Any) -> AIOKafkaClient:
    """The client with which an aiokafka consumer, producer or admin client sends its requests, or itself."""
    return getattr(client, "client", None) or getattr(client, "_client", client)


def use_topics(client: Any, topics: Iterable[str]) -> None:
    """Makes a client ask for the metadata of these topics alone. Call it before ``start``; it never blocks.

    A client without topics asks for those of the whole cluster. Upstream would have to take topics as an option.
    """
    inner_client(client).set_topics(set(topics))


def known_brokers(client: Any) -> int:
    """How many brokers a started client knows. aiokafka's ``describe_cluster`` would ask for all partitions."""
    return len(inner_client(client).cluster.brokers())


def broker_racks(client: Any) -> dict[int, str | None]:
    """The rack of each broker that a started client knows, by the broker's number."""
    return {broker.nodeId: broker.rack for broker in inner_client(client).cluster.brokers()}


def knows_topic(client: Any, topic: str) -> bool:
    """Whether a started client's last metadata have partitions of this topic. Asks nobody.

    Upstream would have to make a consumer's ``cluster`` public.
    """
    return bool(inner_client(client).cluster.partitions_for_topic(topic))


async def partitions_of(client: Any, topic: str) -> set[int]:
    """The partitions of a topic. Waits without end for a topic that does not exist, so the caller sets a deadline."""
    partitions: set[int] = await inner_client(client)._wait_on_metadata(topic)
    return partitions


async def refresh_metadata(client: Any) -> None:
    """Has a started client ask for its topics' metadata now, and not after minutes. A group's leader then assigns partitions
    that are new. Raises NodeNotReadyError where no broker answers.

    Upstream would have to let a consumer's caller ask for it.
    """
    if not await inner_client(client).force_metadata_update():
        raise NodeNotReadyError


async def topic_ids(client: Any, topics: Collection[str]) -> dict[str, str]:
    """The ids of these topics, as one broker knows them. Unknown topics are left out; ids are empty before Kafka 2.8.

    Asks one broker after the other, METADATA_TIMEOUT_S each; raises a KafkaError when none answers.
    """
    try:
        described = await _described(inner_client(client), topics)
    except NotImplementedError:  # brokers before 2.8
        return dict.fromkeys(topics, "")
    return {topic.name: topic.topic_id for topic in described if topic.error_code != UNKNOWN_TOPIC}


async def agreed_topic_id(client: Any, topic: str) -> str | None:
    """A topic's id if all brokers that know the topic agree, and at least two where there are more; None if they do not.

    Empty where they have no ids. It is for decisions that cannot be undone, because one broker that is cut off from its
    controller may be far behind. Raises a KafkaError when too few brokers answer within METADATA_TIMEOUT_S.
    """
    asking = inner_client(client)
    nodes = [broker.nodeId for broker in asking.cluster.brokers()]
    answers = await asyncio.gather(*(_topic_id(asking, node, topic) for node in nodes))
    known = [answer for answer in answers if answer is not None]
    if len(known) < max(1, min(2, len(nodes))):
        raise NodeNotReadyError
    ids = set(known) - {""}
    return None if len(ids) > 1 else next(iter(ids), "")


async def _topic_id(client: AIOKafkaClient, node: int, topic: str) -> str | None:
    """None where this broker does not answer, or does not know the topic."""
    try:
        described = await _described_by(client, node, [topic])
    except NotImplementedError:
        return ""
    except (KafkaError, OSError, TimeoutError):
        return None
    return next((each.topic_id for each in described if each.error_code != UNKNOWN_TOPIC), None)


async def topic_names(client: Any) -> list[str]:
    """The names of all topics that this user may describe, except Kafka's own. Raises as ``topic_ids``.

    Kafka has no request for names alone, so brokers answer with every partition.
    """
    try:
        described = await _described(inner_client(client), None)
    except NotImplementedError:
        return list((await inner_client(client).fetch_all_metadata()).topics())
    return [topic.name for topic in described if not topic.error_code and not topic.is_internal]


async def _described(client: AIOKafkaClient, topics: Collection[str] | None) -> list[Topic]:
    nodes = [broker.nodeId for broker in client.cluster.brokers()]
    for node in random.sample(nodes, len(nodes)):
        try:
            return await _described_by(client, node, topics)
        except (KafkaError, OSError, TimeoutError):
            continue
    raise NodeNotReadyError


async def _described_by(client: AIOKafkaClient, node: int, topics: Collection[str] | None) -> list[Topic]:
    answer = await within(METADATA_TIMEOUT_S, client.send(node, TopicsRequest(topics), group=METADATA_CONNECTION))
    if len(answer.body) > LARGE_ANSWER_BYTES:
        return await asyncio.to_thread(parsed_topics, answer.body)
    return parsed_topics(answer.body)


def parsed_topics(body: bytes) -> list[Topic]:
    """The topics of a Metadata response, version 10. Partitions are skipped, at some microseconds each."""
    data = _Cursor(body)
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


class _Cursor:
    """A position in bytes that hold Kafka's compact types: a length is written plus one, and 0 means null."""

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
