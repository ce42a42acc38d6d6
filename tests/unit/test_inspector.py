"""What the inspector makes of answers that a real Kafka seldom gives."""

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from tests.support.metadata import READABLE_ID
from worker.core.topic_ids import with_topic_id
from worker.kafka.inspector import _unread_before


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
