"""Records to publish: by columns, by output partition, and into aiokafka's batches."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, pairwise, takewhile
from typing import Any, Final, NamedTuple

import numpy as np
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from worker.core.events import Outgoing
from worker.core.partitioner import partitions_for
from worker.kafka.aiokafka_compat.producer import append_records
from worker.reasons import Reason

LONGEST_VARINT: Final = 5  # bytes of a length

Header = tuple[str, bytes | None]
Indexes = list[int]  # of producer records that were given together, in their order


class ProducerRecord(NamedTuple):
    """A record to publish. ``origin`` is the input partition, which decides where a record without a key goes.

    ``offset`` is the input record's, by which a transaction that is done again recognises the record.
    """

    topic: str
    record: Outgoing
    origin: int
    offset: int = -1


class Columns(NamedTuple):
    """The fields of N producer records by columns, so that one pass over the records serves all checks."""

    topics: Sequence[str]
    origins: Sequence[int]
    timestamps: Sequence[int | None]
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    headers: Sequence[list[Header]]
    most_bytes: int
    in_doubt: set[int]  # indexes of those whose timestamp is beyond the limits by this machine's clock

    @classmethod
    def of(cls, producer_records: Sequence[ProducerRecord]) -> "Columns":
        """Takes one producer record or more."""
        topics, records, origins, _ = zip(*producer_records, strict=True)
        keys, values, headers, timestamps = zip(*records, strict=True)
        return cls(topics, origins, timestamps, keys, values, headers, most_bytes(keys, values, headers), set())

    def record_bytes(self, index: int) -> int:
        return record_bytes(self.keys[index], self.values[index], self.headers[index])


def most_bytes(keys: Sequence[bytes | None], values: Sequence[bytes | None], headers: Sequence[list[Header]]) -> int:
    """Upper bound of ``record_bytes`` for each of N records, at a tenth of the cost, for most share their headers."""
    shared = {id(some): some for some in headers}.values()
    rest = max(record_bytes(b"", b"", some) for some in shared)
    return rest + _longest(keys) + _longest(values) + 2 * LONGEST_VARINT


def _longest(column: Sequence[bytes | None]) -> int:
    return max(map(len, filter(None, column) if None in column else column), default=0)  # type: ignore[arg-type]


def record_bytes(key: bytes | None, value: bytes | None, headers: list[Header]) -> int:
    """Upper bound of a record's bytes as a batch of its own, uncompressed."""
    size: int = DefaultRecordBatchBuilder.estimate_size_in_bytes(key, value, headers)
    return size


def indexes_by_topic(topics: Sequence[str], indexes: Indexes) -> dict[str, Indexes]:
    """The indexes by the topic that each record goes to; topics without one are left out."""
    if indexes and topics.count(topics[0]) == len(topics):
        return {topics[0]: indexes}
    grouped: dict[str, Indexes] = defaultdict(list)
    for index in indexes:
        grouped[topics[index]].append(index)
    return grouped


def indexes_by_partition(columns: Columns, indexes: Indexes, partitions: int) -> dict[int, Indexes]:
    """The indexes, which are all of one topic with so many partitions, by the partition that each record goes to."""
    keys, origins = (_picked(column, indexes) for column in (columns.keys, columns.origins))
    numbers = partitions_for(keys, origins, partitions)
    order = np.argsort(numbers, kind="stable")
    numbers = numbers[order]
    begins = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(order)]
    ordered = np.array(indexes)[order].tolist()
    return {int(numbers[begin]): ordered[begin:end] for begin, end in pairwise(begins)}


def _picked(column: Sequence[Any], indexes: Indexes) -> Sequence[Any]:
    return column if len(indexes) == len(column) else [column[index] for index in indexes]


def unanswered(answers: Sequence[Reason | None]) -> Indexes:
    """The indexes of records that have no reason against them, and so are to be sent."""
    return [index for index, answer in enumerate(answers) if answer is None]


def filled(batch: BatchBuilder, columns: Columns, indexes: Indexes, room_bytes: int) -> Indexes:
    """Puts as many of these records into an empty batch as fit into the room, and at least one; returns which."""
    fitting = indexes
    if len(indexes) * columns.most_bytes > room_bytes:
        sizes = accumulate(map(columns.record_bytes, indexes))
        fitting = indexes[: max(1, sum(1 for _ in takewhile(room_bytes.__ge__, sizes)))]
    fields: tuple[Sequence[Any], ...] = (columns.timestamps, columns.keys, columns.values, columns.headers)
    count = append_records(batch, *(map(column.__getitem__, fitting) for column in fields))
    return fitting[:count]
