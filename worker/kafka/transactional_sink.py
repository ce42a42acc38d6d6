"""Publishes within transactions, by one transactional producer of this process."""

import contextlib
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import IllegalOperation, ProducerFenced

from worker.errors import WrongSetting
from worker.kafka.aiokafka_compat.producer import forget_transaction_error
from worker.kafka.aiokafka_compat.transactions import REFUSALS, Membership, TransactionalProducer, brokers_before_2_5
from worker.kafka.assignment import partition_names
from worker.kafka.connection import UNREACHABLE, error_name
from worker.kafka.permissions import missing_permission
from worker.kafka.producer_records import ProducerRecord
from worker.kafka.refusals import LIMITS_MAY_HAVE_CHANGED
from worker.kafka.sink import Sink
from worker.reasons import Reason
from worker.runtime.tasks import within

TRANSACTION_TIMEOUT_S: Final = 10.0  # brokers abort what has been open for longer, and fence its producer
DEADLINE_S: Final = 8.0  # of a transaction here, from its begin to its end
STOP_S: Final = 1.0  # to stop a producer whose transaction is given up
# What aiokafka raises: it asserts where a transaction has failed before.
KAFKA_ERRORS: Final = (*UNREACHABLE, IllegalOperation, AssertionError)
NEEDS_2_5: Final = "delivery exactly-once needs brokers of Kafka 2.5 or later"


class TransactionLost(Exception):
    """A transaction has not come to its end; the message says why. ``open`` ends it before another one begins.

    ``partitions`` are those of which no offset can be committed: a deleted topic's stay assigned for minutes, and would have
    each transaction fail.
    """

    def __init__(self, reason: str, partitions: Collection[TopicPartition] = ()) -> None:
        super().__init__(reason)
        self.partitions = partitions


class TransactionFailed(TransactionLost):
    """It is not committed, and may be done again."""


class TransactionFenced(TransactionLost):
    """It is not committed: brokers or group refuse it, because another process may have taken this one's place."""


class TransactionInDoubt(TransactionLost):
    """It may be committed: the committed offsets tell, once ``open`` has returned."""


async def refuse_old_brokers(client: Any) -> None:
    """Raises WrongSetting where a broker that answers a started client cannot deliver exactly once."""
    if old := await brokers_before_2_5(client):
        raise WrongSetting(f"{NEEDS_2_5}; older than that: {', '.join(old)}")


def new_transactional_id(group_id: str, instance_id: str | None) -> str:
    """That of a static member is always the same, so that a restarted process ends what the one before has left open."""
    return f"{group_id}/{instance_id or uuid.uuid4().hex}"


