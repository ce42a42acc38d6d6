"""What a chaos run asks of its brokers while it disturbs them.

By aiokafka: librdkafka's AdminClient ends the process by an assertion where what it asks meets a broker's restart. Every
function has a client of its own, blocks for TIMEOUT_S at most, and raises KafkaError, OSError or TimeoutError.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from tests.support.waiting import wait_for

TIMEOUT_S: Final = 20.0
UNANSWERED: Final = (KafkaError, OSError, TimeoutError)
Answer = TypeVar("Answer")


def unread(bootstrap: str, group: str, topic: str) -> int:
    """How many records of a topic a group has not committed."""

    async def ask(consumer: AIOKafkaConsumer) -> int:
        tps = await partitions(consumer, topic)
        committed = [await consumer.committed(tp) or 0 for tp in tps]
        return sum((await consumer.end_offsets(tps)).values()) - sum(committed)

    return asked(bootstrap, group, ask)


def count(bootstrap: str, topic: str) -> int:
    """How many offsets a topic has given out."""

    async def ask(consumer: AIOKafkaConsumer) -> int:
        return sum((await consumer.end_offsets(await partitions(consumer, topic))).values())

    return asked(bootstrap, None, ask)


def make_anew(bootstrap: str, topic: str, count: int) -> None:
    """Deletes a topic, and creates it with so many partitions once it has gone."""

    def has(step: Callable[[AIOKafkaAdminClient], Awaitable[bool]]) -> Callable[[], bool]:
        async def done() -> bool:
            admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
            async with asyncio.timeout(TIMEOUT_S):
                await admin.start()
                try:
                    return await step(admin)
                finally:
                    await admin.close()

        return lambda: asyncio.run(done())

    async def deleted(admin: AIOKafkaAdminClient) -> bool:
        await admin.delete_topics([topic])
        return topic not in await admin.list_topics()

    async def created(admin: AIOKafkaAdminClient) -> bool:
        config = {"retention.ms": "-1"}
        await admin.create_topics([NewTopic(topic, count, 1, topic_configs=config)])
        return topic in await admin.list_topics()

    wait_for(has(deleted), f"{topic} to be gone", 60)
    wait_for(has(created), f"{topic} to be there", 60)


async def partitions(consumer: AIOKafkaConsumer, topic: str) -> list[TopicPartition]:
    await consumer._client._wait_on_metadata(topic)
    return [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic))]


def asked(bootstrap: str, group: str | None, ask: Callable[[AIOKafkaConsumer], Awaitable[Answer]]) -> Answer:
    async def answer() -> Answer:
        consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, group_id=group, enable_auto_commit=False)
        async with asyncio.timeout(TIMEOUT_S):
            await consumer.start()
            try:
                return await ask(consumer)
            finally:
                await consumer.stop()

    return asyncio.run(answer())
