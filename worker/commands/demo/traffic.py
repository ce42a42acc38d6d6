"""Kafka as the demo sees it, with another client than the worker's."""

import json
import time
from typing import Any

import confluent_kafka as kafka

from worker.commands.demo.broker import DEAD_LETTER_TOPIC, GROUP, INPUT_TOPIC, OUTPUT_TOPIC
from worker.commands.demo.counts import DemoCounts
from worker.commands.demo.messages import Message
from worker.commands.demo.processes import DemoError
from worker.core.events import ID_HEADER


class Traffic:
    """Sends messages, reads what the worker publishes, and counts both in ``counts``."""

    def __init__(self, servers: str, counts: DemoCounts) -> None:
        """Blocks until the broker has told the partitions."""
        self._counts = counts
        client = {"bootstrap.servers": servers, "log_level": 2}
        self._producer = kafka.Producer({**client, "linger.ms": 0, "partitioner": "murmur2_random"})
        # The mock sleeps out an empty fetch even when a record arrives meanwhile: short, or it would count as latency.
        self._consumer = kafka.Consumer(
            {
                **client,
                "group.id": "demo-view",
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "fetch.wait.max.ms": 5,
            }
        )
        self._consumer.assign(self._partitions(OUTPUT_TOPIC, DEAD_LETTER_TOPIC))
        self._worker_group = kafka.Consumer({**client, "group.id": GROUP})

    def _partitions(self, *topics: str) -> list[Any]:
        known = self._producer.list_topics(timeout=10).topics
        return [kafka.TopicPartition(topic, number, 0) for topic in topics for number in known[topic].partitions]

    def send(self, message: Message, now: float) -> None:
        """Does not block."""
        self._counts.sent(message, now)
        headers: list[tuple[str, str | bytes | None]] = [(ID_HEADER, message.id.encode())]
        self._producer.produce(INPUT_TOPIC, message.value, message.key, headers=headers, on_delivery=self._on_delivery)

    def _on_delivery(self, error: Any, message: Any) -> None:
        if error:
            raise DemoError(f"The embedded broker refused an event: {error}.")
        self._counts.delivered += 1

    def flush(self) -> None:
        """Blocks until every event sent is with the broker, for some seconds at most."""
        if self._producer.flush(10):
            raise DemoError("The embedded broker does not take events any more.")

    def read(self, wait_s: float) -> None:
        """Counts what the worker has published; blocks for ``wait_s`` at most where that is nothing."""
        self._producer.poll(0)
        message = self._consumer.poll(wait_s)
        while message is not None:
            if message.error():
                raise DemoError(f"The embedded broker cannot be read: {message.error()}.")
            self._count(message)
            message = self._consumer.poll(0)

    def _count(self, message: Any) -> None:
        now = time.monotonic()
        headers = {name: value.decode() for name, value in message.headers() or [] if value is not None}
        id = headers.get(ID_HEADER)
        if message.topic() == DEAD_LETTER_TOPIC:
            self._counts.dead_letter(id, headers["error.reason"], now)
        elif message.value() is None:
            self._counts.tombstone(id, now)
        else:
            result = json.loads(message.value())
            self._counts.result(id, result["label"], result["score"], now)

    def committed(self) -> int:
        """How many events the worker's group has committed. Blocks for the broker's answer."""
        offsets = self._worker_group.committed(self._partitions(INPUT_TOPIC), timeout=10)
        return sum(max(0, partition.offset) for partition in offsets)

    def close(self) -> None:
        self._consumer.close()
        self._worker_group.close()
