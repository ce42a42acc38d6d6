"""What was fetched: its batches one by one, so that a caller decides when each is unpacked, and within which bounds.

aiokafka unpacks a batch on the event loop, as soon as a record of it is asked for, to whatever size it has. Upstream would
have to bound what a batch unpacks to and the headers of a record, and to let a caller wait between two batches.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.consumer.fetcher import READ_COMMITTED, FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException
from aiokafka.record import default_records, legacy_records
from aiokafka.record._crecords import default_records as compiled_default_records
from aiokafka.record._crecords import legacy_records as compiled_legacy_records
from aiokafka.record.memory_records import MemoryRecords

from worker.kafka.decompression import DECODERS, LEGACY_DECODERS
from worker.runtime.tasks import within

reading: ContextVar[TopicPartition | None] = ContextVar("reading", default=None)
"""The one partition that a task reads by ``getmany``."""

BATCH_HEAD: Final = 61  # bytes before the records of a batch
AFTER_LENGTH: Final = 12  # its offset and its length


class FetchedBytes(MemoryRecords):  # type: ignore[misc]
    """A partition's part of a fetch, which keeps its bytes accessible: aiokafka's compiled batches hide theirs."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.data = data

    def first_records(self) -> bytearray:
        """The bytes of the first batch's records, still compressed if the batch is."""
        end = AFTER_LENGTH + int.from_bytes(self.data[8:AFTER_LENGTH], "big")
        return bytearray(self.data[BATCH_HEAD:end])


fetcher.MemoryRecords = FetchedBytes

for formats, decoders in (
    ((default_records, compiled_default_records), DECODERS),
    ((legacy_records, compiled_legacy_records), LEGACY_DECODERS),
):
    for module in formats:
        for name, decode in decoders.items():
            setattr(module, name, decode)


class Batches:
    """The batches of one partition's part of a fetch, whose records are delivered: those that PartitionRecords delivers."""

    def __init__(self, fetched: PartitionRecords) -> None:
        fetched._records_iterator = (
            None  # a generator that holds ``fetched``, and so all its bytes, in a reference cycle
        )
        self._fetched = fetched
        self.tp: TopicPartition = fetched._tp
        self.position: int = fetched.next_fetch_offset
        """The offset from which records are delivered; a compressed batch may begin before it."""

    def next_batch(self) -> Any | None:
        """The next batch of records, and None at the end. Raises CorruptRecordException.

        Control batches and those of aborted transactions are left out; ``position`` moves on past them.
        """
        fetched = self._fetched
        while fetched._records.has_next():
            batch = fetched._records.next_batch()
            if self._is_delivered(batch):
                return batch
            self.position = batch.next_offset
        return None

    def size_in_bytes(self) -> int:
        """Of all batches."""
        size: int = self._fetched._records.size_in_bytes()
        return size

    def first_records(self) -> bytearray:
        """As of FetchedBytes."""
        records: FetchedBytes = self._fetched._records
        return records.first_records()

    def _is_delivered(self, batch: Any) -> bool:
        fetched = self._fetched
        if fetched._check_crcs and not batch.validate_crc():
            raise CorruptRecordException(f"Invalid CRC - {self.tp}")
        if fetched._isolation_level == READ_COMMITTED and batch.producer_id is not None:
            fetched._consume_aborted_up_to(batch.base_offset)
            if batch.is_control_batch and fetched._contains_abort_marker(batch):
                fetched._aborted_producers.discard(batch.producer_id)
            if batch.is_transactional and batch.producer_id in fetched._aborted_producers:
                return False
        return not batch.is_control_batch


class FetchedPartitions(OrderedDict[TopicPartition, Any]):
    """aiokafka's store of what was fetched and is not yet taken, by partition.

    aiokafka wakes all that wait for records whenever some come, and each then looks through all partitions: with a thousand
    that is more work than reading. Here ``until_fetched`` waits for one partition, and whoever reads one sees that alone.
    Upstream would have to wait by partition.

    ``iterate`` makes of a partition's batches what ``getmany`` takes its items from: an iterator with an attribute
    ``next_fetch_offset``, the consumer's position after the last item.
    """

    def __init__(self, iterate: Callable[[Batches], Iterator[Any]]) -> None:
        super().__init__()
        self._iterate = iterate
        self._waiters: dict[TopicPartition, asyncio.Future[None]] = {}

    def install(self, consumer: AIOKafkaConsumer) -> bool:
        """Becomes the store of a consumer that is started and has no partition yet; False if that is not aiokafka's."""
        fetching = getattr(consumer, "_fetcher", None)
        if fetching is None:
            return False
        fetching._records = self
        return True

    def __setitem__(self, tp: TopicPartition, result: Any) -> None:
        if type(result) is FetchResult:
            result._partition_records = self._iterate(Batches(result._partition_records))
        super().__setitem__(tp, result)
        waiter = self._waiters.pop(tp, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def until_fetched(self, tp: TopicPartition, timeout_s: float) -> bool:
        """Waits until something of a partition is there, records or an error; False after so long."""
        if tp not in self:
            waiter = self._waiters[tp] = asyncio.get_running_loop().create_future()
            with contextlib.suppress(TimeoutError):
                await within(timeout_s, waiter)
        return tp in self

    def keys(self) -> Any:
        """aiokafka looks through these for the partitions that are read: for one it is enough to see that."""
        tp = reading.get()
        return super().keys() if tp is None else [tp] if tp in self else []

    def items_of(self, tp: TopicPartition) -> Any:
        """What ``iterate`` has made of a partition's batches; None where nothing is there, or it is taken."""
        return getattr(self.get(tp), "_partition_records", None)
