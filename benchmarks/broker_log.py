"""What a broker's own log says of a run: when each event was there, and when its result could be read.

With `message.timestamp.type=LogAppendTime` a broker dates each batch by its own clock. So nothing but the load and the
workers runs while time counts, and one clock tells both ends. The log's segments are read afterwards, which needs a broker
whose files can be read: one that the benchmark itself has started.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aiokafka.record.memory_records import MemoryRecords

from tests.support.broker import Broker

APPEND_TIME = {"message_timestamp_type": "LogAppendTime"}
OFFSET_KEYS = (b"\x00\x00", b"\x00\x01")  # the versions of a key that stand for a partition's offset
OFFSETS_TOPIC = "__consumer_offsets"
COMMIT_MARKER = b"\x00\x00\x00\x01"  # a control record's key: version, then 1 for a commit and 0 for an abort


class Readable(NamedTuple):
    """A record that readers get: the event's number, its partition, and since when, ms since 1970 by the broker's clock."""

    number: int
    partition: int
    since_ms: int


@dataclass
class TopicLog:
    """The records of a topic that readers with read_committed get, and how many records of each kind there are."""

    readable: list[Readable] = field(default_factory=list)
    records: int = 0
    control_records: int = 0

    def per_second(self) -> float:
        """Records that became readable per second, from a tenth of them to nine tenths."""
        times = sorted(record.since_ms for record in self.readable)
        begin, end = (times[int(len(times) * share)] for share in (0.1, 0.9))
        return 0.8 * len(times) / (end - begin) * 1000

    def first(self) -> dict[int, Readable]:
        """The first record of each event."""
        found: dict[int, Readable] = {}
        for record in self.readable:
            if record.number not in found or record.since_ms < found[record.number].since_ms:
                found[record.number] = record
        return found


class Wait(NamedTuple):
    """An event from its publishing to its readable result, ms since 1970."""

    partition: int
    from_ms: int
    to_ms: int

    @property
    def ms(self) -> int:
        return self.to_ms - self.from_ms


def read_topic(broker: Broker, topic: str, partitions: int) -> TopicLog:
    """Reads a topic whose values are JSON objects with a whole number `id`. Blocks for a second per 300,000 records."""
    log = TopicLog()
    for partition in range(partitions):
        read_partition(batches(broker.read_segment(topic, partition)), partition, log)
    return log


def read_partition(entries: Iterator[Any], partition: int, log: TopicLog) -> None:
    """Adds a partition. A record is readable once no transaction that began before it is open; an aborted one never."""
    waiting: deque[tuple[int, int, list[int]]] = deque()  # offset and producer of a batch, and its events' numbers
    began: dict[int, int] = {}  # the first offset of each open transaction by its producer
    for batch in entries:
        if batch.is_control_batch:
            log.control_records += 1
            first = began.pop(batch.producer_id, batch.base_offset)
            if next(iter(batch)).key != COMMIT_MARKER:
                waiting = deque(each for each in waiting if not (each[1] == batch.producer_id and each[0] >= first))
        else:
            numbers = [int(json.loads(record.value)["id"]) for record in batch]
            log.records += len(numbers)
            waiting.append((batch.base_offset, batch.producer_id, numbers))
            if batch.is_transactional:
                began.setdefault(batch.producer_id, batch.base_offset)
        stable = min(began.values(), default=batch.next_offset)
        while waiting and waiting[0][0] < stable:
            log.readable += [Readable(number, partition, batch.max_timestamp) for number in waiting.popleft()[2]]


def per_second(batches_of_partitions: Iterable[Iterable[Any]], begin_ms: float, end_ms: float) -> float:
    """Records per second that a topic's batches, by partition, got between two moments, ms since 1970."""
    count = sum(
        batch.next_offset - batch.base_offset
        for entries in batches_of_partitions
        for batch in entries
        if not batch.is_control_batch and begin_ms <= batch.max_timestamp < end_ms
    )
    return count / (end_ms - begin_ms) * 1000


def waits(events: TopicLog, results: Mapping[int, Readable]) -> list[Wait]:
    """Of each event that has a result, in the order of their publishing."""
    found = [
        Wait(event.partition, event.since_ms, results[event.number].since_ms)
        for event in events.readable
        if event.number in results
    ]
    return sorted(found, key=lambda wait: wait.from_ms)


def commit_times(broker: Broker, partitions: int, *, exactly_once: bool) -> list[int]:
    """When offsets were committed, ms since 1970, one for each transaction, else one for each request.

    `partitions` are those of Kafka's own topic of offsets.
    """
    return [
        batch.max_timestamp
        for partition in range(partitions)
        for batch in batches(broker.read_segment(OFFSETS_TOPIC, partition))
        if is_commit(batch, exactly_once)
    ]


def is_commit(batch: Any, exactly_once: bool) -> bool:
    """Whether a batch of Kafka's topic of offsets ends a transaction, else whether it holds offsets and no membership."""
    key = next(iter(batch)).key
    if exactly_once:
        return bool(batch.is_control_batch) and key == COMMIT_MARKER
    return not batch.is_control_batch and key[:2] in OFFSET_KEYS


def batches(segment: bytes) -> Iterator[Any]:
    """The record batches of a segment, without one that is only half written."""
    records = MemoryRecords(segment)
    while records.has_next():
        yield records.next_batch()


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Medians and tails, ms."""
    ordered = sorted(times)
    return {f"p{share}_ms": round(ordered[int(len(ordered) * share / 100)], 1) for share in (50, 95, 99)}
