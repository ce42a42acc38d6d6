"""What is read is what aiokafka itself would deliver, record for record. Fails first where aiokafka's inside has changed."""

import asyncio
import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from inspect import getsource
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.consumer.fetcher import READ_COMMITTED, Fetcher, FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatchBuilder, _DefaultRecordBatchBuilderPy
from aiokafka.record.memory_records import MemoryRecords

import worker.kafka.connection  # noqa: F401 - sets the bound
from worker.kafka import decompression as unpacking
from worker.kafka.decompression import HEADERS, Budget, TooManyHeaders, UnpacksTooLarge
from worker.kafka.reader import FetchedRecord, FetchedRuns, Reader
from worker.runtime.tasks import cancel_all

TP = TopicPartition("texts", 3)
COMMIT, ABORT = b"\0\0\0\1", b"\0\0\0\0"  # the keys of control records
CONTROL = 0x20
Written = list[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]]


def batch(
    base: int,
    records: Written,
    *,
    producer: int = -1,
    transactional: bool = False,
    codec: int = 0,
    control: bool = False,
) -> bytes:
    """A batch as a broker sends it, its first offset being `base`."""
    builder = _DefaultRecordBatchBuilderPy(2, codec, int(transactional), producer, 0, 0, 100_000_000)
    if control:
        attributes = builder._get_attributes
        builder._get_attributes = lambda *args: attributes(*args) | CONTROL  # type: ignore[method-assign]
    for number, (key, value, headers) in enumerate(records):
        builder.append(number, 1_000 + number, key, value, headers)
    return base.to_bytes(8, "big") + bytes(builder.build())[8:]


def plain(count: int, name: str = "v") -> Written:
    return [
        (b"k%d" % number, f"{name}{number}".encode(), [("h", b"1")] if number % 2 else []) for number in range(count)
    ]


def fetched(data: bytes, position: int = 0, aborted: Sequence[tuple[int, int]] = ()) -> PartitionRecords:
    return PartitionRecords(TP, MemoryRecords(data), list(aborted), position, None, None, True, READ_COMMITTED)


def runs_of(records: PartitionRecords, limit: int) -> tuple[list[list[FetchedRecord]], list[int], int]:
    """The runs, the position after each, and the one after all."""
    store = FetchedRuns(Budget(0))
    store.limits[TP] = lambda: limit
    store[TP] = FetchResult(TP, assignment=None, partition_records=records, backoff=0)
    runs = store[TP]._partition_records
    taken = [(run, runs.next_fetch_offset) for run in runs]
    return [run for run, _ in taken], [position for _, position in taken], runs.next_fetch_offset


def as_rows(records: PartitionRecords) -> list[tuple[Any, ...]]:
    """What aiokafka's own way makes of them."""
    return [(r.topic, r.partition, r.offset, r.timestamp, r.key, r.value, list(r.headers)) for r in records]


FETCHES: dict[str, tuple[bytes, int, list[tuple[int, int]]]] = {
    "one batch": (batch(0, plain(7)), 0, []),
    "many batches": (b"".join(batch(base, plain(3)) for base in range(0, 30, 3)), 0, []),
    "position inside of a batch": (batch(10, plain(7), codec=1) + batch(17, plain(2)), 14, []),
    "position at the last record": (batch(0, plain(5)), 4, []),
    "a gap that compaction left": (batch(0, plain(3)) + batch(50, plain(3)), 0, []),
    "a batch that compaction emptied": (batch(0, plain(3)) + batch(3, plain(0)) + batch(9, plain(2)), 0, []),
    "nulls": (batch(0, [(None, b"v", []), (b"k", None, []), (b"", b"", [("h", None)])]), 0, []),
    "aborted and committed": (
        batch(0, plain(3, "aborted"), producer=7, transactional=True)
        + batch(3, plain(2, "other"), producer=8, transactional=True)
        + batch(5, [(ABORT, b"\0" * 6, [])], producer=7, transactional=True, control=True)
        + batch(6, [(COMMIT, b"\0" * 6, [])], producer=8, transactional=True, control=True)
        + batch(7, plain(2, "later"), producer=7, transactional=True),
        0,
        [(7, 0)],
    ),
    "control batches alone": (batch(0, [(COMMIT, b"\0" * 6, [])], producer=8, transactional=True, control=True), 0, []),
    "cut off at the end": (batch(0, plain(3)) + batch(3, plain(9))[:-5], 0, []),
}


