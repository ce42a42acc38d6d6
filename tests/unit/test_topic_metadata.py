"""Topics' ids and names by a request of our own: its bytes, and what is read from answers."""

import struct
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError, NodeNotReadyError
from aiokafka.protocol.types import UnsignedVarInt32

from tests.support.metadata import READABLE_ID, Client, answer, topic
from worker.kafka.aiokafka_compat import metadata as module
from worker.kafka.aiokafka_compat.metadata import (
    Topic,
    TopicsRequest,
    agreed_topic_id,
    parsed_topics,
    topic_ids,
    topic_names,
)


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


async def test_ids_are_those_of_the_topics_that_are_there() -> None:
    client = Client(1, answer(topic("a"), topic("b", topic_id=bytes(16)), topic("c", code=3, topic_id=bytes(16))))
    assert await topic_ids(client, ["a", "b", "c"]) == {"a": READABLE_ID, "b": ""}
    assert client.asked == [(0, ["a", "b", "c"], {"group": module.METADATA_CONNECTION})], "on a connection of its own"


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
    assert client.asked == [(0, None, {"group": module.METADATA_CONNECTION})]


OTHER_ID = bytes(range(1, 17))


@pytest.mark.parametrize(
    ("answers", "agreed"),
    [
        ([answer(topic("a"))] * 3, READABLE_ID),
        ([answer(topic("a")), answer(topic("a", topic_id=OTHER_ID)), answer(topic("a"))], None),
        ([answer(topic("a")), KafkaConnectionError(), answer(topic("a"))], READABLE_ID),
        ([answer(topic("a")), answer(topic("a", code=3, topic_id=bytes(16))), answer(topic("a"))], READABLE_ID),
        ([answer(topic("a")), answer(topic("a", topic_id=bytes(16))), NotImplementedError()], READABLE_ID),
        ([answer(topic("a"))], READABLE_ID),
        ([NotImplementedError()] * 3, ""),
    ],
)
async def test_brokers_agree_on_an_id(answers: list[Any], agreed: str | None) -> None:
    client = Client(len(answers), *answers)
    assert await agreed_topic_id(client, "a") == agreed
    assert [node for node, *_ in client.asked] == list(range(len(answers)))


@pytest.mark.parametrize("answers", [[answer(topic("a")), KafkaConnectionError(), TimeoutError()], [TimeoutError()]])
async def test_one_broker_of_several_agrees_with_nobody(answers: list[Any]) -> None:
    with pytest.raises(NodeNotReadyError):
        await agreed_topic_id(Client(len(answers), *answers), "a")
