"""What is read from Kafka, without the cost of aiokafka's own records: a third of what a record costs.

aiokafka makes a dataclass of eleven fields per record, through five Python calls. Here its batches, whose parsing is
native, are unpacked a run of records at a time. Everything that decides *which* records are delivered, and what the
position is after them, stays where it was: in aiokafka's fetcher, and in ``Runs``, which follows its PartitionRecords.
"""

import asyncio
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple, NoReturn

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException, UnsupportedCodecError

import worker.kafka.aiokafka_compat  # noqa: F401 - a fetch keeps its bytes
from worker.core.events import Headers
from worker.kafka.decompression import AT_ONCE, HEADERS, Budget, Share, TooManyHeaders, refuse_many_headers


class FetchedRecord(NamedTuple):
    """A record as it was read. The timestamp is in ms since 1970; negative, or None in the oldest format, for none."""

    topic: str
    partition: int
    offset: int
    timestamp: int | None
    key: bytes | None
    value: bytes | None
    headers: Headers


class Reader:
    """Reads a consumer's partitions, a run of records at a time."""

    def __init__(self, consumer: AIOKafkaConsumer, budget: Budget) -> None:
        """Of a consumer that is started and has no partition yet."""
        self._consumer = consumer
        self._fetched: Fetched | None = None
        self.waiting: set[TopicPartition] = set()  # for a large batch to be unpacked, or for room to do it
        fetcher = getattr(consumer, "_fetcher", None)
        if fetcher is not None and isinstance(getattr(fetcher, "_records", None), OrderedDict):
            self._fetched = fetcher._records = Fetched(budget)

    async def read(self, tp: TopicPartition, *, timeout_ms: int, limit: Callable[[], int]) -> list[FetchedRecord]:
        """The next records of a partition; none after so many ms. Raises what ``getmany`` raises.

        ``limit`` says, once they are there, how many are taken at most. The consumer's position has moved past them, and
        after an error it may have moved too.
        """
        if self._fetched is None:  # another aiokafka than we know: its own records will do
            fetched = await self._consumer.getmany(tp, timeout_ms=timeout_ms, max_records=limit())
            records: list[FetchedRecord] = fetched.get(tp, [])
            return records
        self._fetched.limits[tp] = limit
        while True:
            fetched = await self._consumer.getmany(tp, timeout_ms=timeout_ms, max_records=1)
            runs: list[list[FetchedRecord]] = fetched.get(tp)
            if not runs or runs[0]:
                return runs[0] if runs else []
            waits_for = self._fetched.runs(tp)
            if waits_for is None:
                continue
            self.waiting.add(tp)
            try:
                await waits_for.unpack_next()
            finally:
                self.waiting.discard(tp)

    def release(self, tp: TopicPartition) -> None:
        """Drops what is unpacked of a partition that nobody reads for now; who reads it later has it fetched anew."""
        runs = self._fetched.runs(tp) if self._fetched is not None else None
        if runs is not None:
            runs.close()


