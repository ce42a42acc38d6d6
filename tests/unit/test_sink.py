"""Publishing to partitions that are gone."""

from types import SimpleNamespace

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import UnknownTopicOrPartitionError
from aiokafka.producer.message_accumulator import BatchBuilder

from worker.kafka.sink import Sink


async def test_a_partition_that_is_gone_is_one_of_kafkas_errors() -> None:
    """aiokafka knows by its metadata, and has no more than an AssertionError for it."""

    async def send_batch(*_: object, **__: object) -> None:
        raise AssertionError("Unrecognized partition")

    batch, producer = BatchBuilder(1_000, 0), SimpleNamespace(send_batch=send_batch)
    with pytest.raises(UnknownTopicOrPartitionError):
        await Sink._enqueue(SimpleNamespace(), producer, batch, TopicPartition("results", 3))  # type: ignore[arg-type]
