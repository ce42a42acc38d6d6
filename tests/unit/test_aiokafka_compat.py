"""Requests of our own: their bytes, and what is read from answers."""

import base64
import struct
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError, NodeNotReadyError
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
    UnsignedVarInt32,
)

from worker import aiokafka_compat as module
from worker.aiokafka_compat import MetadataRequest_v10, Topic, TopicsRequest, parsed_topics, topic_ids, topic_names

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


def test_a_request_names_topics_and_creates_none() -> None:
    encoded = TopicsRequest(["texts"]).prepare({3: (0, 13)}).encode()
    assert encoded == b"\x02" + bytes(16) + b"\x06texts\x00" + b"\x00\x00\x00" + b"\x00"


def test_a_request_for_all_topics() -> None:
    assert TopicsRequest(None).prepare({3: (0, 12)}).encode() == bytes(5)


def test_its_headers_are_those_of_flexible_versions() -> None:
    request = TopicsRequest([]).prepare({3: (0, 10)})
    header = request.build_request_header(correlation_id=5, client_id="c").encode()
    assert header == struct.pack(">hhih", 3, 10, 5, 1) + b"c" + b"\0"
    assert request.parse_response_header(struct.pack(">i", 5) + b"\0").correlation_id == 5


def test_an_answer_s_topics_without_their_partitions() -> None:
    body = answer(
        topic("texts", partitions=300),
        topic("gone", code=3, topic_id=bytes(16), partitions=0),
        topic("__consumer_offsets", is_internal=True),
        topic("т" * 100),
    )
    assert parsed_topics(body) == [
        Topic("texts", 0, READABLE_ID, False),
        Topic("gone", 3, "", False),
        Topic("__consumer_offsets", 0, READABLE_ID, True),
        Topic("т" * 100, 0, READABLE_ID, False),
    ]


def test_tags_of_later_versions_are_skipped() -> None:
    tag = UnsignedVarInt32.encode(1) + UnsignedVarInt32.encode(9) + UnsignedVarInt32.encode(3) + b"abc"
    body = answer(topic("texts"), brokers=0)
    inside = body.index((1).to_bytes(4, "big") + (7).to_bytes(4, "big"))  # leader and epoch of the only partition
    end = inside + 8 + (1 + 12) + (1 + 8) + 1
    assert body[end : end + 1] == b"\0"
    assert parsed_topics(body[:end] + tag + body[end + 1 :]) == [Topic("texts", 0, READABLE_ID, False)]


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


async def test_ids_are_those_of_the_topics_that_are_there() -> None:
    client = Client(1, answer(topic("a"), topic("b", topic_id=bytes(16)), topic("c", code=3, topic_id=bytes(16))))
    assert await topic_ids(client, ["a", "b", "c"]) == {"a": READABLE_ID, "b": ""}
    assert client.asked == [(0, ["a", "b", "c"], {})]


async def test_another_broker_is_asked_where_one_does_not_answer() -> None:
    client = Client(3, KafkaConnectionError(), TimeoutError(), answer(topic("a")))
    assert await topic_ids(client, ["a"]) == {"a": READABLE_ID}
    assert sorted(node for node, *_ in client.asked) == [0, 1, 2]
    with pytest.raises(NodeNotReadyError):
        await topic_ids(Client(2, KafkaConnectionError(), KafkaConnectionError()), ["a"])


async def test_brokers_that_know_no_ids() -> None:
    assert await topic_ids(Client(1, NotImplementedError()), ["a"]) == {"a": ""}
    assert await topic_names(Client(1, NotImplementedError())) == ["texts"]


@pytest.mark.parametrize("large", [0, 10**6])
async def test_names_are_those_of_topics_that_one_may_read(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large answer is parsed on another thread."""
    monkeypatch.setattr(module, "LARGE_ANSWER_BYTES", large)
    client = Client(1, answer(topic("a"), topic("__b", is_internal=True), topic("c", code=29), topic("d")))
    assert await topic_names(client) == ["a", "d"]
    assert client.asked == [(0, None, {"group": module.BESIDE})], "on a connection of its own"