class Fetched(OrderedDict[TopicPartition, Any]):
    """aiokafka's store of what was fetched and not yet taken: where its records become runs of records."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self._budget = budget
        self.limits: dict[TopicPartition, Callable[[], int]] = {}  # by partition: readers wait side by side

    def __setitem__(self, tp: TopicPartition, result: Any) -> None:
        if type(result) is FetchResult:
            result._partition_records = Runs(result._partition_records, self.limits, self._budget)
        super().__setitem__(tp, result)

    def runs(self, tp: TopicPartition) -> "Runs | None":
        found = getattr(self.get(tp), "_partition_records", None)
        return found if isinstance(found, Runs) else None


class Runs(PartitionRecords):  # type: ignore[misc]
    """One partition's part of a fetch, as runs of at most ``limits[tp]()`` records. Raises CorruptRecordException.

    Its records are those of PartitionRecords: CRC checked, aborted transactions and control batches left out, and what
    lies before the position, of which a compressed batch may bring some.

    An empty run stands for a batch that is not unpacked on the event loop: ``unpack_next`` has to be awaited before the
    next run. What a batch holds unpacked is taken from the budget until its last record is taken, or all of it dropped.
    """

    def __init__(
        self, fetched: PartitionRecords, limits: dict[TopicPartition, Callable[[], int]], budget: Budget
    ) -> None:
        self.__dict__.update(fetched.__dict__)
        fetched._records_iterator = None  # which holds it, and with it all that was fetched, in a reference cycle
        self._limits = limits
        self._budget = budget
        self._large: Any = None  # the batch that an empty run stands for
        self._unpacked: tuple[Iterator[Any], Share | None] | None = None
        # By a proxy, for an iterator that holds its owner is a reference cycle: one that is dropped unread stays long
        self._records_iterator = Runs._runs(weakref.proxy(self))  # type: ignore[arg-type]

    def __next__(self) -> list[FetchedRecord]:
        try:
            run: list[FetchedRecord] = super().__next__()
        except (AssertionError, UnsupportedCodecError) as error:  # of formats that no broker of today takes
            raise CorruptRecordException(f"{error} - {self._tp}") from error
        return run

    def close(self) -> None:
        """There are no more runs."""
        self._records_iterator = iter(())
        self._unpacked = None

    async def unpack_next(self) -> None:
        """Unpacks what the last run, an empty one, stands for. Raises what reading its records raises."""
        batch = self._large
        try:
            if _is_packed(batch):
                self._unpacked = await self._budget.unpacked(batch)
            else:
                await asyncio.to_thread(refuse_many_headers, self._records.first_records())
                self._unpacked = chain(batch), None
        except asyncio.CancelledError:
            self.close()  # the thread goes on, and takes the batch's first record
            raise

    def _runs(self) -> Iterator[list[FetchedRecord]]:
        run: list[FetchedRecord] = []
        limit = self._limits[self._tp]()
        held = 0  # by the batches of this run
        while self._records.has_next():
            batch = self._records.next_batch()
            if self._is_for_us(batch):
                unpacked = self._unpacked_at_once(batch, held)
                if unpacked is None:
                    if run:
                        yield run
                    self._large = batch
                    while self._unpacked is None:
                        yield []
                    unpacked, self._unpacked, self._large = self._unpacked, None, None
                    run, held, limit = [], 0, self._limits[self._tp]()
                records, share = unpacked
                held += share.size if share else 0
                try:
                    while some := list(islice(records, limit - len(run))):
                        run += self._rows(some)
                        if len(run) >= limit:
                            yield run
                            run, held, limit = [], 0, self._limits[self._tp]()
                finally:
                    if share:
                        share.keep(0)
                del records, share, unpacked  # before there is more
            # Also where compaction took the last records of a batch, or all of them
            self.next_fetch_offset = batch.next_offset
            del batch
        if run:
            yield run

    def _unpacked_at_once(self, batch: Any, held: int) -> tuple[Iterator[Any], Share | None] | None:
        """Its records, where they cost little; ``held`` is what this run has unpacked already."""
        if _is_packed(batch):
            return self._budget.unpacked_at_once(batch) if held <= AT_ONCE else None
        # A broker sends more than a fetch's bound only where it is one batch: the first one's bytes are then this one's.
        return None if self._records.size_in_bytes() > AT_ONCE else (chain(batch), None)

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

    def _rows(self, records: list[Any]) -> list[FetchedRecord]:
        position = self.next_fetch_offset
        if records[0].offset < position:
            records = [record for record in records if record.offset >= position]
        if records:
            self.next_fetch_offset = records[-1].offset + 1
        topic, partition = self._tp.topic, self._tp.partition
        new = tuple.__new__
        return [
            new(
                FetchedRecord,
                (
                    topic,
                    partition,
                    r.offset,
                    r.timestamp,
                    r.key,
                    r.value,
                    h if len(h := r.headers) <= HEADERS else _many(),
                ),
            )
            for r in records
        ]


def _is_packed(batch: Any) -> bool:
    """Batches of formats before 0.11 do not say."""
    return getattr(batch, "compression_type", 1) != 0


def _many() -> NoReturn:
    raise TooManyHeaders