@pytest.mark.parametrize("limit", [1, 2, 3, 1_000])
@pytest.mark.parametrize("name", FETCHES)
def test_runs_are_what_aiokafka_delivers(name: str, limit: int) -> None:
    ours, theirs = fetched(*FETCHES[name]), fetched(*FETCHES[name])
    runs, positions, end = runs_of(ours, limit)
    expected = as_rows(theirs)
    assert [(*record[:6], list(record.headers)) for run in runs for record in run] == expected
    assert all(0 < len(run) <= limit for run in runs)
    assert all(position > run[-1].offset for run, position in zip(runs, positions, strict=True))
    assert end == theirs.next_fetch_offset


def test_a_run_of_one_touches_no_record_behind_it() -> None:
    """The careful way past a record that cannot be read: those before it come one by one."""
    good, bad = batch(0, plain(2)), bytearray(batch(2, plain(2)))
    bad[-3] ^= 1
    store = FetchedRuns(Budget(0))
    store.limits[TP] = lambda: 1
    store[TP] = FetchResult(TP, assignment=None, partition_records=fetched(good + bytes(bad)), backoff=0)
    runs = store[TP]._partition_records
    assert [next(runs)[0].offset, next(runs)[0].offset, runs.next_fetch_offset] == [0, 1, 2]
    with pytest.raises(CorruptRecordException):
        next(runs)


def test_the_limit_is_asked_for_when_records_are_taken() -> None:
    """Between two runs there may have become room, or none."""
    limits = iter([1, 3, 2])
    store = FetchedRuns(Budget(0))
    store.limits[TP] = lambda: next(limits)
    store[TP] = FetchResult(TP, assignment=None, partition_records=fetched(batch(0, plain(6))), backoff=0)
    runs = store[TP]._partition_records
    assert [len(next(runs)) for _ in range(3)] == [1, 3, 2]


async def test_each_partition_has_a_limit_of_its_own() -> None:
    other = TopicPartition("texts", 4)
    consumer = FakeConsumer()
    reader = Reader(consumer, Budget(0))  # type: ignore[arg-type]
    for tp in (TP, other):
        consumer._fetcher._records[tp] = FetchResult(
            tp, assignment=None, partition_records=fetched(batch(0, plain(9))), backoff=0
        )
    consumer.before_answering = lambda: reader._fetched.limits.__setitem__(other, lambda: 5)  # type: ignore[union-attr]
    assert len(await reader.read(TP, limit=lambda: 1)) == 1


@pytest.mark.parametrize("taken", [0, 1, None])
def test_what_was_fetched_goes_when_it_is_read_or_dropped(taken: int | None) -> None:
    """Not only when Python looks for reference cycles: it is a megabyte for each partition, again and again."""
    gc.disable()
    try:
        records = fetched(batch(0, plain(3)))
        store = FetchedRuns(Budget(0))
        store.limits[TP] = lambda: 2
        store[TP] = FetchResult(TP, assignment=None, partition_records=records, backoff=0)
        runs = store[TP]._partition_records
        left = weakref.ref(records), weakref.ref(runs)
        assert len(list(islice(runs, taken))) == (2 if taken is None else taken)
        store.clear()
        del records, runs
        assert [each() for each in left] == [None, None]
    finally:
        gc.enable()


async def test_another_aiokafka_is_read_in_its_own_way() -> None:
    class Other:
        async def getmany(self, *_: Any, **options: Any) -> dict[TopicPartition, list[Any]]:
            return {TP: ["a record"] * options["max_records"]}

    assert len(await Reader(Other(), Budget(0)).read(TP, limit=lambda: 3)) == 3  # type: ignore[arg-type]


