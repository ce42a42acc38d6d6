"""What aiokafka 0.14 lacks: requests of our own, and what is done to its private attributes.

Each item says why it is here, and what upstream would have to do for it to go.
"""

import asyncio
import time
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import UnknownTopicOrPartitionError


def _spaced(update: Any) -> Any:
    """A client asks for metadata in a loop for as long as a batch's partition has no leader: thousands of times a second.

    Upstream would have to wait ``retry_backoff_ms`` between two requests, as Kafka's own client does.
    """

    async def spaced(client: AIOKafkaClient, cluster: Any, topics: Any) -> Any:
        due_at = getattr(client, "_metadata_due_at", 0.0)
        await asyncio.sleep(max(0.0, due_at - time.monotonic()))
        client._metadata_due_at = time.monotonic() + client._retry_backoff
        return await update(client, cluster, topics)

    return spaced


AIOKafkaClient._metadata_update = _spaced(AIOKafkaClient._metadata_update)


def is_gone(producer: AIOKafkaProducer, tp: TopicPartition) -> bool:
    """Whether a topic is known, and has no such partition any more. Asks for metadata, so that it is known the next time.

    Upstream would have to ask for metadata after an AddPartitionsToTxn that names an unknown partition, which it repeats
    without an end.
    """
    producer.client.force_metadata_update()
    partitions = producer.client.cluster.partitions_for_topic(tp.topic)
    return partitions is not None and tp.partition not in partitions


def give_up(producer: AIOKafkaProducer, tp: TopicPartition) -> None:
    """Fails what waits for a partition that is gone, and with it what was written there.

    Upstream would have to do so once its metadata say it, instead of after ``request_timeout_ms``.
    """
    for batch in producer._message_accumulator._batches.pop(tp, ()):
        batch.failure(UnknownTopicOrPartitionError(f"{tp.topic}-{tp.partition}"))
