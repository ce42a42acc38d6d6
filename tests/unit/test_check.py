"""What `check` makes of answers that a real Kafka seldom gives."""

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import GroupCoordinatorNotAvailableError
from aiokafka.structs import OffsetAndMetadata

from tests.metadata import READABLE_ID, Client, answer, topic
from worker.check import _members, _offsets, _unread_before
from worker.identity import with_topic_id


class NewCluster:
    """An admin client of brokers that nobody has asked for a group yet."""

    def __init__(self) -> None:
        self.refusals = 2

    async def describe_consumer_groups(self, groups: list[str]) -> list[Any]:
        if self.refusals:
            self.refusals -= 1
            raise GroupCoordinatorNotAvailableError
        return [SimpleNamespace(groups=[(0, "group", "Empty", "consumer", "", [])])]


async def test_the_first_group_of_a_new_cluster_is_waited_for() -> None:
    finding = await _members("group", NewCluster(), 12)  # type: ignore[arg-type]
    assert (finding.verdict, finding.subject) == ("ok", "workers")


@pytest.mark.parametrize(("topic_id", "is_told"), [("", False), (READABLE_ID, False), ("of-a-topic-before-this", True)])
async def test_offsets_of_a_topic_that_was_made_anew_are_told(topic_id: str, is_told: bool) -> None:
    async def list_consumer_group_offsets(_: str) -> dict[TopicPartition, OffsetAndMetadata]:
        metadata = with_topic_id(topic_id)
        return {TopicPartition(name, 0): OffsetAndMetadata(5, metadata) for name in ("texts", "of another worker")}

    client = Client(1, answer(topic("texts")))
    admin: Any = SimpleNamespace(_client=client, list_consumer_group_offsets=list_consumer_group_offsets)
    found = [finding async for finding in _offsets("group", admin, ["texts"])]
    assert [finding.verdict for finding in found] == ["warn"] * is_told
    assert all("texts was deleted and made again" in finding.said for finding in found)


@pytest.mark.parametrize(("named", "unread"), [("", 2), ("the topic", 2), ("the one before it", 10)])
async def test_an_offset_of_another_topic_is_no_place_to_read_on_from(named: str, unread: int) -> None:
    tp = TopicPartition("texts", 0)
    ids = {"": "", "the topic": READABLE_ID, "the one before it": "of-a-topic-before-this"}

    async def said(what: Any) -> Any:
        return what

    consumer: Any = SimpleNamespace(
        beginning_offsets=lambda _: said({tp: 0}),
        end_offsets=lambda _: said({tp: 20}),
        topic_ids=lambda topics: said(dict.fromkeys(topics, READABLE_ID)),
        committed_offsets=lambda _: said({tp: OffsetAndMetadata(8, with_topic_id(ids[named]))}),
        offsets_for_times=lambda _: said({tp: SimpleNamespace(offset=10)}),
    )
    assert await _unread_before(consumer, [tp], 0, "earliest") == unread