def test_aiokafka_has_inside_what_is_relied_on() -> None:
    names = {
        "_tp", "_records", "_aborted_transactions", "_aborted_producers", "_check_crcs", "_isolation_level",
        "next_fetch_offset", "_records_iterator", "_consume_aborted_up_to", "_contains_abort_marker",
    }  # fmt: skip
    assert [name for name in names if not hasattr(fetched(b""), name)] == []
    assert "self._records = collections.OrderedDict()" in getsource(Fetcher.__init__)
    assert "self._records[tp] = FetchResult(" in getsource(Fetcher._proc_fetch_request)
    assert "getall(max_records)" in getsource(Fetcher.fetched_records)
    assert "for tp in list(self._records.keys()):" in getsource(Fetcher.fetched_records)
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, 0, 1_000)
    assert builder.append(0, None, b"k", b"v", []) is not None


class FakeConsumer:
    """Takes from the store as aiokafka's fetcher does."""

    def __init__(self) -> None:
        self._fetcher = SimpleNamespace(_records=OrderedDict())
        self.before_answering: Any = lambda: None

    async def getmany(self, tp: TopicPartition, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Any]]:
        self.before_answering()
        found = self._fetcher._records[tp]._partition_records
        return {tp: [next(found) for _ in range(max_records)]}


# What is unpacked.

MB = 2**20
LARGE = [(b"k", bytes(300_000), []) for _ in range(20)]  # 6 MB


class Partitions:
    """A consumer that has fetched these partitions."""

    def __init__(self, budget: Budget, fetches: dict[int, bytes]) -> None:
        self._fetcher = SimpleNamespace(_records=OrderedDict())
        self.reader = Reader(self, budget)  # type: ignore[arg-type]
        self.store = self._fetcher._records
        for partition, data in fetches.items():
            tp = TopicPartition("texts", partition)
            records = PartitionRecords(tp, fetcher.MemoryRecords(data), [], 0, None, None, True, READ_COMMITTED)
            self.store[tp] = FetchResult(tp, assignment=None, partition_records=records, backoff=0)

    async def getmany(self, tp: TopicPartition, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Any]]:
        if tp not in self.store:
            return {}
        runs = list(islice(self.store[tp]._partition_records, max_records))
        if not runs:
            del self.store[tp]
        return {tp: runs}

    async def run(self, partition: int, limit: int = 1_000) -> list[FetchedRecord]:
        return await self.reader.read(TopicPartition("texts", partition), limit=lambda: limit)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - a thread's work
            await asyncio.sleep(0.01)


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> Budget:
    """Room for one batch of 8 MB."""
    monkeypatch.setattr(unpacking, "UNPACKED_BYTES", 8 * MB)
    return Budget(0)


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
async def test_large_batches_wait_for_one_another(budget: Budget, codec: int) -> None:
    partitions = Partitions(budget, {number: batch(0, LARGE, codec=codec) for number in range(5)})
    least = budget.free

    async def read_to_end(partition: int) -> int:
        nonlocal least
        count = 0
        while run := await partitions.run(partition, 3):
            least = min(least, budget.free)
            count += len(run)
            await asyncio.sleep(0)
        return count

    async with asyncio.timeout(30):
        assert await asyncio.gather(*map(read_to_end, range(5))) == [len(LARGE)] * 5
    assert 0 <= least < 3 * MB, "one at a time was held"
    assert budget.free == 8 * MB
    assert not partitions.reader.waiting


async def test_one_that_waits_holds_nothing_and_a_small_one_does_not_overtake(budget: Budget) -> None:
    small = batch(0, plain(100), codec=4)
    partitions = Partitions(budget, {0: batch(0, LARGE, codec=1), 1: batch(0, LARGE, codec=1), 2: small, 3: small})
    assert len(await partitions.run(0, 1)) == 1
    assert len(await partitions.run(2)) == 100, "while there is room and nobody waits"
    free = budget.free
    waiting = [asyncio.create_task(partitions.run(number, 1)) for number in (1, 3)]
    await until(lambda: len(partitions.reader.waiting) == 2 and budget.free == free)
    while await partitions.run(0):
        pass
    async with asyncio.timeout(30):
        assert len(await waiting[0]) == 1
        while await partitions.run(1):
            pass
        assert len(await waiting[1]) == 1


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
async def test_batches_behind_a_packed_one_that_holds_much_are_their_own(codec: int) -> None:
    """Some are packed, some are not: what is looked into is their bytes, and not those of the first one."""
    large = [(b"k%d" % number, b"%d" % number * 50_000, []) for number in range(30)]
    data = batch(0, large, codec=codec) + batch(30, plain(5)) + batch(35, plain(3), codec=codec) + batch(38, plain(2))
    partitions = Partitions(Budget(0), {0: data})
    rows: list[FetchedRecord] = []
    async with asyncio.timeout(30):
        while run := await partitions.run(0, 256):
            rows += run
    assert [(*row[2:6], list(row.headers)) for row in rows] == [row[2:] for row in as_rows(fetched(data))]


