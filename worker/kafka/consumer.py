"""Committed offsets, with their errors: aiokafka's consumer, but for what it says is committed.

From version 2 on (KIP-88) an OffsetFetch that fails as a whole says so beside its partitions, of which it then has none:
so it does while the group's coordinator is loading or has moved. aiokafka 0.14 looks at the partitions alone, and takes that
for a group that has committed nothing: it would begin at ``auto_offset_reset``, and repeat or lose all that is between.
"""

import asyncio
from collections.abc import Collection
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    IllegalStateError,
    KafkaError,
    NoError,
    NotCoordinatorForGroupError,
    for_code,
)
from aiokafka.protocol.commit import OffsetFetchRequest
from aiokafka.structs import OffsetAndMetadata

from worker.kafka.aiokafka_compat import (
    RETRY_S,
    agreed_topic_id,
    background_tasks,
    end_offsets,
    known_brokers,
    topic_ids,
    topic_names,
)


class Consumer(AIOKafkaConsumer):  # type: ignore[misc]
    """aiokafka's, which tells "nothing is committed" from "the coordinator cannot say", and knows topics' ids."""

    async def topic_ids(self, topics: Collection[str]) -> dict[str, str]:
        """As of ``aiokafka_compat.topic_ids``."""
        return await topic_ids(self, topics)

    async def agreed_topic_id(self, topic: str) -> str | None:
        """As of ``aiokafka_compat.agreed_topic_id``."""
        return await agreed_topic_id(self._client, topic)

    async def topic_names(self) -> list[str]:
        """As of ``aiokafka_compat.topic_names``."""
        return await topic_names(self)

    async def ends(
        self, partitions: Collection[TopicPartition], timeout_s: float
    ) -> dict[TopicPartition, int | Exception]:
        """The end offset of each of these partitions, or why it cannot be had; raises nothing of Kafka's."""
        return await end_offsets(self, partitions, timeout_s)

    def background_tasks(self) -> dict[str, asyncio.Future[Any]]:
        """By name, the tasks that last as long as the consumer, once it is started: without one of them it reads nothing."""
        return background_tasks(self)

    def brokers(self) -> int:
        """How many there are, as far as is known."""
        return known_brokers(self)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Raises IllegalStateError where the partition is not assigned; between two assignments aiokafka asserts instead."""
        try:
            super().seek(partition, offset)
        except AssertionError:
            raise IllegalStateError(f"no partition is assigned, {partition} neither") from None

    async def committed_offsets(
        self, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        """The group's committed offset and its metadata for each of these partitions; a negative offset for none.

        Waits, without end, for a coordinator that can say. Raises the KafkaError of what does not pass by itself.
        """
        coordinator = self._coordinator
        request = _offset_fetch(coordinator.group_id, partitions)
        while True:
            await coordinator.ensure_coordinator_known()
            asked = coordinator.coordinator_id
            try:
                return _committed_offsets(await coordinator._send_req(request), partitions)
            except (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError):
                if coordinator.coordinator_id == asked:
                    coordinator.coordinator_dead()  # it is looked up anew
            except KafkaError as error:
                if not error.retriable:
                    raise
            await asyncio.sleep(RETRY_S)


def _offset_fetch(group_id: str, partitions: Collection[TopicPartition]) -> OffsetFetchRequest:
    by_topic: dict[str, list[int]] = {}
    for tp in partitions:
        by_topic.setdefault(tp.topic, []).append(tp.partition)
    return OffsetFetchRequest(group_id, list(by_topic.items()))


def _committed_offsets(
    response: Any, partitions: Collection[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """Raises the KafkaError of the response or of a partition; GroupCoordinatorNotAvailableError if it leaves one out."""
    _raise_for(getattr(response, "error_code", 0))
    found = {}
    for topic, answers in response.topics:
        for partition, offset, *_, metadata, code in answers:
            _raise_for(code)
            found[TopicPartition(topic, partition)] = OffsetAndMetadata(offset, metadata or "")
    if not found.keys() >= set(partitions):
        raise GroupCoordinatorNotAvailableError
    return found


def _raise_for(code: int) -> None:
    error = for_code(code)
    if error is not NoError:
        raise error
