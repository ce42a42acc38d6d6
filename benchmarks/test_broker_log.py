"""When a result counts as readable, which is all that the benchmarks' waits rest on."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.broker_log import Readable, TopicLog, Wait, read_partition, waits

COMMIT, ABORT = b"\x00\x00\x00\x01", b"\x00\x00\x00\x00"


@dataclass
class FakeRecord:
    value: bytes | None = None
    key: bytes | None = None


@dataclass
class FakeBatch:
    """A batch as aiokafka reads it from a segment."""

    base_offset: int
    max_timestamp: int
    producer_id: int = -1
    is_transactional: bool = False
    is_control_batch: bool = False
    records: list[FakeRecord] = field(default_factory=list)

    @property
    def next_offset(self) -> int:
        return self.base_offset + len(self.records)

    def __iter__(self) -> Iterator[FakeRecord]:
        return iter(self.records)


def results(offset: int, time: int, *numbers: int, producer: int = -1) -> FakeBatch:
    records = [FakeRecord(b'{"id": "%d"}' % number) for number in numbers]
    return FakeBatch(offset, time, producer, is_transactional=producer >= 0, records=records)


def marker(offset: int, time: int, producer: int, key: bytes) -> FakeBatch:
    return FakeBatch(offset, time, producer, True, True, [FakeRecord(key=key)])


def read(*batches: FakeBatch) -> TopicLog:
    log = TopicLog()
    read_partition(iter(batches), 3, log)
    return log


def test_without_transactions_a_record_is_readable_at_once() -> None:
    log = read(results(0, 10, 1, 2), results(2, 20, 3))
    assert log.readable == [Readable(1, 3, 10), Readable(2, 3, 10), Readable(3, 3, 20)]
    assert (log.records, log.control_records) == (3, 0)


def test_a_transaction_s_records_are_readable_once_it_is_committed() -> None:
    log = read(results(0, 10, 1, producer=7), results(1, 20, 2, producer=7), marker(2, 30, 7, COMMIT))
    assert log.readable == [Readable(1, 3, 30), Readable(2, 3, 30)]
    assert (log.records, log.control_records) == (2, 1)


def test_what_follows_an_open_transaction_waits_for_it() -> None:
    log = read(
        results(0, 10, 1, producer=7),
        results(1, 15, 2, producer=8),
        marker(2, 20, 8, COMMIT),
        results(3, 25, 3),
        marker(4, 30, 7, COMMIT),
    )
    assert log.readable == [Readable(1, 3, 30), Readable(2, 3, 30), Readable(3, 3, 30)]


def test_an_aborted_record_is_never_readable() -> None:
    log = read(
        results(0, 10, 1, producer=7), marker(1, 20, 7, ABORT), results(2, 30, 1, producer=7), marker(3, 40, 7, COMMIT)
    )
    assert log.readable == [Readable(1, 3, 40)]


def test_an_event_waits_for_its_first_result() -> None:
    events = read(results(0, 5, 1), results(1, 6, 2), results(2, 7, 3))
    first = read(results(0, 30, 2), results(1, 40, 1, 1), results(3, 50, 2)).first()
    assert waits(events, first) == [Wait(3, 5, 40), Wait(3, 6, 30)]