class TransactionalSink(Sink):
    """Publishes as Sink does. What is published becomes visible with the offsets that ``commit`` takes, or never.

    The first ``publish`` begins a transaction. ``publish`` and ``commit`` raise TransactionLost; ``open`` has to be called
    before the next one.
    """

    def __init__(self, *arguments: Any, transactional_id: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.transactional_id = transactional_id
        self._began_at: float | None = None  # on the monotonic clock; None while no transaction is open

    async def refuse_old_brokers(self) -> None:
        """Raises WrongSetting where the brokers cannot deliver exactly once. ``open`` comes before."""
        await refuse_old_brokers(self._producer)

    async def open(self) -> None:
        """Takes a new producer, which fences each other one of this id and has brokers abort the transaction it left open.

        Returns once that transaction has ended. Raises what is in UNREACHABLE.
        """
        await self.close(STOP_S, aborts=False)
        self._producer = await self._new_producer(
            TransactionalProducer,
            transactional_id=self.transactional_id,
            transaction_timeout_ms=int(TRANSACTION_TIMEOUT_S * 1000),
        )
        self._records_sent = 0

    async def known_refusals(self, producer_records: Sequence[ProducerRecord]) -> list[Reason | None]:
        left_s = DEADLINE_S if self._began_at is None else self._left_s()
        with self._losses(TransactionFailed):  # brokers that do not answer would let an open transaction grow too old
            return await within(left_s, super().known_refusals(producer_records))

    async def publish(self, producer_records: Sequence[ProducerRecord]) -> list[Reason | None]:
        self._unacknowledged.clear()
        with self._losses(TransactionFailed):
            try:
                await self._begin()
                return await within(self._left_s(), super().publish(producer_records))
            except TimeoutError:
                if not self._unacknowledged or self._is_overdue():  # a process that was frozen blames no broker
                    raise
                stalled = f"publishing is stalled: nothing is acknowledged by {partition_names(self._unacknowledged)}"
                self._health.failing("publish", stalled)
                raise TransactionFailed(stalled) from None

    async def commit(self, offsets: Mapping[TopicPartition, tuple[int, str]], member: Membership) -> None:
        """Commits what was published, and the group's offsets with their metadata, as this member of the group."""
        with self._losses(TransactionFailed, "READ"):
            producer = await self._begin()
            try:
                await within(self._left_s(), producer.add_offsets(offsets, member))
            except TimeoutError:
                if not (unknown := producer.unknown_partitions):
                    raise
                raise TransactionFailed(f"the brokers do not know {partition_names(unknown)}", unknown) from None
        with self._losses(TransactionInDoubt):
            await within(self._left_s(), producer.commit_transaction())
        self._began_at = None

    async def close(self, timeout_s: float, *, aborts: bool = True) -> None:
        """Aborts an open transaction, so that readers need not wait for it, and disconnects; within ``timeout_s``."""
        producer = self._producer
        if aborts and producer is not None and self._began_at is not None:
            with contextlib.suppress(*KAFKA_ERRORS):
                await within(timeout_s / 2, producer.abort_transaction())
        await super().close(timeout_s / 2)
        self._began_at = None
        if producer is not None:
            forget_transaction_error(producer)

    async def _begin(self) -> AIOKafkaProducer:
        """The producer, in a transaction."""
        producer = await self._fresh_producer(0)
        if self._began_at is None:
            await within(DEADLINE_S, producer.begin_transaction())
            self._began_at = time.monotonic()
        return producer

    def _left_s(self) -> float:
        assert self._began_at is not None
        return self._began_at + DEADLINE_S - time.monotonic()

    def _is_overdue(self) -> bool:
        """Whether brokers have aborted the transaction, or are about to, for its age."""
        return self._began_at is not None and time.monotonic() - self._began_at >= TRANSACTION_TIMEOUT_S

    @contextlib.contextmanager
    def _losses(self, kind: type[TransactionLost], operation: str = "WRITE") -> Iterator[None]:
        """Whatever aiokafka raises becomes ``kind``, unless it says that the transaction is fenced."""
        try:
            yield
        except KAFKA_ERRORS as error:
            raise self._loss(error, kind, operation) from error

    def _loss(self, error: BaseException, kind: type[TransactionLost], operation: str = "WRITE") -> TransactionLost:
        if isinstance(error, tuple(REFUSALS.values())):
            return TransactionFenced(f"the group has gone on without this member ({type(error).__name__})")
        overdue = f"it was open for more than {TRANSACTION_TIMEOUT_S:g} s" if self._is_overdue() else ""
        if isinstance(error, ProducerFenced):
            fenced = overdue or f"another process uses the transactional id {self.transactional_id}"
            return TransactionInDoubt(fenced) if kind is TransactionInDoubt else TransactionFenced(fenced)
        if isinstance(error, TimeoutError):
            return kind(overdue or f"brokers have not answered within {DEADLINE_S:g} s of its begin")
        return kind(missing_permission(error, operation) or overdue or error_name(error))

    async def _fresh_producer(self, records: int) -> AIOKafkaProducer:
        """The same producer as before, for a new one would begin another transaction."""
        if self._producer is None:
            raise TransactionFailed("the producer is closed")
        if self._records_sent + records > self._records_per_producer:
            raise TransactionFailed("the producer's sequence numbers run out")
        return self._producer

    async def _replace_producer(self, errors: Sequence[BaseException]) -> None:
        if {*map(type, errors)} & LIMITS_MAY_HAVE_CHANGED:
            await self._limits.refresh(0.0)
        losses = [self._loss(error, TransactionFailed) for error in errors]
        fenced = next((index for index, loss in enumerate(losses) if isinstance(loss, TransactionFenced)), 0)
        raise losses[fenced] from errors[fenced]

    def _handle_doubt(self, records: int, error: BaseException) -> None:
        """Nothing may be sent again in the same transaction."""
        raise self._loss(error, TransactionFailed) from error
