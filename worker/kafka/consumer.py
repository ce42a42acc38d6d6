"""The consumer that this worker uses: aiokafka's, with what it lacks from ``aiokafka_compat``."""

import asyncio
from collections.abc import Collection
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import IllegalStateError
from aiokafka.structs import OffsetAndMetadata

from worker.kafka.aiokafka_compat import (
    agreed_topic_id,
    background_tasks,
    committed_offsets,
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
        return await agreed_topic_id(self, topic)

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
        return await committed_offsets(self, partitions)
