"""Reads partitions a run of records at a time, and unpacks large batches off the event loop, within a budget.

aiokafka's own records cannot be had within these bounds: it unpacks a batch where it stands, whatever its size. Records are
made here too, from aiokafka's natively parsed batches, for aiokafka makes a dataclass of eleven fields of each.
"""

import asyncio
import weakref
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple, NoReturn

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import CorruptRecordException, UnsupportedCodecError

from worker.core.events import Headers
from worker.kafka.aiokafka_compat.fetching import Batches, FetchedPartitions, reading
from worker.kafka.decompression import AT_ONCE, HEADERS, Budget, Reservation, TooManyHeaders, refuse_many_headers


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
        self.waiting: set[TopicPartition] = set()  # for a large batch to be unpacked, or for room to do it
        fetched = FetchedRuns(budget)
        self._fetched = fetched if fetched.install(consumer) else None

    def is_fetched(self, tp: TopicPartition) -> bool:
        """Whether something of a partition is there to be read: records, an error, or the end of what was fetched."""
        return self._fetched is None or tp in self._fetched  # a consumer that is not aiokafka's does not tell

    async def until_fetched(self, tp: TopicPartition, timeout_s: float) -> bool:
        """Waits until ``is_fetched``; False after so many seconds."""
        return self._fetched is None or await self._fetched.until_fetched(tp, timeout_s)

    async def read(self, tp: TopicPartition, *, limit: Callable[[], int]) -> list[FetchedRecord]:
        """The next fetched records of a partition; none where there are none. Raises what ``getmany`` raises.

        ``limit`` is asked once records are there, and says how many are taken at most. The consumer's position has moved
        past them, and after an error it may have moved too.
        """
        if self._fetched is None:  # a consumer that is not aiokafka's gives records of its own
            taken = await self._consumer.getmany(tp, timeout_ms=0, max_records=limit())
            records: list[FetchedRecord] = taken.get(tp, [])
            return records
        self._fetched.limits[tp] = limit
        reading.set(tp)
        while True:
            fetched = await self._consumer.getmany(tp, timeout_ms=0, max_records=1)
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
        """Drops what is unpacked of a partition that nobody reads for now; a later reader has it fetched anew."""
        runs = self._fetched.runs(tp) if self._fetched is not None else None
        if runs is not None:
            runs.close()


class FetchedRuns(FetchedPartitions):
    """What was fetched and is not yet taken, by partition, as runs of records."""

    def __init__(self, budget: Budget) -> None:
        limits: dict[TopicPartition, Callable[[], int]] = {}  # by partition: readers wait side by side
        super().__init__(lambda batches: Runs(batches, limits, budget))  # without ``self``, which would be a cycle
        self.limits = limits

    def runs(self, tp: TopicPartition) -> "Runs | None":
        runs = self.items_of(tp)
        return runs if isinstance(runs, Runs) else None


class Runs:
    """One partition's part of a fetch, as runs of at most ``limits[tp]()`` records. Raises CorruptRecordException.

    Records before the position, of which a compressed batch may bring some, are left out.

    An empty run stands for a batch that is not unpacked on the event loop: ``unpack_next`` has to be awaited before the
    next run. What a batch holds unpacked is taken from the budget until its last record is taken, or all of it dropped.
    """

    def __init__(self, batches: Batches, limits: dict[TopicPartition, Callable[[], int]], budget: Budget) -> None:
        self._batches = batches
        self._tp = batches.tp
        self._limits = limits
        self._budget = budget
        self._large: Any = None  # the batch that an empty run stands for
        self._unpacked: tuple[Iterator[Any], Reservation | None] | None = None
        # By a proxy, for a generator that holds its owner is a reference cycle, which is freed late if it is not read
        self._iterator: Iterator[list[FetchedRecord]] = Runs._runs(weakref.proxy(self))

    @property
    def next_fetch_offset(self) -> int:
        """The offset after the last record of the last run, by aiokafka's name: it takes it for the position."""
        return self._batches.position

    def __iter__(self) -> "Runs":
        return self

    def __next__(self) -> list[FetchedRecord]:
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(())
            raise
        except (AssertionError, UnsupportedCodecError) as error:  # of formats that no broker of today takes
            raise CorruptRecordException(f"{error} - {self._tp}") from error

    def close(self) -> None:
        """There are no more runs."""
        self._iterator = iter(())
        self._unpacked = None

    async def unpack_next(self) -> None:
        """Unpacks what the last run, an empty one, stands for. Raises what reading its records raises."""
        batch = self._large
        try:
            if _is_packed(batch):
                self._unpacked = await self._budget.unpack(batch)
            else:
                await asyncio.to_thread(refuse_many_headers, self._batches.first_records())
                self._unpacked = chain(batch), None
        except asyncio.CancelledError:
            self.close()  # the thread goes on, and takes the batch's first record
            raise

    def _runs(self) -> Iterator[list[FetchedRecord]]:
        run: list[FetchedRecord] = []
        limit = self._limits[self._tp]()
        held = 0  # by the batches of this run
        while (batch := self._batches.next_batch()) is not None:
            unpacked = self._unpack_at_once(batch, held)
            if unpacked is None:
                if run:
                    yield run
                self._large = batch
                while self._unpacked is None:
                    yield []
                unpacked, self._unpacked, self._large = self._unpacked, None, None
                run, held, limit = [], 0, self._limits[self._tp]()
            records, reservation = unpacked
            held += reservation.size if reservation else 0
            try:
                while some := list(islice(records, limit - len(run))):
                    run += self._rows(some)
                    if len(run) >= limit:
                        yield run
                        run, held, limit = [], 0, self._limits[self._tp]()
            finally:
                if reservation:
                    reservation.shrink(0)
            # Also where compaction took the last records of a batch, or all of them
            self._batches.position = batch.next_offset
            del records, reservation, unpacked, batch  # before there is more
        if run:
            yield run

    def _unpack_at_once(self, batch: Any, held: int) -> tuple[Iterator[Any], Reservation | None] | None:
        """A batch's records, where they cost little; ``held`` is what this run has unpacked already."""
        if _is_packed(batch):
            return self._budget.unpack_at_once(batch) if held <= AT_ONCE else None
        # A broker sends more than a fetch's bound only where it is one batch: the first one's bytes are then this one's.
        return None if self._batches.size_in_bytes() > AT_ONCE else (chain(batch), None)

    def _rows(self, records: list[Any]) -> list[FetchedRecord]:
        position = self._batches.position
        if records[0].offset < position:
            records = [record for record in records if record.offset >= position]
        if records:
            self._batches.position = records[-1].offset + 1
        topic, partition = self._tp
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
                    h if len(h := r.headers) <= HEADERS else _refuse_headers(),
                ),
            )
            for r in records
        ]


def _is_packed(batch: Any) -> bool:
    """Batches of formats before 0.11 do not say."""
    return getattr(batch, "compression_type", 1) != 0


def _refuse_headers() -> NoReturn:
    raise TooManyHeaders
