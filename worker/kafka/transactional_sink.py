"""A transactional producer of one input partition: publishes, and commits offsets with what it has published."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import IllegalOperation
from aiokafka.structs import OffsetAndMetadata

from worker.kafka.aiokafka_compat.producer import forget_transaction_error, while_sending
from worker.kafka.connection import UNREACHABLE, Connection
from worker.kafka.output_limits import TimestampCheck
from worker.kafka.producer_records import Columns, Indexes, ProducerRecord, unanswered
from worker.kafka.refusals import LIMITS_MAY_HAVE_CHANGED, REFUSALS
from worker.kafka.sink import Failures, Sink
from worker.kafka.topics import TopicLimits
from worker.reasons import Reason
from worker.runtime.tasks import cancel_all, within
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

TRANSACTION_TIMEOUT_MS: Final = 60_000  # a stall that is longer costs the transaction, which is then done again


class Lost(Exception):
    """A transaction cannot be finished; the message says why. Its records are processed again."""


RefusalKey = tuple[int, str, bool, int]


class Refusals:
    """What the brokers have refused of one input partition, for when its records are sent again.

    A refusal is of a whole batch. Of more than one record each is sent alone the next time, and that tells which it is.
    """

    def __init__(self) -> None:
        self._reasons: dict[RefusalKey, Reason] = {}
        self._suspects: set[RefusalKey] = set()

    def note(self, producer_records: Sequence[ProducerRecord], reason: Reason) -> None:
        """These records, sent as one batch, were refused."""
        if len(producer_records) == 1:
            self._reasons[_refusal_key(producer_records[0])] = reason
        else:
            self._suspects.update(map(_refusal_key, producer_records))

    def reason(self, producer_record: ProducerRecord) -> Reason | None:
        """Why this record is known to be refused."""
        return self._reasons.get(_refusal_key(producer_record)) if self._reasons else None

    def apart(self, producer_records: Sequence[ProducerRecord], batch: Indexes) -> list[Indexes]:
        """A batch, divided so that each record that may be the refused one is alone, in the same order."""
        if not self._suspects:
            return [batch]
        batches: list[Indexes] = []
        was_suspect = True
        for place in batch:
            is_suspect = _refusal_key(producer_records[place]) in self._suspects
            if is_suspect or was_suspect:
                batches.append([])
            batches[-1].append(place)
            was_suspect = is_suspect
        return batches

    def forget_before(self, offset: int) -> None:
        """The records before this offset are committed, and not sent again."""
        self._reasons = {key: reason for key, reason in self._reasons.items() if key[0] >= offset}
        self._suspects = {key for key in self._suspects if key[0] >= offset}


def _refusal_key(producer_record: ProducerRecord) -> RefusalKey:
    """A record's input offset, where it goes, and in which form: a dead letter has three, each smaller than the last."""
    return (
        producer_record.offset,
        producer_record.topic,
        bool(producer_record.record.value),
        len(producer_record.record.headers),
    )


class PartitionSink(Sink):
    """A transactional producer, of one input partition. What is published counts once ``commit`` has returned.

    Any failure raises Lost; afterwards only ``close`` may be called. After a refusal the topics' limits are read again
    into ``limits``.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        tp: TopicPartition,
        transactional_id: str,
        refusals: Refusals,
        limits: dict[str, TopicLimits],
        metrics: Metrics,
        health: Health,
        compression_type: str = "none",
        checks: defaultdict[str, TimestampCheck] | None = None,
    ) -> None:
        super().__init__(
            connection,
            limits=limits,
            metrics=metrics,
            health=health,
            compression_type=compression_type,
            checks=checks,
        )
        self._who = tp
        self._transactional_id = transactional_id
        self._refusals = refusals
        self._shared_limits = limits
        self._is_in_transaction = False

    async def open(self) -> None:
        """Fences every producer of this id, and ends what it left behind. Raises what is in UNREACHABLE."""
        self._producer = await self._new_producer(
            transactional_id=self._transactional_id, transaction_timeout_ms=TRANSACTION_TIMEOUT_MS
        )

    async def publish(self, producer_records: Sequence[ProducerRecord]) -> list[Reason | None]:
        """As of Sink, within a transaction, which it begins. Raises Lost."""
        if not producer_records:
            return []
        columns = Columns.of(producer_records)
        known = [self._refusals.reason(producer_record) for producer_record in producer_records]
        limited = await self._refused_by_limits(columns)
        answers = [one or other for one, other in zip(known, limited, strict=True)]
        with _failures():
            async with asyncio.timeout(TRANSACTION_TIMEOUT_MS / 1000):
                await self._begin()
                pending = {
                    tp: [apart for batch in batches for apart in self._refusals.apart(producer_records, batch)]
                    for tp, batches in (await self._pending(columns, unanswered(answers))).items()
                }
                producer = await self._fresh_producer(sum(answer is None for answer in answers))
                sending = asyncio.create_task(self._send(producer, columns, pending))
                failures = await self._while_alive(producer, sending)
        for batches, error in failures.values():
            reason = REFUSALS.get(type(error))
            if reason:
                self._refusals.note([producer_records[place] for place in batches[0]], reason)
            if type(error) in LIMITS_MAY_HAVE_CHANGED:
                await self._limits.refresh(0.0)
                self._shared_limits.update(self._limits.by_topic)
            raise Lost(type(error).__name__) from error
        self._health.working("publish", self._who)
        return answers

    async def commit(self, offset: OffsetAndMetadata, tp: TopicPartition, group_id: str) -> None:
        """Commits all that was published since the last time, and this offset of the group. Raises Lost.

        Lost does not tell whether it was committed: that the next owner reads.
        """
        with _failures():
            async with asyncio.timeout(self._connection.request_timeout_s):
                await self._begin()
                producer = await self._fresh_producer(0)
                await producer.send_offsets_to_transaction({tp: offset}, group_id)
                await producer.commit_transaction()
                self._is_in_transaction = False

    async def close(self, timeout_s: float) -> None:
        """Aborts what is open, so that readers need not wait for it, and disconnects; within ``timeout_s``."""
        producer = self._producer
        if producer is not None and self._is_in_transaction:
            with contextlib.suppress(Lost), _failures():
                await within(timeout_s / 2, producer.abort_transaction())
        await super().close(timeout_s / 2)
        if producer is not None:
            forget_transaction_error(producer)

    async def _begin(self) -> None:
        if not self._is_in_transaction:
            producer = await self._fresh_producer(0)
            await producer.begin_transaction()
            self._is_in_transaction = True

    async def _fresh_producer(self, records: int) -> AIOKafkaProducer:
        """The same producer as before, for a new one would begin another transaction. Raises Lost if it is used up."""
        if self._producer is None:
            raise Lost("the producer is closed")
        if self._records_sent + records > self._records_per_producer:
            raise Lost("the producer's sequence numbers run out")
        return self._producer

    def _count_possible_duplicates(self, records: int) -> None:
        """Counts nothing, for the transaction of these records is aborted."""

    @staticmethod
    async def _while_alive(producer: AIOKafkaProducer, sending: "asyncio.Task[Failures]") -> Failures:
        """What ``sending`` returns. Raises Lost if the producer fails: ``sending`` would then wait for ever."""
        try:
            if not await while_sending(producer, sending):
                raise Lost("the producer has failed")
            return sending.result()
        finally:
            await cancel_all([sending])


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Whatever aiokafka raises becomes Lost. It raises AssertionError where the transaction has failed before."""
    try:
        yield
    except (*UNREACHABLE, IllegalOperation, AssertionError) as error:
        raise Lost(type(error).__name__) from error