@pytest.mark.parametrize("end", ["released", "dropped", "sought elsewhere"])
async def test_what_is_not_read_to_its_end_is_given_back(budget: Budget, end: str) -> None:
    tp = TopicPartition("texts", 0)
    partitions = Partitions(budget, {0: batch(0, LARGE, codec=4)})
    assert len(await partitions.run(0, 1)) == 1
    assert budget.free < 3 * MB
    if end == "released":
        partitions.reader.release(tp)
        assert await partitions.run(0) == []
    elif end == "dropped":
        partitions.store.clear()
    else:
        partitions.store[tp]._partition_records = None
        partitions.reader.release(tp)
    assert budget.free == 8 * MB


async def test_who_is_cancelled_while_a_thread_unpacks_gives_back_when_it_is_done(
    budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    unpack = unpacking.unpack_batch

    def slowly(*args: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert goes_on.wait(30)
        return unpack(*args)

    monkeypatch.setattr(unpacking, "unpack_batch", slowly)
    partitions = Partitions(budget, {0: batch(0, LARGE, codec=4), 1: batch(0, plain(100), codec=4)})
    reading = asyncio.create_task(partitions.run(0))
    assert await asyncio.to_thread(begun.wait, 30)
    await cancel_all([reading])
    assert budget.free < 8 * MB
    assert not partitions.reader.waiting
    other = asyncio.create_task(partitions.run(1))
    goes_on.set()
    async with asyncio.timeout(30):
        assert len(await other) == 100
    assert await partitions.run(0) == [], "it has to be fetched anew"
    assert await partitions.run(1) == []
    await until(lambda: budget.free == 8 * MB)


async def test_a_batch_that_cannot_be_unpacked_gives_back(budget: Budget) -> None:
    bomb = batch(0, [(b"k", bytes(9 * MB), [])], codec=4)
    good = batch(0, LARGE, codec=4)
    partitions = Partitions(budget, {0: bomb, 1: good})
    for _ in range(2):  # also who comes back to it
        with pytest.raises(UnpacksTooLarge):
            await partitions.run(0)
    gc.collect()
    assert len(await partitions.run(1)) == len(LARGE)


async def test_many_small_batches_are_not_unpacked_in_one_go(budget: Budget) -> None:
    each = [(b"k", bytes(900_000), [])]
    data = b"".join(batch(number, each, codec=4) for number in range(20))
    partitions = Partitions(budget, {0: data})
    runs = []
    while run := await partitions.run(0):
        runs.append(len(run))
    assert sum(runs) == 20
    assert max(runs) <= 3
    assert budget.free == 8 * MB


@pytest.mark.parametrize("codec", [0, 1, 4])
@pytest.mark.parametrize("padding", [0, 2 * MB])
async def test_a_record_of_too_many_headers_cannot_be_read(budget: Budget, codec: int, padding: int) -> None:
    """In a small batch and in a large one, packed and not."""
    name = [("", None)]
    fitting = batch(0, [(None, bytes(padding), name * HEADERS)], codec=codec)
    (record,) = await Partitions(budget, {0: fitting}).run(0)
    assert len(record.headers) == HEADERS
    records: Written = [(None, b"v", []), (None, bytes(padding), name * (HEADERS + 1))]
    with pytest.raises(TooManyHeaders):
        await Partitions(budget, {0: batch(0, records, codec=codec)}).run(0)
