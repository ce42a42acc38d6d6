"""What publishes the events of a benchmark: librdkafka, whose threads leave the measured processes most of the machine."""

import random
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from confluent_kafka import KafkaError, Message, Producer

from benchmarks.common import event
from tests.support.topics import Record

FLUSH_S = 120
QUEUE_RECORDS = 200_000


def numbered(number: int) -> Record:
    """An event whose text is no other's."""
    return event(number, f"текст {number}")


class OpenLoop(threading.Thread):
    """Publishes events at a rate while its `with` block runs; `record` makes one of its number.

    Open loop: an event is published when it is due, whatever became of those before. Gaps are exponential, so that the
    events arrive independently of each other; loads beside each other need seeds of their own.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        rate: float,
        record: Callable[[int], Record],
        seed: int = 1,
    ) -> None:
        super().__init__(daemon=True)
        self._producer = new_producer(bootstrap, **{"linger.ms": 0})
        self._topic = topic
        self._rate = rate
        self._record = record
        self._gaps = random.Random(seed)
        self._ended = threading.Event()
        self.published = 0

    def run(self) -> None:
        due = time.perf_counter()
        while not self._ended.is_set():
            due += self._gaps.expovariate(self._rate)
            wait = due - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            send(self._producer, self._topic, self._record(self.published))
            self.published += 1

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self.join()
        if error is None:
            finish(self._producer)


def publish(bootstrap: str, topic: str, records: Iterable[Record], **config: Any) -> None:
    """Publishes a backlog as fast as the broker takes it, and returns when the broker has all of it."""
    producer = new_producer(bootstrap, **{"linger.ms": 20, **config})
    for record in records:
        send(producer, topic, record)
    finish(producer)


def new_producer(bootstrap: str, **config: Any) -> Producer:
    return Producer(
        {
            "bootstrap.servers": bootstrap,
            "partitioner": "murmur2_random",  # Java's, as the worker's own
            "queue.buffering.max.messages": QUEUE_RECORDS,
            "log_level": 0,
            "on_delivery": delivered,
            **config,
        }
    )


def delivered(error: KafkaError | None, _: Message) -> None:
    assert error is None, f"an event of the load was refused: {error}"


def send(producer: Producer, topic: str, record: Record) -> None:
    """Waits while the queue is full."""
    while True:
        try:
            headers = [*record.headers]
            producer.produce(topic, record.value, record.key, record.partition, headers=headers)  # -1: by its key
        except BufferError:
            producer.poll(0.1)
        else:
            producer.poll(0)
            return


def finish(producer: Producer) -> None:
    assert producer.flush(FLUSH_S) == 0, "the load could not be published"
