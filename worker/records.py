"""What is read from Kafka, without the cost of aiokafka's own records: a third of what a record costs.

aiokafka makes a dataclass of eleven fields per record, through five Python calls. Here its batches, whose parsing is
native, are unpacked a run of records at a time. Everything that decides *which* records are delivered, and what the
position is after them, stays where it was: in aiokafka's fetcher, and in ``Runs``, which follows its PartitionRecords.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException

from worker.events import Headers


class Record(NamedTuple):
    """A record as it was read. ``timestamp`` in ms since 1970; negative, or None in the oldest format, for none."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers


class Reader:
    """Reads a consumer's partitions, a run of records at a time."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        """Of a consumer that is started and has no partition yet."""
        self._consumer = consumer
        self._fetched: Fetched | None = None
        fetcher = getattr(consumer, "_fetcher", None)
        if fetcher is not None and isinstance(getattr(fetcher, "_records", None), OrderedDict):
            self._fetched = fetcher._records = Fetched()

    async def read(self, tp: TopicPartition, *, timeout_ms: int, limit: Callable[[], int]) -> list[Record]:
        """The next records of a partition; none after so many ms. Raises what ``getmany`` raises.

        ``limit`` says, once they are there, how many are taken at most. The consumer's position has moved past them, and
        after an error it may have moved too.
        """
        if self._fetched is None:  # another aiokafka than we know: its own records will do
            fetched = await self._consumer.getmany(tp, timeout_ms=timeout_ms, max_records=limit())
            records: list[Record] = fetched.get(tp, [])
            return records
        self._fetched.limits[tp] = limit
        runs: list[list[Record]] = (await self._consumer.getmany(tp, timeout_ms=timeout_ms, max_records=1)).get(tp)
        return runs[0] if runs else []


class Fetched(OrderedDict[TopicPartition, Any]):
    """aiokafka's store of what was fetched and not yet taken: where its records become runs of records."""

    def __init__(self) -> None:
        super().__init__()
        self.limits: dict[TopicPartition, Callable[[], int]] = {}  # by partition: readers wait side by side

    def __setitem__(self, tp: TopicPartition, result: Any) -> None:
        if type(result) is FetchResult:
            result._partition_records = Runs(result._partition_records, self.limits)
        super().__setitem__(tp, result)


class Runs(PartitionRecords):  # type: ignore[misc]
    """One partition's part of a fetch, as runs of at most ``limits[tp]()`` records. Raises CorruptRecordException.

    Its records are those of PartitionRecords: CRC checked, aborted transactions and control batches left out, and what
    lies before the position, of which a compressed batch may bring some.
    """

    def __init__(self, fetched: PartitionRecords, limits: dict[TopicPartition, Callable[[], int]]) -> None:
        self.__dict__.update(fetched.__dict__)
        fetched._records_iterator = None  # which holds it, and with it all that was fetched, in a reference cycle
        self._limits = limits
        # By a proxy, for an iterator that holds its owner is a reference cycle: one that is dropped unread stays long
        self._records_iterator = Runs._runs(weakref.proxy(self))  # type: ignore[arg-type]

    def _runs(self) -> Iterator[list[Record]]:
        run: list[Record] = []
        limit = self._limits[self._tp]()
        while self._records.has_next():
            batch = self._records.next_batch()
            if self._is_for_us(batch):
                records = chain(batch)  # a batch itself lets iter() be called once alone, and islice calls it each time
                while some := list(islice(records, limit - len(run))):
                    run += self._rows(some)
                    if len(run) >= limit:
                        yield run
                        run, limit = [], self._limits[self._tp]()
            # Also where compaction took the last records of a batch, or all of them
            self.next_fetch_offset = batch.next_offset
        if run:
            yield run

    def _is_for_us(self, batch: Any) -> bool:
        if self._check_crcs and not batch.validate_crc():
            raise CorruptRecordException(f"Invalid CRC - {self._tp}")
        if self._isolation_level == READ_COMMITTED and batch.producer_id is not None:
            self._consume_aborted_up_to(batch.base_offset)
            if batch.is_control_batch and self._contains_abort_marker(batch):
                self._aborted_producers.discard(batch.producer_id)
            if batch.is_transactional and batch.producer_id in self._aborted_producers:
                return False
        return not batch.is_control_batch

    def _rows(self, records: list[Any]) -> list[Record]:
        position = self.next_fetch_offset
        if records[0].offset < position:
            records = [record for record in records if record.offset >= position]
        if records:
            self.next_fetch_offset = records[-1].offset + 1
        topic, partition = self._tp.topic, self._tp.partition
        new = tuple.__new__
        return [new(Record, (topic, partition, r.offset, r.timestamp, r.key, r.value, r.headers)) for r in records]
