"""The consumer that this worker uses: aiokafka's, with what that lacks."""

from typing import Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import IllegalStateError

from worker.kafka.aiokafka_compat import group, metadata, nearest_replica, offsets, transactions

NO_PARTITION: Final = 2**31 - 1  # the number of a partition that no topic has


class Consumer(AIOKafkaConsumer):  # type: ignore[misc]
    """What it adds is a function of ``aiokafka_compat`` each, which says what it does and raises."""

    topic_ids = metadata.topic_ids
    agreed_topic_id = metadata.agreed_topic_id
    topic_names = metadata.topic_names
    brokers = metadata.known_brokers
    ends = offsets.end_offsets
    committed_offsets = offsets.committed_offsets
    leave_replica = nearest_replica.leave_replica
    background_tasks = group.background_tasks
    membership = transactions.membership

    def written_to(self, partition: TopicPartition) -> int:
        """The offset behind all records, also those in open transactions, as the last fetch told; 0 if not known."""
        if partition not in self.assignment():
            return 0
        return self.highwater(partition) or 0

    async def raise_group_error(self, topic: str) -> None:
        """Raises the group's KafkaError, such as a missing permission: aiokafka raises it only to those who read.

        ``topic`` is any that is subscribed to; no record of it is read. Waits while the group rebalances, so the caller sets
        a deadline.
        """
        await self.getmany(TopicPartition(topic, NO_PARTITION), timeout_ms=0)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Raises IllegalStateError where the partition is not assigned; between two assignments aiokafka asserts instead."""
        try:
            super().seek(partition, offset)
        except AssertionError:
            raise IllegalStateError(f"{partition} is not assigned, nor is any other partition") from None
