"""What is said of where a group will begin."""

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from tests.support.metadata import READABLE_ID
from worker.core.topic_ids import with_topic_id
from worker.kafka.backlog import Backlog, valid_offsets


@pytest.mark.parametrize(
    ("found", "said", "is_all_over_again"),
    [
        (
            Backlog("g", "earliest", 3, 1_234, 0, 0),
            "goes on from its committed offsets: 1,234 records in 3 partitions",
            False,
        ),
        (
            Backlog("g", "earliest", 0, 0, 2, 50),
            "has no committed offset: it begins at the earliest, 50 records in 2 partitions",
            True,
        ),
        (
            Backlog("g", "latest", 0, 0, 2, 50),
            "has no committed offset: it begins at the latest, 50 records in 2 partitions that are skipped",
            True,
        ),
        (
            Backlog("g", "earliest", 2, 7, 1, 0),
            "goes on from its committed offsets: 7 records in 2 partitions; it has no committed offset of 1 other "
            "partition: it begins at the earliest, 0 records",
            False,
        ),
        (
            Backlog("g", "earliest", 0, 0, 2, 50, ("texts",)),
            "has offsets that count as none, for texts was deleted and created again since; it has no committed offset: it "
            "begins at the earliest, 50 records in 2 partitions",
            True,
        ),
        (
            Backlog("g", "latest", 0, 0, 2, 50, since_ms=1_767_225_600_000),
            "has no committed offset: it begins at the first record of 2026-01-01T00:00:00.000Z or later, 50 records in 2 "
            "partitions",
            False,
        ),
    ],
)
def test_where_it_begins_is_one_sentence(found: Backlog, said: str, is_all_over_again: bool) -> None:
    assert (str(found), found.is_all_over_again) == (f"group g {said}", is_all_over_again)


@pytest.mark.parametrize(("topic_id", "is_valid"), [("", True), (READABLE_ID, True), ("of-a-topic-before-this", False)])
async def test_offsets_of_a_topic_that_was_made_anew_count_as_none(topic_id: str, is_valid: bool) -> None:
    committed, none = TopicPartition("texts", 0), TopicPartition("texts", 1)

    async def topic_ids(topics: set[str]) -> dict[str, str]:
        return dict.fromkeys(topics, READABLE_ID)

    async def committed_offsets(_: Any) -> dict[TopicPartition, OffsetAndMetadata]:
        return {committed: OffsetAndMetadata(5, with_topic_id(topic_id)), none: OffsetAndMetadata(-1, "")}

    consumer: Any = SimpleNamespace(topic_ids=topic_ids, committed_offsets=committed_offsets)
    valid, recreated = await valid_offsets(consumer, [committed, none])
    assert (valid, recreated) == (({committed: 5}, ()) if is_valid else ({}, ("texts",)))
